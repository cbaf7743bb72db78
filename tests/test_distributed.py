"""Rank, world size and rendezvous from torchrun's and SLURM's variables; the schedule as a pure function."""

from __future__ import annotations

import os

import pytest

from dit_ds.config.schema import TrainConfig
from dit_ds.distributed import set_environment
from dit_ds.errors import UserError
from dit_ds.training.schedule import learning_rate

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def clean(monkeypatch):
    for name in [*NAMES, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_is_a_world_of_one(clean):
    assert set_environment() == (0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0


def test_torchruns_variables_win(clean):
    given = dict(zip(NAMES, ("3", "8", "1", "node7", "1234")))
    for name, value in (given | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}).items():
        clean.setenv(name, value)
    assert set_environment() == (3, 8, 1)
    assert {n: os.environ[n] for n in NAMES} == given


def test_slurms_variables_are_understood(clean, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    scontrol.chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"PROCID": "9", "NTASKS": "16", "LOCALID": "1", "JOB_NODELIST": "node[07-08]", "JOB_ID": "123456"}
    for name, value in slurm.items():
        clean.setenv(f"SLURM_{name}", value)
    assert set_environment() == (9, 16, 1)
    assert os.environ["MASTER_ADDR"] == "node07"
    assert os.environ["MASTER_PORT"] == str(10000 + 123456 % 20000)


def test_a_given_master_needs_no_scontrol(clean, tmp_path):
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "node[07-08]"}
    for name, value in (slurm | {"MASTER_ADDR": "node07", "PATH": str(tmp_path)}).items():
        clean.setenv(name, value)
    assert set_environment() == (1, 2, 1) and os.environ["MASTER_ADDR"] == "node07"


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_ADDR": "node1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("shell", [
    {},  # salloc's
    {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script's
    STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's with use_interactive_step
])  # fmt: skip
def test_a_shell_of_a_job_is_not_its_tasks(clean, tmp_path, refusal, shell):
    for name, value in (JOB | shell).items():
        clean.setenv(name, value)
    (tmp_path / "c.yaml").write_text("data: {root: nowhere}")
    for command in (["train", "--config", tmp_path / "c.yaml"], ["eval", tmp_path / "run"]):
        assert "SLURM_NTASKS is 4, but this is one process outside of srun" in refusal(*command)
    assert not {"RANK", "WORLD_SIZE"} & os.environ.keys()
    clean.setenv("RANK", "0")
    clean.setenv("WORLD_SIZE", "1")
    assert set_environment() == (0, 1, 0)  # as the message says


@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "4"}])
def test_the_first_task_of_a_step_is_rank_0(clean, tasks):
    for name, value in (JOB | STEP | tasks).items():
        clean.setenv(name, value)
    assert set_environment() == (0, 4, 0)


def test_a_job_of_one_task_needs_no_srun(clean):
    clean.setenv("SLURM_JOB_ID", "7")
    clean.setenv("SLURM_NTASKS", "1")
    assert set_environment() == (0, 1, 0)


def test_half_an_environment_is_refused(clean):
    clean.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_PORT"):
        set_environment()


def test_the_papers_schedule():
    t = TrainConfig()
    rates = [learning_rate(step, 10, t) for step in range(400)]
    assert rates[0] == pytest.approx(1e-4 / 30) and rates[29] == pytest.approx(1e-4)  # three epochs of warm-up
    assert rates[299] == pytest.approx(1e-4) and rates[300] == pytest.approx(2e-5)  # times 0.2 at epoch 30
    assert rates[349] == pytest.approx(2e-5) and rates[350] == pytest.approx(4e-6)  # and at 35


def test_the_cosine_schedule_ends_at_zero():
    t = TrainConfig(schedule="cosine", epochs=4, warmup_epochs=1)
    rates = [learning_rate(step, 10, t) for step in range(40)]
    assert max(rates) == pytest.approx(1e-4) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 2e-6 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_a_second_ctrl_c_ends_at_once_and_what_comes_with_the_first_does_not(monkeypatch):
    import os
    import signal
    import time

    from dit_ds.training import signals

    with signals.StopSignal() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal == "SIGTERM"
        monkeypatch.setattr(signals, "_ONE_STOP", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, later: the run is already stopping
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
