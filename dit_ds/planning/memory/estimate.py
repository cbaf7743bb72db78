"""Profiles of training steps on simulated clusters, each in its own process, several at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dit_ds.errors import RunFailed
from dit_ds.files import usable_cores
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest


def worker_pool(processes: int, *modules: str, initializer: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool whose processes each take one job, forked from a server that has imported `worker` and more modules.

    The imports take longer than many a prediction.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dit_ds.planning.memory.worker", *modules])
    return ProcessPoolExecutor(processes, context, initializer=initializer, max_tasks_per_child=1)


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
