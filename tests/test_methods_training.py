"""LAVT and ReLA through the command line: they train, evaluate and resume as DIT-SAM does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, dit_ds, metrics_of, tiny_config
from safetensors.torch import load_file

from dit_ds.checkpointing.reader import Reader


def config_of(name: str, data_root: Path, folder: Path, stage: int, **train) -> Path:
    """A tiny model's configuration as a file; its run_dir is `folder / "run"`."""
    config = tiny_config(data_root, folder / "run")
    config["model"] = {"name": name, "size": "swin_t_tiny"}
    config["data"] |= {"resize": "stretch", "color_jitter": 0, "blur": 0, "flip": 0}
    config["train"] |= {"weight_decay": 0.01, "weight_decay_norms": False} | train
    config["eval"] = {"threshold": 0.5}
    config["deepspeed"]["config"] = str(ROOT / f"configs/deepspeed/zero{stage}.json")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def falls(run: Path) -> bool:
    losses = [m["loss"] for m in metrics_of(run)]
    return len(losses) == 12 and sum(losses[-3:]) < 0.95 * sum(losses[:3])


def result(done) -> dict:
    """The metrics in the JSON line, without those of the run."""
    found = json.loads(done.stdout.splitlines()[-1])
    return {k: v for k, v in found.items() if k not in ("run", "step", "train_seconds", "prompt")}


@pytest.mark.timeout(200)
def test_lavt_trains_and_a_resumed_run_is_the_same(shards, tmp_path):
    """Two ranks at ZeRO-2, each with BatchNorms of its own: to the same bits, running statistics included."""
    config = config_of("lavt", shards, tmp_path, 2, schedule="poly")
    train = ["train", "--config", config, "--json", "--checkpoint.every_steps", "7"]
    whole, run = dit_ds(*train, ranks=2), tmp_path / "run"
    assert falls(run)
    assert result(dit_ds("eval", run, "--json")) == result(whole)

    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step_00000012")
    resumed = dit_ds(*train, "--run_dir", again, "--resume", ranks=2)
    assert "at step 7" in resumed.stderr and result(resumed) == result(whole)
    ends = [folder / "checkpoints/step_00000012" for folder in (run, again)]
    statistics, others = (load_file(end / "statistics.safetensors") for end in ends)
    assert all(torch.equal(statistics[n], others[n]) for n in statistics) and len(statistics) == 18
    assert statistics["decoder.steps.0.1.running_var"].ne(1).all()
    weights, other_weights = (Reader(end).whole("master") for end in ends)
    assert all(torch.equal(weights[n], other_weights[n]) for n in weights)
    assert "backbone.gates.3.0.weight" in load_file(run / "checkpoints/step_00000012/frozen.safetensors")


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_rela_trains_at_zero_3(shards, tmp_path):
    """Two ranks, each layer of Swin recomputed, clipped, in autocast."""
    config = config_of("rela", shards, tmp_path, 3, activation_checkpointing="block", lr=3e-4)
    autocast = ["--deepspeed.override.torch_autocast", "{enabled: true, dtype: bfloat16}"]
    done = dit_ds("train", "--config", config, "--json", *autocast, ranks=2)
    assert falls(tmp_path / "run")
    there = result(dit_ds("eval", tmp_path / "run", "--json"))  # in fp32
    assert there["n"] == result(done)["n"] and there["miou"] == pytest.approx(result(done)["miou"], abs=0.02)
