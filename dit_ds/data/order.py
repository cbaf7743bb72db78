"""Which samples a batch holds: a pure function of (seed, epoch, manifest).

Global batch k of epoch e holds the same samples for any world size, any number of workers and any point of resumption.
Every sample is seen exactly once an epoch: where the last batch is short it is filled up with samples of weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64: the order of the n samples in this epoch. Sorts raw Philox words, whose stream numpy keeps fixed."""
    words = np.random.Philox(key=[np.uint64(seed), np.uint64(epoch)]).random_raw(n)
    return np.argsort(words, kind="stable")


class TrainBatches:
    """Batch sampler: this rank's share of each global batch of one epoch, one micro-batch after the other.

    Args:
        n: samples in the dataset.
        batch_size: the global batch.
        micro_batch: samples a rank takes at once; `batch_size` is a multiple of `micro_batch * world_size`.
    """

    def __init__(self, n: int, batch_size: int, micro_batch: int, rank: int, world_size: int, seed: int):
        self.n, self.batch_size, self.micro_batch = n, batch_size, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_batch = 0, 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, that is optimizer steps, in an epoch."""
        return math.ceil(self.n / self.batch_size)

    def start_at(self, epoch: int, batch: int) -> None:
        """The next iteration yields `epoch` from global batch `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def global_batch(self, order: np.ndarray, k: int) -> list[tuple[int, int, float]]:
        """(epoch, sample, weight) of global batch `k`; weights make its mean loss the mean over real samples."""
        real = order[k * self.batch_size : (k + 1) * self.batch_size]
        weight = self.batch_size / len(real)
        filler = [(self.epoch, int(real[0]), 0.0)] * (self.batch_size - len(real))
        return [(self.epoch, int(s), weight) for s in real] + filler

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        order = epoch_order(self.seed, self.epoch, self.n)
        for k in range(self.first_batch, self.batches_per_epoch):
            batch = self.global_batch(order, k)
            for start in range(self.rank * self.micro_batch, self.batch_size, self.world_size * self.micro_batch):
                yield batch[start : start + self.micro_batch]

    def __len__(self) -> int:
        micro_steps = self.batch_size // (self.micro_batch * self.world_size)
        return (self.batches_per_epoch - self.first_batch) * micro_steps


class EvalBatches:
    """Batch sampler: batch j goes to rank j mod world size, so a batch's make-up is the same on any number of ranks.

    All ranks get equally many (ZeRO-3 gathers weights in lockstep): the missing ones repeat the last with weight 0.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int):
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        total = math.ceil(self.n / self.batch_size)
        for j in range(self.rank, len(self) * self.world_size, self.world_size):
            start = min(j, total - 1) * self.batch_size
            weight = 1.0 if j < total else 0.0
            yield [(0, s, weight) for s in range(start, min(start + self.batch_size, self.n))]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.n / self.batch_size) / self.world_size)
