"""Profiles of training steps on clusters that are not there: each in a process of its own, several at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from dit_ds.config.load import RunConfig, merge, validate
from dit_ds.errors import RunFailed

GIB = 2**30


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        config: the run; `model.attention` auto means what a GPU gets.
        ranks: GPUs, one a rank.
        micro_batches: those to profile; where there are none, the run's own.
        capacity: bytes; if given, the largest micro-batch whose peak is at most this is looked for.
        flops: count those of a sample's step, too.
    """

    config: RunConfig
    ranks: int = 1
    micro_batches: tuple[int, ...] = ()
    capacity: int | None = None
    flops: bool = False


@dataclass(frozen=True)
class Answer:
    """Profiles by micro-batch; `largest` is 0 where not even one sample fits; None is what was not asked for.

    `flops` are those really computed in a sample's step, by this run's kernels and with what it computes again.
    """

    profiles: dict[int, Any]
    parameters: int
    trained: int
    largest: int | None = None
    flops: int | None = None

    def peak(self, micro_batch: int) -> float:
        """Bytes at most at once; between and beyond the profiled micro-batches along a line."""
        known = sorted((b, p.peak) for b, p in self.profiles.items())
        if len(known) == 1 or micro_batch in self.profiles:
            return float(dict(known).get(micro_batch, known[0][1]))
        below = [k for k in known if k[0] <= micro_batch][-1:] or known[:1]
        above = [k for k in known if k[0] > below[0][0]][:1]
        (b0, p0), (b1, p1) = (below + above) if above else known[-2:]
        return p0 + (p1 - p0) * (micro_batch - b0) / (b1 - b0)


def predict(questions: Iterable[Question], processes: int | None = None) -> Iterator[Answer]:
    """Answer each in order.

    Args:
        processes: at once; by default one a core.
    Raises:
        UserError: a run that can't be built.
        RunFailed: a process died.
    """
    questions = list(questions)
    processes = min(len(questions), processes or len(os.sched_getaffinity(0)))
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


def _answer(question: Question) -> Answer:
    from dit_ds.planning.memory.worker import answer

    return answer(question)


def on_gpu(config: RunConfig) -> RunConfig:
    """The configuration as it would be on a GPU; xformers' cutlass kernel stands in as torch has it."""
    changes: dict[str, Any] = {"text": {"cache": 0}}
    if config.model.name == "dit_sam" and config.model.attention in ("auto", "xformers", "sdpa"):
        changes["model"] = {"attention": "sdpa_efficient"}
    return validate(merge(config.model_dump(), changes))
