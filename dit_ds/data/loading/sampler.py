"""Batch samplers: the samples of each batch are a pure function of (seed, epoch, manifest).

Global batch k of epoch e holds the same samples for any world size, any number of workers and any point of resumption.
An epoch has every sample exactly once (in a mixture, as often as its weight says); a batch that isn't full is padded
with samples of weight 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_ds.errors import UserError

Item = tuple[
    int, int, float
]  # repetition (the epoch that the sample's draws are seeded with), sample, weight in the loss
_SHARDS, _BATCHES, _DATASET = 1, 2, 3  # random streams beside stream 0, an epoch's order; _DATASET + i for dataset i


def _random_words(seed: int, epoch: int, n: int, stream: int = 0) -> np.ndarray:
    """(n,) uint64."""
    # numpy guarantees that a bit generator's raw output never changes
    return np.random.Philox(key=[np.uint64(seed), np.uint64(epoch)], counter=[0, 0, 0, stream]).random_raw(n)


def epoch_order(seed: int, epoch: int, n: int, stream: int = 0) -> np.ndarray:
    """(n,) int64: a permutation of n samples for this epoch.

    Args:
        stream: independent permutations of one (seed, epoch).
    """
    return np.argsort(_random_words(seed, epoch, n, stream), kind="stable")


@dataclass(frozen=True)
class Samples:
    """The samples of an epoch.

    Attributes:
        datasets: (samples, weight) of each dataset; an epoch takes weight x samples of it, continuing where the previous
            epoch ended.
        images: (n,) int64, the image of each sample; if given, all samples of an image are in one global batch.
        shards: (n,) int64, the shard of each sample; if given, row i of every batch reads the shuffled shards
            sequentially from its own starting point, and samples are shuffled within each shard.
        manifest_sha: the order depends on it and on the seed; a resumed run must have the same.
    """

    datasets: list[tuple[int, float]]
    images: np.ndarray | None = None
    shards: np.ndarray | None = None
    manifest_sha: str = ""

    def of_epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch, not yet shuffled; equally many in every epoch.

        Returns:
            Two (m,) int64: samples, and for each its repetition: how often it was taken before.
        Raises:
            UserError: there are none.
        """
        repetitions, samples = [], []
        starts = np.cumsum([0] + [n for n, _ in self.datasets])
        for i, (n, weight) in enumerate(self.datasets):
            if not (take := round(weight * n)):
                continue
            first, last = epoch * take, (epoch + 1) * take
            for repetition in range(first // n, -(-last // n)):
                a, b = max(first - repetition * n, 0), min(last - repetition * n, n)
                complete = (a, b) == (0, n)
                chosen = np.arange(n) if complete else np.sort(epoch_order(seed, repetition, n, _DATASET + i)[a:b])
                samples.append(starts[i] + chosen)
                repetitions.append(np.full(len(chosen), repetition))
        if not samples:
            raise UserError("nothing is left to train on: raise the weights of data.mixture")
        return np.concatenate(samples), np.concatenate(repetitions)


class TrainBatchSampler:
    """Batch sampler of one epoch: yields this rank's micro-batches of each global batch.

    Args:
        samples: of an epoch; a number stands for one dataset of that size.
        batch_size: of the global batch.
        micro_batch: samples of a rank's micro-batch; `batch_size` is a multiple of `micro_batch * world_size`.
    Raises:
        UserError: an image has more refs than a batch has samples; an epoch has no samples.
    """

    def __init__(
        self, samples: Samples | int, batch_size: int, micro_batch: int, rank: int, world_size: int, seed: int
    ):
        self.samples = Samples([(samples, 1.0)]) if isinstance(samples, int) else samples
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_batch = 0, 0
        bounds = self._order(0)[2]
        self.batches_per_epoch = len(bounds) - 1  # global batches, that is optimizer steps

    def start_at(self, epoch: int, batch: int) -> None:
        """Make the next iteration yield `epoch` from global batch `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """The state to resume from before global batch `batch` of `epoch`, on any number of ranks and workers."""
        seen = int(self._order(epoch)[2][batch])
        sha = self.samples.manifest_sha
        return {"epoch": epoch, "samples_seen": seen, "seed": self.seed, "manifest_sha": sha}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a `state`.

        Raises:
            UserError: it is of another manifest, seed or batch size.
        """
        for key, value in (("manifest_sha", self.samples.manifest_sha), ("seed", self.seed)):
            if state[key] != value:
                raise UserError(f"the loader's state has {key} {state[key]}, here it is {value}: resume with the same")
        bounds = self._order(state["epoch"])[2]
        batch = int(np.searchsorted(bounds, state["samples_seen"]))
        if bounds[batch] != state["samples_seen"]:
            raise UserError(f"no batch begins after {state['samples_seen']} samples: resume with the same batch size")
        self.start_at(state["epoch"], batch)

    def global_batch(self, order: tuple[np.ndarray, ...], k: int) -> list[Item]:
        """Global batch `k`; its mean weighted loss is the mean over its real samples.

        Args:
            order: as returned by `_order`.
        """
        samples, repetitions, bounds = order
        real = slice(bounds[k], bounds[k + 1])
        weight = self.batch_size / (bounds[k + 1] - bounds[k])
        items = [(r, s, weight) for r, s in zip(repetitions[real].tolist(), samples[real].tolist())]
        padding = [(items[0][0], items[0][1], 0.0)] * (self.batch_size - len(items))
        if self.samples.images is None:
            return items + padding
        return _pack_micro_batches(items, self.samples.images[samples[real]], self.micro_batch) + padding

    def __iter__(self) -> Iterator[list[Item]]:
        order = self._order(self.epoch)
        for k in range(self.first_batch, self.batches_per_epoch):
            batch = self.global_batch(order, k)
            for start in range(self.rank * self.micro_batch, self.batch_size, self.world_size * self.micro_batch):
                yield batch[start : start + self.micro_batch]

    def __len__(self) -> int:
        micro_steps = self.batch_size // (self.micro_batch * self.world_size)
        return (self.batches_per_epoch - self.first_batch) * micro_steps

    def worker_slices(self, worker: int, workers: int) -> list[list[Item]]:
        """A worker's slice of each micro-batch: always the same rows, so that in order `shards` it reads few shards."""
        return [micro_batch[worker::workers] for micro_batch in self]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch in order: (m,) samples, (m,) their repetitions, and (batches + 1,) bounds of the global batches."""
        samples, repetitions = self.samples.of_epoch(self.seed, epoch)
        bounds = np.append(np.arange(0, len(samples), self.batch_size), len(samples))
        if self.samples.shards is not None:
            order = self._shard_order(epoch, self.samples.shards[samples], repetitions)
        else:
            order = epoch_order(self.seed, epoch, len(samples))
            if self.samples.images is not None:
                order, bounds = self._image_order(epoch, order, self.samples.images[samples], repetitions)
        return samples[order], repetitions[order], bounds

    def _shard_order(self, epoch: int, shards: np.ndarray, repetitions: np.ndarray) -> np.ndarray:
        """(m,) int64: an order in which row i of every batch reads shards sequentially.

        The shards are shuffled, and the samples within each. The resulting sequence is cut into as many equal lanes as a
        batch has rows; a batch takes the next sample of each lane.
        """
        n = len(shards)
        _, block = np.unique(np.stack([repetitions, shards]), axis=1, return_inverse=True)
        rank = np.argsort(epoch_order(self.seed, epoch, block.max() + 1, _SHARDS))  # of each block in the sequence
        shuffled = epoch_order(self.seed, epoch, n)
        sequence = shuffled[np.argsort(rank[block[shuffled]], kind="stable")]
        lanes = min(self.batch_size, n)
        lengths = np.full(lanes, n // lanes) + (np.arange(lanes) < n % lanes)
        starts, i = np.cumsum(lengths) - lengths, np.arange(n)
        return sequence[starts[i % lanes] + i // lanes]

    def _image_order(
        self, epoch: int, order: np.ndarray, images: np.ndarray, repetitions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """An order in which all samples of an image are in one global batch, and the batches' bounds.

        Images are assigned, the largest first, to the batch with the fewest samples. The batches' sizes depend on the
        images' sizes alone, so every epoch has equally many batches.

        Raises:
            UserError: an image has more samples than a batch.
        """
        _, group, sizes = np.unique(np.stack([repetitions, images]), axis=1, return_inverse=True, return_counts=True)
        if sizes.max() > self.batch_size:
            raise UserError(
                f"an image has {sizes.max()} refs, train.batch_size is {self.batch_size}: raise it, or set data.unit ref"
            )
        group = group[order]
        members = np.split(order[np.argsort(group, kind="stable")], np.cumsum(sizes)[:-1])
        drawn = epoch_order(self.seed, epoch, len(sizes), _SHARDS)
        drawn = drawn[np.argsort(-sizes[drawn], kind="stable")]
        count = math.ceil(len(order) / self.batch_size)
        while (assigned := _balance(sizes[drawn], count, self.batch_size)) is None:
            count += 1
        shuffled = epoch_order(self.seed, epoch, count, _BATCHES)
        batches = [[members[drawn[i]] for i in assigned[b]] for b in shuffled]
        bounds = np.cumsum([0, *(sum(len(m) for m in b) for b in batches)])
        return np.concatenate([m for b in batches for m in b]), bounds


def _balance(sizes: np.ndarray, bins: int, capacity: int) -> list[list[int]] | None:
    """Indices of the sizes by bin, each assigned to the least loaded bin; None if that exceeds the capacity."""
    heap = [(0, b) for b in range(bins)]
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i, size in enumerate(sizes.tolist()):
        load, b = heapq.heappop(heap)
        if load + size > capacity:
            return None
        filled[b].append(i)
        heapq.heappush(heap, (load + size, b))
    return filled


def _pack_micro_batches(items: list[Item], images: np.ndarray, capacity: int) -> list[Item]:
    """A batch's items in an order in which, where possible, an image's are in one micro-batch, to decode it once."""
    groups: dict[tuple[int, int], list[Item]] = {}
    for item, image in zip(items, images.tolist()):
        groups.setdefault((item[0], image), []).append(item)
    waiting = sorted(groups.values(), key=len, reverse=True)  # stable
    out: list[Item] = []
    while waiting:
        room = capacity - len(out) % capacity
        fitting = next((g for g in waiting if len(g) <= room), waiting[0])
        waiting.remove(fitting)
        out += fitting
    return out


class EvalBatchSampler:
    """Batch sampler of an evaluation: each rank takes a range of the batches, which are the same for any world size.

    All ranks get equally many (under ZeRO-3 each forward is collective): missing ones repeat the last with weight 0.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int):
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[Item]]:
        total = math.ceil(self.n / self.batch_size)
        for j in range(self.rank * len(self), (self.rank + 1) * len(self)):
            start = min(j, total - 1) * self.batch_size
            weight = 1.0 if j < total else 0.0
            yield [(0, s, weight) for s in range(start, min(start + self.batch_size, self.n))]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.n / self.batch_size) / self.world_size)

    def worker_slices(self, worker: int, workers: int) -> list[list[Item]]:
        """A worker's range of the batches: consecutive ones, which are in the same shards."""
        batches = list(self)
        return batches[worker * len(batches) // workers : (worker + 1) * len(batches) // workers]
