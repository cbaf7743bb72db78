"""A shared file system that is away for a while: what is written waits for it, and nothing begins anew without it."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import dit_ds, metrics_of, start_ranks, wait_for_step

from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.data.loading.readers import MemberReader
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, patiently, write_json
from dit_ds.training import run_folder
from dit_ds.training.log_files import LineFile


def test_a_write_is_tried_until_the_folder_is_back(tmp_path, caplog):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    folder.rename(away)
    threading.Timer(1.5, away.rename, [folder]).start()
    patiently(lambda: write_json(folder / "x.json", 1, make_folder=False), folder)
    assert (folder / "x.json").exists() and len(caplog.records) == 1


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_what_a_network_says_is_waited_for(tmp_path, code):
    tries = []

    def write() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(code, os.strerror(code))
        return "written"

    assert patiently(write, tmp_path) == "written"
    tries.clear()
    with pytest.raises(OSError, match=os.strerror(code)):
        patiently(write, tmp_path, seconds=0.5)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_other_errors_are_raised_at_once(tmp_path, code):
    def write() -> None:
        with full_disk_is_user_error(tmp_path):
            raise OSError(code, os.strerror(code))

    start = time.monotonic()
    with pytest.raises(UserError):
        patiently(write, tmp_path)
    assert time.monotonic() - start < 0.5


def test_lines_wait_for_the_folder(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    file = LineFile(folder / "lines.jsonl", go_on=False)
    file.write("1")
    real, cut = os.write, []

    def write(fd: int, data: bytes) -> int:
        if not cut:  # half a line arrives
            cut.append(real(fd, data[:3]))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    file.write("22222")
    folder.rename(tmp_path / "away")
    file.write("3")
    (tmp_path / "away").rename(folder)
    file.write("4")
    file.close()
    assert (folder / "lines.jsonl").read_text().split() == ["1", "22222", "3", "4"]
    assert len([r for r in caplog.records if "can't be reached" in r.message]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_a_run_goes_on_when_its_folder_was_away(config_file, tmp_path, local):
    disk = ["--checkpoint.local", tmp_path / "disk", "--checkpoint.local_every_minutes", "0.0001"] if local else []
    words = [
        "--train.epochs",
        12,
        "--checkpoint.every_steps",
        4,
        "--eval.every_epochs",
        6,
        "--log.tensorboard",
        True,
        *disk,
    ]
    dit_ds("train", "--config", config_file, "--run_dir", tmp_path / "shared/want", *words, ranks=2)
    run, away = tmp_path / "shared/run", tmp_path / "away"
    ranks = start_ranks(2, "train", "--config", config_file, "--run_dir", run, *words)
    try:
        wait_for_step(run, 3, ranks)
        (tmp_path / "shared").rename(away)
        time.sleep(4)
        assert not (tmp_path / "shared").exists(), "made anew while it was away"
        away.rename(tmp_path / "shared")
        assert [p.wait(120) for p in ranks] == [0, 0], [p.stderr.read()[-2000:] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    want = tmp_path / "shared/want"
    for kind in ("train", "eval"):
        drop = [
            {k: v for k, v in x.items() if k in ("step", "loss", "lr", "grad_norm", "miou")}
            for x in metrics_of(run, kind)
        ]
        assert drop == [{k: v for k, v in x.items() if k in drop[0]} for x in metrics_of(want, kind)]
    assert (run / "best.json").read_text() == (want / "best.json").read_text()


def test_shards_that_are_away_are_waited_for(folder, caplog):
    index = SplitIndex.load(folder, "val")
    reader, away = MemberReader(index), folder.with_name("away")
    folder.rename(away)
    threading.Timer(1.5, away.rename, [folder]).start()
    assert reader.read(0, JPG)[:2] == b"\xff\xd8" and len(caplog.records) == 1


@pytest.fixture
def job(tmp_path, monkeypatch) -> Path:
    """The folder of a SLURM job's own."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.setenv(run_folder.VARIABLE, str(folder))
    return folder


def test_a_run_that_is_away_does_not_begin_anew(config_file, tmp_path, job, monkeypatch):
    run = tmp_path / "run"
    run_folder.note_folder(run)
    with pytest.raises(UserError, match="which this job has trained in, is gone: bring it back"):
        run_folder.wait_for_known_folder(run, seconds=0.5)
    run_folder.wait_for_known_folder(tmp_path / "other", seconds=0.5)
    threading.Timer(1, run.mkdir).start()
    run_folder.wait_for_known_folder(run)
    assert run.is_dir()


def test_a_training_notes_its_folder(config_file, tmp_path, job):
    dit_ds("train", "--config", config_file, "--run_dir", tmp_path / "run", "--train.max_steps", 1)
    assert (job / run_folder.NAME).read_text() == str(tmp_path / "run")
