"""Evaluation results of other shards than the run's have names of their own, and `compare` reads them when told to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import dit_ds, tiny_config
from safetensors.torch import load_file, save_file

from dit_ds.checkpointing.reader import Reader, find
from dit_ds.checkpointing.weights import load_model
from dit_ds.data.sample_set.write import write_sample_set
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError
from dit_ds.files import sha256_of
from dit_ds.paper.scored_runs import NotEvaluated, read_run


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny_config(shards, folder / "run")))
    dit_ds("train", "--config", folder / "c.yaml", "--train.max_steps", "1")
    return folder / "run"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another set of the same name, split and split_by."""
    folder = tmp_path_factory.mktemp("other")
    write_sample_set(folder / "refer", images=30, seed=9, processes=1)
    images = folder / "refer/images/train2014"
    shard_refer(folder / "refer", images, "refcoco", "unc", folder / "shards", processes=1)
    return folder / "shards"


def test_another_sets_result_leaves_the_runs_own(trained, shards, other):
    own = json.loads(dit_ds("eval", trained, "--json").stdout)
    file = trained / "evaluations/val-text-step_00000001.json"
    before = file.read_bytes()
    kept = json.loads(before)
    assert kept["configured_set"] and kept["data_root"] == str(shards)
    assert kept["manifest_sha"] == sha256_of(shards / "refcoco/unc/manifest.json")
    theirs = json.loads(dit_ds("eval", trained, "--data-root", other, "--json").stdout)
    assert file.read_bytes() == before and theirs["n"] != own["n"]
    sha = sha256_of(other / "refcoco/unc/manifest.json")
    (of_other,) = (trained / "evaluations").glob(f"val-text-step_00000001-{sha[:8]}.json")
    result = json.loads(of_other.read_text())
    assert theirs.items() <= result.items() and not result["configured_set"] and result["data_root"] == str(other)
    (scored,) = read_run(trained)
    assert set(scored.scores.values()) == {round(100 * own[m], 2) for m in ("p@0.5", "p@0.7", "p@0.9", "oiou", "miou")}
    assert any("1 evaluation on other shards left out" in n for n in scored.notes)
    (scored,) = read_run(trained, sha[:8])
    assert {c.metric: v for c, v in scored.scores.items()}["miou"] == round(100 * theirs["miou"], 2)
    with pytest.raises(NotEvaluated, match="no evaluation on shards 1234"):
        read_run(trained, "1234")


def test_the_same_shards_elsewhere_are_the_runs_own(trained, shards, tmp_path):
    (tmp_path / "moved").symlink_to(shards)
    dit_ds("eval", trained, "--split", "testA", "--data-root", tmp_path / "moved")
    result = json.loads((trained / "evaluations/testA-text-step_00000001.json").read_text())
    assert result["configured_set"] and result["data_root"] == str(tmp_path / "moved")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"step": null}', '{"step": "x"}', '{"miou": 1}', b"\xff\xfe"])
def test_a_damaged_best_json_is_said_and_made_up_for(trained, tmp_path, caplog, text):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    expected = find(run)
    (run / "best.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find(run) == expected and "best.json is damaged" in caplog.text


def test_a_best_checkpoint_that_is_gone_is_said(trained, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "best.json").write_text('{"step": 7}')
    assert find(run) == run / "checkpoints/step_00000001" and "the best checkpoint, of step 7, is not in" in caplog.text


_VALUES = (None, [], 5, "x", {}, {"master": 5}, {"a": [-1]}, {"a": "b"})


@pytest.mark.parametrize("name", ["meta.json", "manifest.json"])
def test_whatever_a_damaged_file_says_is_one_line(trained, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    whole = json.loads((checkpoint / name).read_text())
    needed = {
        "meta.json": ("step", "epoch", "config", "frozen", "shapes", "digest", "progress"),
        "manifest.json": ("files",),
    }
    for value in (None, [], 5, "x", {}):
        (checkpoint / name).write_text(json.dumps(value))
        with pytest.raises(UserError, match=rf"is damaged \({name}"):
            Reader(checkpoint)
    for key in needed[name]:
        wrong = [{k: v for k, v in whole.items() if k != key}]
        wrong += [whole | {key: v} for v in _VALUES if type(v) is not type(whole[key])]
        for value in wrong:
            (checkpoint / name).write_text(json.dumps(value))
            with pytest.raises(UserError, match=rf"is damaged \({name}: {key}"):
                Reader(checkpoint)
    for value in _VALUES:  # of the right type, but not what is in it
        (checkpoint / name).write_text(json.dumps({k: value if isinstance(v, dict) else v for k, v in whole.items()}))
        with pytest.raises(UserError):
            load_model(run)


def test_a_file_of_ranges_without_them(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (file,) = run.glob("checkpoints/step_*/rank_00000.safetensors")
    for header in (None, {"ranges": "{"}, {"ranges": "[]"}, {"ranges": '{"a": 1}'}):
        save_file(load_file(file), file, header)
        with pytest.raises(UserError, match="is damaged .*rank_00000.safetensors"):
            load_model(run)


@pytest.mark.parametrize("header", ["", "[]", "{}", '{"step": 1, "epoch": 0, "config": 5}'])
def test_an_exported_file_with_a_damaged_header(trained, tmp_path, header):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"dit_ds": header})
    with pytest.raises(UserError, match="is damaged"):
        load_model(path)


def test_a_checkpoint_without_its_manifest_is_not_whole(trained, tmp_path, refusal):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    (checkpoint / "manifest.json").unlink()
    assert f"checkpoint {checkpoint} has no manifest.json" in refusal("eval", checkpoint)
