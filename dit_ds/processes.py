"""The cores of this process, and the end of processes that it starts."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def usable_cores() -> int:
    """Number of cores that this process may run on; on a cluster, often fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that started it ends, even by SIGKILL.

    To be called in the new process, which a parent that ended just before leaves at once.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
