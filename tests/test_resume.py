"""A run that is killed, damaged, resized, signalled, stalled or out of disk ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, dit_ds, environment, metrics_of, refused, small_disk, start_ranks, tiny_config, wait_for_step

from dit_ds.checkpointing.integrity import damages
from dit_ds.checkpointing.reader import Reader
from dit_ds.training.status import status

FULL_EPOCH = 12  # optimizer steps


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory) -> Path:
    """One epoch of 12 steps, a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("resume")
    values = tiny_config(shards, folder / "whole")
    values["checkpoint"] = {"every_steps": 4, "keep": 3}
    values["eval"] = {"threshold": 0.1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """The undisturbed run, on one rank."""
    dit_ds("train", "--config", config)
    return config.parent / "whole"


def same_end(a: Path, b: Path) -> bool:
    """Losses, evaluation, weights and optimizer states, to the bit."""

    def end(run):
        meta = json.loads((run / f"checkpoints/step_{FULL_EPOCH:08d}/meta.json").read_text())
        return [(m["step"], m["loss"]) for m in metrics_of(run)], metrics_of(run, "eval"), meta["digest"]

    return end(a) == end(b)


def benchmark(*args: str) -> dict:
    """What benchmarks/kill_and_resume.py reports."""
    done = subprocess.run([sys.executable, "benchmarks/kill_and_resume.py", *args, "--json"], cwd=ROOT, timeout=800,
                          capture_output=True, text=True, env=environment())  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_end_as_the_undisturbed_run():
    result = benchmark("--kills", "3", "--epochs", "3", "--seed", "1")
    assert result["identical"] == result["kills"] == 3
    assert result["samples_lost"] == result["samples_doubled"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_world_size_and_zero_stage_goes_on():
    result = benchmark("--resize")
    assert result["same_steps"] and result["samples_lost"] == result["samples_doubled"] == 0
    assert result["final_loss_relative_difference"] <= 1e-5


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config, whole, tmp_path):
    cut = tmp_path / "cut"
    run = ["train", "--config", config, "--run_dir", cut, "--resume"]
    dit_ds(*run, "--train.max_steps", "8")
    newest, former = cut / "checkpoints/step_00000008", cut / "checkpoints/step_00000004"
    file = newest / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 6] ^= 1  # among the master weights, which come first
    file.write_bytes(data)
    assert damages(newest) == ["rank_00000.safetensors has another SHA-256"] and damages(former) == []
    assert "is damaged" in refused(dit_ds("eval", newest, check=None))  # its digest differs
    done = dit_ds(*run)
    assert f"{newest} is damaged" in done.stderr and f"resumed from {former} at step 4" in done.stderr
    # max_steps evaluated at step 8, too
    assert [m["loss"] for m in metrics_of(cut)] == [m["loss"] for m in metrics_of(whole)]
    for path in (cut / "checkpoints").glob("step_*/meta.json"):
        path.unlink()
    assert "checkpoints of" in refused(dit_ds(*run, check=None))


@pytest.mark.parametrize(
    "harm", ["damaged", *(pytest.param(h, marks=pytest.mark.slow) for h in ("no manifest", "empty folder")), "gone"]
)
def test_a_resume_that_finds_no_whole_checkpoint_stops(config, tmp_path, harm):
    """It says what it found, and leaves metrics and checkpoints as they are."""
    cut = tmp_path / "cut"
    run = ["train", "--config", config, "--run_dir", cut, "--resume", "--eval.every_epochs", "0"]
    dit_ds(*run, "--train.max_steps", "5")
    for path in (cut / "checkpoints").glob("step_*"):
        if harm == "damaged":
            (path / "rank_00000.safetensors").write_bytes(b"x")
        elif harm == "no manifest":
            (path / "manifest.json").unlink()
        else:
            shutil.rmtree(path)
            if harm == "empty folder":
                path.mkdir()
    before = {str(p): p.read_bytes() for p in cut.rglob("*") if p.is_file() and p.name != "log.txt"}
    line = refused(dit_ds(*run, check=None))
    assert "start over with another --run_dir" in line
    assert ("has no checkpoint, but" if harm == "gone" else "all 2 checkpoints") in line
    assert {str(p): p.read_bytes() for p in cut.rglob("*") if p.is_file() and p.name != "log.txt"} == before


