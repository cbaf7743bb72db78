"""One training at a time in a run's folder: on this machine, on others, in the same job, after kills."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import dit_ds, metrics_of, refused, start_ranks, wait_for_step

from dit_ds.errors import UserError
from dit_ds.training import run_lock
from dit_ds.training.run_lock import Owner, RunLock


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Heartbeats every 0.1 s, one second of patience."""
    for name, seconds in (("INTERVAL", 0.1), ("PATIENCE", 1.0), ("SETTLE", 0.3)):
        monkeypatch.setattr(run_lock, name, seconds)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def fork(call: Callable[[], int]) -> int:
    """The pid of a child that ends with the status that `call` returns."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = call()
        finally:
            os._exit(status)
    return pid


def hold(folder: Path) -> int:
    """A child that holds the lock until it is killed."""

    def held() -> int:
        RunLock(folder)
        (folder / "held").touch()
        time.sleep(60)
        return 0

    pid = fork(held)
    end = time.monotonic() + 20
    while not (folder / "held").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def written(folder: Path, **changes: object) -> Owner:
    """Leave the lock of a process on another machine."""
    owner = replace(Owner.this_process(), machine="another", host="node7", pid=77, **changes)
    (folder / run_lock.NAME).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_second_training_is_refused_until_the_first_ends(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path)
    first.close()
    assert not list(tmp_path.iterdir())
    RunLock(tmp_path).close()


def test_a_killed_owners_lock_is_taken_over_at_once(tmp_path, caplog):
    pid = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {pid} on "):
        RunLock(tmp_path)
    end(pid)
    lock = RunLock(tmp_path)
    lines = [r.message for r in caplog.records if "taken over" in r.message]
    assert len(lines) == 1 and f"process {pid}" in lines[0]
    lock.close()


def test_a_pid_that_is_used_anew_is_not_the_owner(tmp_path):
    owner = replace(Owner.this_process(), started="1")
    (tmp_path / run_lock.NAME).write_text(json.dumps(asdict(owner)))
    RunLock(tmp_path).close()


def test_an_owner_on_another_host_is_alive_while_its_counter_moves(tmp_path):
    written(tmp_path)

    def beat() -> int:
        for _ in range(200):
            os.utime(tmp_path / run_lock.NAME)
            time.sleep(0.1)
        return 0

    pid = fork(beat)
    try:
        with pytest.raises(UserError, match="process 77 on node7"):
            RunLock(tmp_path)
    finally:
        end(pid)
    start = time.monotonic()
    RunLock(tmp_path).close()
    assert time.monotonic() - start > 1  # not before it had no heartbeat for so long


def test_a_requeued_job_takes_its_own_lock_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 60)
    written(tmp_path, job="here/12.0")
    for name, value in (("CLUSTER_NAME", "here"), ("JOB_ID", "12"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    start = time.monotonic()
    RunLock(tmp_path).close()
    assert time.monotonic() - start < 20
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)
    for job in ("here/120.0", "there/12.0", "here/12.1", ""):  # another job, another cluster, this very one, none
        owner = written(tmp_path, job=job)
        assert owner.alive() is None


def test_a_later_step_of_a_job_fences_the_rank_that_a_lost_node_left_alive(tmp_path, monkeypatch):
    """It neither writes beside it nor is refused: when the new one has the lock, the old one has ended."""
    for name, value in (("CLUSTER_NAME", "here"), ("JOB_ID", "12"), ("STEP_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    pid = hold(tmp_path)
    with pytest.raises(UserError, match="is being trained by"):
        RunLock(tmp_path)  # of the same step: a second training
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    with pytest.raises(UserError, match="is being trained by"):
        RunLock(tmp_path)  # an earlier one
    monkeypatch.setenv("SLURM_STEP_ID", "10")
    monkeypatch.setattr(run_lock, "INTERVAL", 20.0)  # of this process's patience; the child's heartbeat is in 0.1 s
    lock = RunLock(tmp_path)
    assert os.waitpid(pid, os.WNOHANG)[0] == pid  # ended by itself before this one went on
    lock.close()


def test_a_fenced_owner_that_cannot_be_looked_up_is_given_time_to_end(tmp_path, monkeypatch):
    written(tmp_path, job="here/12.0", step="3")
    for name, value in (("CLUSTER_NAME", "here"), ("JOB_ID", "12"), ("STEP_ID", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(run_lock, "INTERVAL", 1.0)
    monkeypatch.setattr(run_lock, "PATIENCE", 60)
    start = time.monotonic()
    RunLock(tmp_path).close()
    assert 1.5 <= time.monotonic() - start < 20


@pytest.mark.parametrize("links", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("found", ["nothing", "dead", "rubbish"])
def test_of_many_that_start_together_one_trains(tmp_path, monkeypatch, found, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    if found == "dead":
        end(hold(tmp_path))
    if found == "rubbish":
        (tmp_path / run_lock.NAME).write_text("{")

    def contend() -> int:
        try:
            RunLock(tmp_path)
        except UserError:
            return 2
        time.sleep(3)  # in which the others give up, and its heartbeat would find another's lock
        return 0

    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [fork(contend) for _ in range(6)]]
    assert statuses.count(0) == 1 and set(statuses) <= {0, 1, 2}


def test_a_process_that_was_taken_for_dead_ends(tmp_path):
    pid = hold(tmp_path)
    written(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert json.loads((tmp_path / run_lock.NAME).read_text())["host"] == "node7"


def test_two_trainings_in_one_folder(config_file, tmp_path):
    """The second is refused, with and without --resume, before there is any checkpoint; evaluation is not hindered."""
    run = tmp_path / "run"
    common = ["train", "--config", config_file, "--run_dir", run]
    ranks = start_ranks(1, *common, "--train.epochs", "50")
    wait_for_step(run, 1, ranks)
    line = refused(dit_ds(*common, "--resume", check=None))
    assert f"{run} is being trained by process" in line
    assert "holds a run already" in refused(dit_ds(*common, check=None))
    steps = len(metrics_of(run))
    ranks[0].send_signal(signal.SIGTERM)
    error = ranks[0].communicate(timeout=120)[1]
    assert ranks[0].returncode == 75 and len(metrics_of(run)) >= steps, error
    assert not (run / run_lock.NAME).exists()
    assert "resumed from" in dit_ds(*common, "--resume", "--train.max_steps", "1", check=0).stderr
