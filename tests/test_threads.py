"""PyTorch's threads: a rank's share of the cores, unless the user says another number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from dit_ds import distributed, processes
from dit_ds.distributed import share_cores
from dit_ds.processes import cores_of_rank, usable_cores

LAUNCHERS = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_CPUS_ON_NODE",
             "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")  # fmt: skip


@pytest.fixture
def clean(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


SRUN = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "16"}
# the launcher's variables, cores by the mask, ranks on the node -> cores of a rank
SHARES = [
    ({}, 8, 1, 8),
    ({}, 8, 3, 2),
    ({}, 2, 4, 1),
    (SRUN, 4, 4, 4),  # bound: each task to its own cores
    (SRUN, 16, 4, 4),  # bound to none, or to the job's cores together
    (SRUN, 64, 4, 4),  # not even those
    (SRUN | {"TORCHELASTIC_RUN_ID": "1"}, 8, 4, 2),  # torchrun's ranks share the mask of srun's one task
    ({"TORCHELASTIC_RUN_ID": "1"}, 8, 4, 2),
]


@pytest.mark.parametrize("env, cores, ranks, share", SHARES)
def test_the_cores_of_a_rank(clean, env, cores, ranks, share):
    for name, value in env.items():
        clean.setenv(name, value)
    assert cores_of_rank(cores, ranks) == share


@pytest.mark.parametrize("workers, threads", [(0, 2), (4, 1)])
def test_a_share_leaves_a_core_to_the_loader(clean, workers, threads):
    clean.setattr(distributed, "usable_cores", lambda: 4)
    clean.setenv("LOCAL_WORLD_SIZE", "2")
    set_to = []
    clean.setattr(torch, "get_num_threads", lambda: 64)
    clean.setattr(torch, "set_num_threads", set_to.append)
    assert share_cores(2, workers).startswith(f"{threads} a rank of 4 cores and 2 ranks") and set_to == [threads]


def test_the_users_number_is_left(clean):
    clean.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    assert "as OMP_NUM_THREADS says" in share_cores(1, 4) and torch.get_num_threads() == before


def test_a_quota_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "root/pod/box").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:cpu:/\n0::/pod/box\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    read = lambda: processes._cores_by_quota(tmp_path / "root", tmp_path / "cgroup")  # noqa: E731
    assert read() == 64
    (tmp_path / "root/pod/cpu.max").write_text("250000 100000\n")
    assert read() == 3
    (tmp_path / "root/pod/box/cpu.max").write_text("max 100000\n")
    assert read() == 3
    (tmp_path / "cgroup").write_text("0::/../../elsewhere\n")
    assert read() == 64
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "1"])
def test_a_run_says_its_threads_once(config_file, tmp_path, given):
    env = {k: v for k, v in environment().items() if k not in LAUNCHERS} | ({"OMP_NUM_THREADS": given} if given else {})
    command = [sys.executable, "-m", "dit_ds.cli", "train", "--config", str(config_file), "--train.max_steps", "1",
               "--eval.every_epochs", "0"]  # fmt: skip
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, timeout=240)
    lines = [x for x in (tmp_path / "run/log.txt").read_text().splitlines() if "PyTorch's threads" in x]
    assert len(lines) == 1 and (f"of {usable_cores()} cores and 1 ranks" in lines[0]) == (given is None)
