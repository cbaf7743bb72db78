"""What is asked of a training by files in its folder, evaluations that a signal ends, and `dit-ds status`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, dit_ds, environment, metrics_of, start_ranks, tiny_config, wait_for_step

from dit_ds.cli.entry import main
from dit_ds.training import requests
from dit_ds.training.requests import Requests
from dit_ds.training.run_lock import NAME, Owner
from dit_ds.training.status import lines, status


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory) -> Path:
    """Two epochs of 12 steps, each evaluated."""
    folder = tmp_path_factory.mktemp("requests")
    values = tiny_config(shards, folder / "whole")
    values["checkpoint"] = {"keep": 9}
    values["eval"] = {"threshold": 0.1, "batch_size": 1}
    values["train"] |= {"epochs": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def until(happened, ranks, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and any(p.poll() is None for p in ranks), "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_files_in_the_folder_save_evaluate_and_stop(config, tmp_path, ranks):
    run = tmp_path / "run"
    started = start_ranks(ranks, "train", "--config", config, "--run_dir", run, "--train.epochs", "60",
                          "--eval.every_epochs", "50", "--checkpoint.every_epochs", "50")  # fmt: skip
    try:
        wait_for_step(run, 1, started)
        (run / "save").touch()
        until(lambda: metrics_of(run, "save"), started)
        assert status(run)["state"] == "running"
        (run / "evaluate").touch()
        until(lambda: metrics_of(run, "eval"), started)
        (run / "stop").touch()
        assert [p.wait(60) for p in started] == [0] * ranks
    finally:
        for p in started:
            p.kill()
    assert not any((run / name).exists() for name in requests.REQUESTS)
    step = metrics_of(run)[-1]["step"]
    assert (run / f"checkpoints/step_{step:08d}/manifest.json").exists() and step < 720
    now = status(run)
    assert (now["state"], now["step"], now["total_steps"]) == ("stopped", step, 720)
    assert f"{run}/stop at step {step}, saved" in now["starts"][-1]["ended"]
    at = metrics_of(run, "eval")[0]["step"]
    assert now["best_step"] == at and (run / f"checkpoints/step_{at:08d}/manifest.json").exists()


SIGNALLED = """
import os, signal, sys
from dit_ds.cli.entry import main
from dit_ds.training import train
whole, asked = train.evaluate, []
def evaluate(*a, leave, **options):
    def ask():
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(asked) < 6, "the evaluation goes on"
        return leave()
    return whole(*a, leave=ask, **options)
train.evaluate = evaluate
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_ends_an_evaluation_which_is_made_after_the_resume(config, tmp_path):
    dit_ds("train", "--config", config)
    cut = tmp_path / "cut"
    left = subprocess.run([sys.executable, "-c", SIGNALLED, "train", "--config", config, "--run_dir", cut],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)  # fmt: skip
    assert left.returncode == 75 and "stopped by SIGTERM at step 12, saved" in left.stderr, left.stderr[-2000:]
    assert metrics_of(cut, "eval") == [] and status(cut)["state"] == "interrupted"
    dit_ds("train", "--config", config, "--run_dir", cut, "--resume")
    whole = config.parent / "whole"
    assert metrics_of(cut, "eval") == metrics_of(whole, "eval") and len(metrics_of(whole, "eval")) == 2
    digests = [json.loads((r / "checkpoints/step_00000024/meta.json").read_text())["digest"] for r in (cut, whole)]
    assert digests[0] == digests[1]
    ended = [s["ended"] for s in status(cut)["starts"]]
    assert "SIGTERM at step 12" in ended[0] and ended[1] == "done at step 24"


def test_what_cannot_be_removed_is_not_obeyed_at_each_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(requests, "_EVERY", 0.0)
    (tmp_path / "save").mkdir()
    (tmp_path / "stop").touch()
    asked = Requests(tmp_path)
    assert [asked.take(), asked.take()] == [{"stop"}, set()]
    assert len([r for r in caplog.records if "passed over" in r.message]) == 1


def a_run(folder: Path, *events: dict) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {batch_size: 10}\n")
    start = {"event": "start", "time": 1.0, "total_steps": 100, "world_size": 2, "host": "n1", "job": ""}
    (folder / "events.jsonl").write_text("".join(json.dumps(start | e) + "\n" for e in events))
    train = {"kind": "train", "step": 40, "epoch": 1, "loss": None, "samples_per_second": 20.0}
    (folder / "metrics.jsonl").write_text(json.dumps(train) + '\n{"kind": "tr')
    return folder


@pytest.mark.fast
def test_status_tells_a_killed_run_from_one_that_goes_on(tmp_path):
    run = a_run(tmp_path / "run", {"step": 0}, {"step": 30})
    (run / NAME).write_text(json.dumps(vars(Owner.this_process())))
    now = status(run)
    assert (now["state"], now["seconds_left"]) == ("running", 30)  # 60 steps of 10 samples, 20 samples a second
    assert [s["ended"] for s in now["starts"]] == ["killed, or its node was lost", None]
    assert "not finite, 20.0 samples/s" in "\n".join(lines(now)) and "restarts    1" in lines(now)
    gone = vars(Owner.this_process()) | {"pid": 2**22 + 1}
    (run / NAME).write_text(json.dumps(gone))
    assert status(run)["state"] == "killed"
    elsewhere = run / NAME
    elsewhere.write_text(json.dumps(gone | {"machine": "another"}))
    assert status(run)["state"] == "running"  # by its heartbeat
    os.utime(elsewhere, (1, 1))
    assert status(run)["state"] == "killed"


@pytest.mark.fast
def test_status_of_no_run_and_of_a_strangers(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    run = a_run(tmp_path / "run", {"step": "many"}, {"event": "end", "how": ["x"]}, {"event": 3})
    (run / "best.json").write_text("[]")
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40
