"""The golden losses: what counts as a difference, and, slow, that this tree still gives them."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import golden

WANT = json.loads(golden.GOLDEN.read_text())


def changed(run: str, key: str, change) -> dict:
    got = copy.deepcopy(WANT)
    got["runs"][run][key] = change(got["runs"][run][key])
    return got


def test_every_model_is_recorded_on_one_rank_and_on_two():
    assert set(WANT["runs"]) == {f"{m}, {w}" for m in golden.MODELS for w in golden.WORLDS}
    for run in WANT["runs"].values():
        assert len(run["losses"]) == golden.STEPS and all(x == x and x > 0 for x in run["losses"])
    assert golden.differences(WANT, WANT, exact=True) == []


def test_the_last_bit_of_one_loss_is_a_difference_bit_for_bit_only():
    got = changed("l_dit, 2 ranks", "losses", lambda x: [*x[:7], math.nextafter(x[7], 1), *x[8:]])
    [line] = golden.differences(WANT, got, exact=True)
    assert line.startswith("l_dit, 2 ranks: losses differs from entry 7")
    assert golden.differences(WANT, got, exact=False) == []


@pytest.mark.parametrize(
    ("key", "change", "close"),
    [
        ("losses", lambda x: [x[0] * 1.0001, *x[1:]], False),
        ("losses", lambda x: x[:-1], False),
        ("evaluation", lambda x: x | {"miou": x["miou"] + 1e-3}, False),
        ("order", lambda x: "0" * 64, False),
        ("batches", lambda x: "0" * 64, True),  # another processor may round a resize in another way
        ("weights", lambda x: x | {"master": "0" * 16}, True),
    ],
)
def test_what_may_differ_on_another_processor(key, change, close):
    got = changed("lavt, 1 rank", key, change)
    assert len(golden.differences(WANT, got, exact=True)) == 1
    assert (golden.differences(WANT, got, exact=False) == []) == close


def test_a_run_that_is_missing_is_a_difference():
    got = copy.deepcopy(WANT)
    del got["runs"]["rela, 1 rank"]
    assert golden.differences(WANT, got, exact=False) == ["rela, 1 rank: recorded in one only"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_this_tree_gives_them():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/golden.py", "--check"], capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
