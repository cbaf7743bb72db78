"""A disk that fills up while a run goes on, between its checkpoints, and has room later."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import fill, metrics_of, small_disk, start_ranks, wait_for_step

from dit_ds.errors import UserError
from dit_ds.training.log_files import LineFile, ScalarBoard


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 megabytes."""
    with small_disk(tmp_path / "disk", "256m") as folder:
        yield folder


@pytest.mark.parametrize("length", [3000, 200_000])
def test_lines_wait_for_room(disk, caplog, length):
    file = LineFile(disk / "lines.jsonl", go_on=True)
    lines = [json.dumps([i, "x" * length]) for i in range(40)]
    for line in lines[:5]:
        file.write(line)
    filler = fill(disk)
    for line in lines[5:30]:
        file.write(line)
    on_disk = (disk / "lines.jsonl").read_text()
    assert on_disk.endswith("\n") and len(on_disk.splitlines()) < 30
    filler.unlink()
    for line in lines[30:]:
        file.write(line)
    file.close()
    assert (disk / "lines.jsonl").read_text().splitlines() == lines
    assert len([r for r in caplog.records if "no space left" in r.message]) == 1


def test_where_the_run_shall_stop_it_is_an_error(disk):
    file, board = LineFile(disk / "lines.jsonl", go_on=False), ScalarBoard(disk / "board", 1, go_on=False)
    file.write("first")
    fill(disk)
    with pytest.raises(UserError, match="no space left while writing .*lines.jsonl"):
        for i in range(10_000):
            file.write(str(i) * 20)
    with pytest.raises(UserError, match="no space left while writing .*board"):
        for step in range(10_000):
            board.add("train", {"loss": 1.0}, step)
    assert (disk / "lines.jsonl").read_text().endswith("\n")


def test_tensorboard_goes_on_when_there_is_room(disk, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = ScalarBoard(disk / "board", 1, go_on=True)
    board.add("train", {"loss": 1.0, "step": 1, "name": "text"}, 1)
    filler = fill(disk)
    step = 1
    while not caplog.records:
        step += 1
        board.add("train", {"loss": 1.0}, step)
        assert step < 10_000
    for _ in range(5):
        step += 1
        board.add("train", {"loss": 1.0}, step)
    filler.unlink()
    time.sleep(1.1)  # files of events are named by the second
    for last in (step + 1, step + 2):
        board.add("train", {"loss": 2.0}, last)
    board.close()
    events = EventAccumulator(str(disk / "board"))
    events.Reload()
    found = [e.step for e in events.Scalars("train/loss")]
    assert {1, step + 1, step + 2} <= set(found) and events.Tags()["scalars"] == ["train/loss"]
    assert len([r for r in caplog.records if "no space left" in r.message]) == 1


def test_a_run_goes_on_through_a_full_disk(config_file, disk):
    run = disk / "run"
    ranks = start_ranks(2, "train", "--config", config_file, "--run_dir", run, "--checkpoint.on_full_disk", "go_on",
                        "--train.epochs", "6", "--eval.every_epochs", "0", "--checkpoint.every_epochs", "6",
                        "--log.samples", "true", "--log.tensorboard", "true", "--log.every_steps", "1")  # fmt: skip
    wait_for_step(run, 2, ranks)
    filler = fill(disk)
    time.sleep(2)
    filler.unlink()
    errors = [p.communicate(timeout=120)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    steps = [m["step"] for m in metrics_of(run)]
    assert steps == list(range(1, steps[-1] + 1)) and list((run / "checkpoints").glob("step_*"))
    for rank in (0, 1):
        lines = (run / f"samples/rank_{rank:05d}.jsonl").read_text().splitlines()
        assert [json.loads(x)["step"] for x in lines] == steps
