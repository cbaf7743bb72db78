"""The cores of this process, and the end of processes that it starts."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def usable_cores() -> int:
    """Number of cores that this process may use: on a cluster or in a container, often fewer than the node has."""
    return max(1, min(_cores_by_mask(), _cores_by_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))))


def _cores_by_mask() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_by_quota(root: Path, groups: Path) -> int:
    """Cores' worth of time that this process's control group (docker --cpus) and those above it grant, rounded up.

    Args:
        root: where control groups are mounted.
        groups: the file that says which this process is in.
    """
    try:
        group = re.search(r"^0::(.*)$", groups.read_text(), re.M)
    except OSError:
        group = None
    folder, least = root / (group[1].strip("/") if group else ""), os.cpu_count() or 1
    for level in (folder, *(p for p in folder.parents if p.is_relative_to(root))):
        try:
            quota, period = (level / "cpu.max").read_text().split()
            least = min(least, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):  # none, or "max"
            continue
    return least


def cores_of_rank(cores: int, local_ranks: int) -> int:
    """A rank's share of the cores: what its process may use, where srun bound each task to its own.

    Args:
        cores: that this process may use.
        local_ranks: processes on this node that share them.
    """
    env = os.environ
    of_job = env.get("SLURM_CPUS_ON_NODE", "")
    if "SLURM_STEP_ID" in env and of_job.isdigit():
        if cores < int(of_job) and "TORCHELASTIC_RUN_ID" not in env:
            return cores
        cores = min(cores, int(of_job))  # a site may bind nothing
    return max(1, cores // local_ranks)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that started it ends, even by SIGKILL.

    To be called in the new process, which a parent that ended just before leaves at once.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
