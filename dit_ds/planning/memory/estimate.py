"""Profiles of training steps on clusters that are not there: each in a process of its own, several at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dit_ds.errors import RunFailed
from dit_ds.files import usable_cores
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest


def predict(questions: Iterable[MemoryRequest], processes: int | None = None) -> Iterator[MemoryEstimate]:
    """Answer each in order.

    Args:
        processes: at once; by default one a core.
    Raises:
        UserError: a run that can't be built.
        RunFailed: a process died.
    """
    questions = list(questions)
    processes = min(len(questions), processes or usable_cores())
    # a server that has imported everything is forked for each question: the imports take longer than many an answer
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dit_ds.planning.memory.worker"])
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        try:
            yield from pool.map(_answer, questions)
        except BrokenProcessPool:
            raise RunFailed(
                "a prediction's process was killed: if the host was out of memory, ask on another"
            ) from None


def _answer(question: MemoryRequest) -> MemoryEstimate:
    from dit_ds.planning.memory.worker import answer

    return answer(question)
