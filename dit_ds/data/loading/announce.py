"""Batches that are announced to the loader worker that loads them, so that it can prepare several at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from dit_ds.data.loading.sampler import Item

_SAMPLES = 64  # that are prepared at once: a small share of the work then remains that is done once each time


class AnnouncedBatch(list[Item]):
    """A batch's items.

    Attributes:
        coming: the batches that its worker loads next; empty where they were announced before.
    """

    coming: Sequence[Sequence[Item]] = ()


class _Batches(Protocol):
    def __iter__(self) -> Iterator[Sequence[Item]]: ...

    def __len__(self) -> int: ...


class AnnouncingSampler:
    """A batch sampler whose batches announce those that come after them, until these have some `_SAMPLES` together.

    PyTorch deals batches to workers in turn. Were it otherwise, a worker would prepare a batch of others, and the batches
    would be the same.

    Args:
        batches: each iteration is announced anew.
        workers: loader processes.
    """

    def __init__(self, batches: _Batches, workers: int):
        self._batches, self._workers = batches, max(1, workers)

    def __iter__(self) -> Iterator[AnnouncedBatch]:
        batches = iter(self._batches)
        for first in batches:
            count = self._workers * max(1, _SAMPLES // len(first))
            together = [first, *itertools.islice(batches, count - 1)]
            for i, items in enumerate(together):
                announced = AnnouncedBatch(items)
                if i < self._workers:
                    announced.coming = together[i + self._workers :: self._workers]
                yield announced

    def __len__(self) -> int:
        return len(self._batches)