def test_lines_that_will_be_repeated_are_moved_aside(config, tmp_path):
    cut = tmp_path / "cut"
    run = ["train", "--config", config, "--run_dir", cut, "--resume", "--eval.every_epochs", "0"]
    dit_ds(*run, "--train.max_steps", "6", "--checkpoint.every_steps", "4", ranks=2)
    shutil.rmtree(cut / "checkpoints/step_00000006")
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "st')  # as a kill leaves it
    before = (cut / "metrics.jsonl").read_text().splitlines()
    dit_ds(*run, "--train.max_steps", "6", ranks=2)
    assert [json.loads(x)["step"] for x in (cut / "ranks.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(x)["step"] for x in (cut / "ranks.jsonl.superseded").read_text().splitlines()] == [5, 6]
    moved = (cut / "metrics.jsonl.superseded").read_text().splitlines()
    assert moved[-1] == before[-1] and [json.loads(x)["step"] for x in moved[:-1]] == [5, 6, 6]
    assert set(before) <= set(moved) | set((cut / "metrics.jsonl").read_text().splitlines())
    assert [m["step"] for m in metrics_of(cut)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_ends_and_a_second_one_ends_at_once(config, tmp_path, ranks):
    cut = tmp_path / "cut"
    arguments = ["train", "--config", config, "--run_dir", cut, "--resume", "--train.epochs", "50"]
    processes = start_ranks(ranks, *arguments)
    wait_for_step(cut, 1, processes)
    for p in processes:  # a terminal's, and a launcher's: one stop
        p.send_signal(signal.SIGINT)
        p.send_signal(signal.SIGINT)
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [75] * ranks, errors
    assert all("stopped by SIGINT at step" in e and "go on with --resume" in e for e in errors)
    assert not any("Traceback" in e for e in errors) and list((cut / "checkpoints").glob("step_*"))


def test_a_damaged_file_of_frozen_weights_is_restored_from_its_sources(config, whole, tmp_path):
    """All checkpoints share the file."""
    cut = tmp_path / "cut"
    run = ["train", "--config", config, "--run_dir", cut, "--resume"]
    dit_ds(*run, "--train.max_steps", "8")
    paths = sorted((cut / "checkpoints").iterdir())
    with open(paths[-1] / "frozen.safetensors", "r+b") as f:
        f.seek(-8, 2)
        f.write(b"\xff" * 8)
    assert [damages(p) for p in paths] == [["frozen.safetensors has another SHA-256"]] * 2
    line = refused(dit_ds("eval", paths[-1], check=None))
    assert "frozen.safetensors is damaged" in line and "remove it" in line
    done = dit_ds(*run, ranks=2)
    assert "reading the frozen weights from their sources" in done.stderr and "at step 8" in done.stderr
    assert [damages(p) for p in sorted((cut / "checkpoints").iterdir())] == [[]] * 3
    np.testing.assert_allclose(*[[m["loss"] for m in metrics_of(d)] for d in (cut, whole)], rtol=2e-5)


def test_half_written_checkpoints_are_not_seen_and_cleared(config, whole, tmp_path):
    """What kill -9 can leave: a hidden folder half written, and one about to be replaced."""
    cut = tmp_path / "cut"
    run = ["train", "--config", config, "--run_dir", cut, "--resume"]
    dit_ds(*run, "--train.max_steps", "8")
    there = cut / "checkpoints"
    (there / ".step_00000012.tmp").mkdir()
    (there / ".step_00000012.tmp/rank_00000.safetensors").write_bytes(b"half")
    (there / "step_00000008").rename(there / ".replaced_step_00000008")
    done = dit_ds(*run)
    assert "at step 8" in done.stderr
    assert sorted(p.name for p in there.iterdir()) == ["step_00000004", "step_00000008", "step_00000012"]
    assert [m["loss"] for m in metrics_of(cut)] == [m["loss"] for m in metrics_of(whole)]


def test_frozen_weights_left_out_must_be_found_again(config, whole, tmp_path):
    run = tmp_path / "lean"
    dit_ds("train", "--config", config, "--run_dir", run, "--checkpoint.frozen", "leave_out")
    assert not list(run.rglob("frozen.safetensors")) and list(whole.rglob("frozen.safetensors"))
    assert dit_ds("eval", run, "--json").stdout == dit_ds("eval", whole, "--json").stdout
    assert same_end(run, whole)
    meta = run / "checkpoints/step_00000012/meta.json"
    meta.write_text(meta.read_text().replace('"layers": 1', '"layers": 2'))
    assert "set both to the former files" in refused(dit_ds("eval", meta.parent, check=None))


def test_every_rank_writes_its_part_and_the_frozen_weights_are_there_once(config, tmp_path):
    run = tmp_path / "run"
    dit_ds("train", "--config", config, "--run_dir", run, ranks=2)
    paths = sorted((run / "checkpoints").iterdir())
    assert [p.name for p in paths] == [f"step_{s:08d}" for s in (4, 8, 12)]
    frozen = {(p / "frozen.safetensors").stat().st_ino for p in paths}
    assert len(frozen) == 1
    sizes = [(paths[-1] / f"rank_0000{r}.safetensors").stat().st_size for r in (0, 1)]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]
    elements = sum(np.prod(s) for s in Reader(paths[-1]).shapes.values())
    assert sum(sizes) < 1.1 * 12 * elements  # master, two moments, fp32, each once
    lines = metrics_of(run, "save")
    assert [x["step"] for x in lines] == [4, 8, 12] and all(x["blocked_seconds"] > 0 for x in lines)


def test_a_signal_ends_a_run_that_saves_in_the_foreground_alike(config, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(1, "train", "--config", config, "--run_dir", run, "--checkpoint.asynchronous", "false")
    wait_for_step(run, 1, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    error = ranks[0].communicate(timeout=120)[1]
    assert ranks[0].returncode == 75 and "saved: go on with --resume" in error, error


def test_a_run_keeps_what_it_saves_after_damaged_checkpoints(config, tmp_path):
    """Damaged newer ones don't count among those to keep, and are gone once the run went on."""
    run = ["train", "--config", config, "--run_dir", tmp_path / "cut", "--resume", "--checkpoint.keep", "1",
           "--eval.every_epochs", "0"]  # fmt: skip
    dit_ds(*run, "--checkpoint.keep", "3", "--train.max_steps", "8")
    there = tmp_path / "cut/checkpoints"
    (there / "step_00000008/rank_00000.safetensors").write_bytes(b"")
    dit_ds(*run, "--checkpoint.every_steps", "3", "--train.max_steps", "6")
    assert [p.name for p in there.iterdir()] == ["step_00000006"]
    assert damages(there / "step_00000006") == []


def test_one_rank_gets_a_signal_and_all_save_and_end_with_75(config, whole, tmp_path):
    arguments = ["train", "--config", config, "--run_dir", tmp_path / "cut", "--resume", "--data.workers", "1"]
    for number in (signal.SIGUSR2, signal.SIGTERM):
        ranks = start_ranks(2, *arguments)
        wait_for_step(tmp_path / "cut", 1 if number == signal.SIGUSR2 else 6, ranks)
        ranks[1].send_signal(number)
        errors = [p.communicate(timeout=120)[1] for p in ranks]
        if any(p.returncode == 0 for p in ranks):  # the second may come too late
            assert number == signal.SIGTERM
            break
        assert [p.returncode for p in ranks] == [75, 75], errors
        assert all(f"stopped by {number.name} at step" in e and "Traceback" not in e for e in errors)
    ranks = start_ranks(2, *arguments)
    assert [p.wait(120) for p in ranks] == [0, 0]
    losses = [[m["loss"] for m in metrics_of(d)] for d in (tmp_path / "cut", whole)]
    np.testing.assert_allclose(*losses, rtol=2e-5)  # one rank there, two here


@pytest.mark.fast
def test_a_save_is_due_by_the_clock_too(config, tmp_path):
    run = tmp_path / "run"
    often = ["--checkpoint.every_steps", "null", "--checkpoint.every_minutes", "0.001", "--checkpoint.keep", "1"]
    dit_ds("train", "--config", config, "--run_dir", run, *often, "--train.max_steps", "6")
    steps = [m["step"] for m in metrics_of(run, "save")]
    assert len(steps) >= 2 and steps[-1] == 6
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000006"]


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stalled_rank_is_named_and_ends_the_run(config, tmp_path, stopped):
    run = tmp_path / "run"
    arguments = ["train", "--config", config, "--run_dir", run, "--log.stall_seconds", "2", "--train.epochs", "40"]
    ranks = start_ranks(2, *arguments)
    try:
        wait_for_step(run, 2, ranks)
        ranks[stopped].send_signal(signal.SIGSTOP)
        assert ranks[1 - stopped].wait(90) == 76
    finally:
        for p in ranks:
            p.kill()
        said = [p.communicate()[1] for p in ranks]
    if stopped == 0:
        assert "rank 0's process does not answer" in said[1]
        return
    line = next(x for x in (run / "log.txt").read_text().splitlines() if "rank 1 on" in x)
    assert "its process does not answer" in line and "the others wait for it" in line
    assert status(run)["state"] == "stalled" and "rank 1 on" in status(run)["starts"][-1]["ended"]


def test_a_gradient_that_is_not_finite_stops_the_run_where_it_must(config, tmp_path):
    arguments = ["train", "--config", config, "--train.lr", "1e30", "--train.gradient_clipping", "0", "--run_dir"]
    done = dit_ds(*arguments, tmp_path / "stop", "--train.on_nonfinite", "stop", ranks=1, check=1)
    assert "is not finite at step" in done.stderr and "Traceback" not in done.stderr
    line = json.loads((tmp_path / "stop/nonfinite.jsonl").read_text().splitlines()[0])
    assert len(line["ranks"][0]["samples"]) == 8 and line["step"] >= 2
    manifest = json.loads(
        next(Path(yaml.safe_load(config.read_text())["data"]["root"]).rglob("manifest.json")).read_text()
    )
    keys = {f"{sample[0]:012d}" for shard in manifest["splits"]["train"]["shards"] for sample in shard["samples"]}
    assert len(line["ranks"][0]["keys"]) == 8 and set(line["ranks"][0]["keys"]) <= keys
    dit_ds(*arguments, tmp_path / "skip")  # left out and counted, to the end
    counted = metrics_of(tmp_path / "skip")[-1]["skipped_steps"]
    assert 1 <= counted == len((tmp_path / "skip/nonfinite.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("policy", "asynchronous"), [("stop", "false"), ("go_on", "true")])
def test_a_full_disk_keeps_the_former_checkpoint(config, whole, tmp_path, policy, asynchronous):
    """Room for one checkpoint and a half."""
    size = 1.5 * 12 * sum(np.prod(s) for s in Reader(whole / "checkpoints/step_00000012").shapes.values())
    with small_disk(tmp_path / "small", f"{int(size / 1024)}k") as small:
        arguments = ["train", "--config", config, "--run_dir", small / "run", "--checkpoint.frozen", "leave_out",
                     "--checkpoint.on_full_disk", policy, "--checkpoint.asynchronous", asynchronous]  # fmt: skip
        done = dit_ds(*arguments, ranks=1, check=None)
        if policy == "stop":
            assert "checkpoint of step 8 not saved: no space left" in refused(done)
        else:
            assert done.returncode == 0 and "going on, the former checkpoint is whole" in done.stderr
            assert metrics_of(small / "run")[-1]["step"] == FULL_EPOCH
        assert [p.name for p in (small / "run/checkpoints").iterdir()] == ["step_00000004"]
        assert damages(small / "run/checkpoints/step_00000004") == []
