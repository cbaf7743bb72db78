"""Damaged sets: each damage is found, and no sample is silently wrong."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_ds.checkpointing.meta import read_meta
from dit_ds.data.loading.index import SplitIndex
from dit_ds.errors import UserError
from dit_ds.training.setup import Progress

sys.path.append(str(ROOT / "benchmarks"))

import mutations

META = {
    "step": 2, "epoch": 0, "seed": 0, "samples_seen": 16, "batch_size": 8, "unit": "ref", "order": "global",
    "world_size": 1, "zero_stage": 2, "adam_step": 2.0, "dtype": "torch.float32", "config": {"seed": 0},
    "manifest_sha": "0" * 64, "val_manifest_sha": "1" * 64, "frozen": "2" * 64,
    "shapes": {"a.weight": [4, 3], "a.bias": [4]},
    "digest": dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "ema"), "3" * 16),
    "engine": {"global_steps": 2, "global_samples": 16, "micro_steps": 2, "skipped_steps": 0, "loss_scale": {}},
    "progress": {
        "step": 2, "epoch": 0, "batch": 2, "seconds": 0.5, "best_score": -1.0, "best_step": 0, "metrics": {},
        "evaluated": 0, "bad_samples": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_damage_is_found_and_none_is_silent(tmp_path, times):
    result = mutations.run(times * len(mutations.DAMAGES), 7, tmp_path, images=40)
    assert result["missed"] == []
    total = result["total"]
    assert total["damages"] == total["found_by_verify"] == times * len(mutations.DAMAGES)
    for reader in mutations.READERS:
        assert total[reader]["stopped"] and total[reader]["bad samples named"] and total[reader]["identical"]


@pytest.mark.slow
def test_forged_runs_are_refused_in_one_line_or_used_as_data(tmp_path):
    n = len(mutations.forgeries.FORGERIES)
    result = mutations.forge(n, 7, tmp_path, commands=("export", "train --resume"))
    assert result["wrong"] == []
    total = result["total"]
    assert total["forgeries"] == n and total["refused in one line"] > n / 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_what_a_checkpoint_says_of_itself_is_checked(tmp_path, seed):
    """Whatever stands in a forged meta.json: one line, or values that the rest of the program can use."""
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "meta.json").write_text(json.dumps(META))
    forged = mutations.forgeries.FORGERIES["meta.json, sealed again"]
    forged(tmp_path, random.Random(seed), tmp_path / "mark")
    try:
        meta = read_meta(checkpoint)
    except UserError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert Progress(**meta["progress"]).step >= 0 and meta["adam_step"] >= 0
    assert {"master", "exp_avg", "exp_avg_sq"} <= meta["digest"].keys()
    assert all(int(d, 16) < 1 << 64 for d in meta["digest"].values())
    assert all(type(n) is int and n >= 0 for shape in meta["shapes"].values() for n in shape)
    assert re.fullmatch("[0-9a-f]{64}", meta["frozen"])  # names a file


@pytest.mark.parametrize("check", ["check", "parse"])
def test_without_a_check_it_would_be_seen(tmp_path, monkeypatch, check):
    """The script compares for real: with the CRC or the refs unchecked, it reports samples that are silently wrong."""
    if check == "check":
        monkeypatch.setattr(SplitIndex, "check", lambda self, image, member, data: data)
        kinds = ["bytes flipped in a tar", "samples swapped in a tar"]
    else:
        monkeypatch.setattr(SplitIndex, "parse", lambda self, image, data: mutations.json.loads(data))
        kinds = ["manifest sealed again: a number, sums agree"]
    monkeypatch.setattr(mutations, "DAMAGES", {k: mutations.DAMAGES[k] for k in kinds})
    total = mutations.run(4, 7, tmp_path, images=40)["total"]
    assert all(total[r]["silently wrong"] + total[r]["traceback"] > 0 for r in mutations.READERS)
