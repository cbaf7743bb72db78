"""Profiles of training steps on simulated clusters, each in its own process, several at once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dit_ds.errors import RunFailed
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest
from dit_ds.processes import usable_cores


def worker_pool(processes: int, *modules: str, initializer: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool whose processes each take one job, forked from a server that has imported `worker` and more modules.

    The imports take longer than many a prediction.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dit_ds.planning.memory.worker", *modules])
    start = functools.partial(_start, initializer)
    return ProcessPoolExecutor(processes, context, initializer=start, max_tasks_per_child=1)


def _end_with_command() -> None:
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _start(initializer: Callable[[], None] | None) -> None:
    # the parent is the server, which stays for as long as this process does: the command's own end is watched
    threading.Thread(target=_end_with_command, daemon=True).start()
    if initializer is not None:
        initializer()


def predict(requests: Iterable[MemoryRequest], processes: int | None = None) -> Iterator[MemoryEstimate]:
    """The estimates of the requests, in their order.

    Args:
        processes: at once; by default one a core.
    Raises:
        UserError: a run that can't be built.
        RunFailed: a process died.
    """
    requests = list(requests)
    with worker_pool(min(len(requests), processes or usable_cores())) as pool:
        try:
            yield from pool.map(_estimate, requests)
        except BrokenProcessPool:
            raise RunFailed(
                "a prediction's process was killed: if the host was out of memory, ask on another"
            ) from None


def _estimate(request: MemoryRequest) -> MemoryEstimate:
    from dit_ds.planning.memory.worker import estimate

    return estimate(request)
