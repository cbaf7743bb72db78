"""Which samples a batch holds: a pure function of (seed, epoch, manifest).

Global batch k of epoch e holds the same samples for any world size, any number of workers and any point of resumption.
Every sample is seen exactly once an epoch (in a mixture, as often as its weight says): where a batch is short it is
filled up with samples of weight 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_ds.errors import UserError

Item = tuple[int, int, float]  # which time the sample is seen (its draws' epoch), the sample, its weight in the loss
_SHARDS, _BATCHES, _PART = 1, 2, 3  # streams of random words beside the one of an epoch's order


def _words(seed: int, epoch: int, n: int, stream: int = 0) -> np.ndarray:
    # numpy keeps Philox's raw words fixed for ever
    return np.random.Philox(key=[np.uint64(seed), np.uint64(epoch)], counter=[0, 0, 0, stream]).random_raw(n)


def epoch_order(seed: int, epoch: int, n: int, stream: int = 0) -> np.ndarray:
    """(n,) int64: the order of the n samples in this epoch."""
    return np.argsort(_words(seed, epoch, n, stream), kind="stable")


@dataclass(frozen=True)
class Samples:
    """What an epoch runs over.

    Attributes:
        parts: (samples, weight) of each set; an epoch sees weight x samples of them, going on where the last one ended.
        images: (n,) the image of each sample; given, all samples of an image go in one global batch.
        shards: (n,) the shard of each sample; given, a batch's samples come from as many places in the shuffled shards,
            which are read one after the other, and are shuffled within each.
        manifest_sha: what the order depends on beside the seed.
    """

    parts: list[tuple[int, float]]
    images: np.ndarray | None = None
    shards: np.ndarray | None = None
    manifest_sha: str = ""

    def seen(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Two (m,) int64: the samples of an epoch, and which time each is seen. m is the same in every epoch."""
        times, samples = [], []
        starts = np.cumsum([0] + [n for n, _ in self.parts])
        for part, (n, weight) in enumerate(self.parts):
            if not (take := round(weight * n)):
                continue
            first, last = epoch * take, (epoch + 1) * take
            for time in range(first // n, -(-last // n)):
                a, b = max(first - time * n, 0), min(last - time * n, n)
                whole = (a, b) == (0, n)
                chosen = np.arange(n) if whole else np.sort(epoch_order(seed, time, n, _PART + part)[a:b])
                samples.append(starts[part] + chosen)
                times.append(np.full(len(chosen), time))
        if not samples:
            raise UserError("nothing is left to train on: raise the weights of data.mixture")
        return np.concatenate(samples), np.concatenate(times)


class TrainBatchSampler:
    """Batch sampler: this rank's share of each global batch of one epoch, one micro-batch after the other.

    Args:
        samples: what an epoch runs over; a number is one set of so many.
        batch_size: the global batch.
        micro_batch: samples a rank takes at once; `batch_size` is a multiple of `micro_batch * world_size`.
    Raises:
        UserError: an image has more refs than go in a batch; nothing is left in an epoch.
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
        """The next iteration yields `epoch` from global batch `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """All that it takes to go on with global batch `batch` of `epoch`, on any number of ranks and workers."""
        seen = int(self._order(epoch)[2][batch])
        sha = self.samples.manifest_sha
        return {"epoch": epoch, "samples_seen": seen, "seed": self.seed, "manifest_sha": sha}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            UserError: it is of another manifest, seed or batch size.
        """
        for key, mine in (("manifest_sha", self.samples.manifest_sha), ("seed", self.seed)):
            if state[key] != mine:
                raise UserError(f"the loader's state has {key} {state[key]}, here it is {mine}: resume with the same")
        bounds = self._order(state["epoch"])[2]
        batch = int(np.searchsorted(bounds, state["samples_seen"]))
        if bounds[batch] != state["samples_seen"]:
            raise UserError(f"no batch begins after {state['samples_seen']} samples: resume with the same batch size")
        self.start_at(state["epoch"], batch)

    def global_batch(self, order: tuple[np.ndarray, ...], k: int) -> list[Item]:
        """Global batch `k`; weights make its mean loss the mean over its real samples."""
        samples, times, bounds = order
        real = slice(bounds[k], bounds[k + 1])
        weight = self.batch_size / (bounds[k + 1] - bounds[k])
        items = [(t, s, weight) for t, s in zip(times[real].tolist(), samples[real].tolist())]
        filler = [(items[0][0], items[0][1], 0.0)] * (self.batch_size - len(items))
        if self.samples.images is None:
            return items + filler
        return _in_bins(items, self.samples.images[samples[real]], self.micro_batch) + filler

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
        """What of each micro-batch one of several readers of a stream takes: always the same places, so that in order
        `shards` it always reads the same few shards."""
        return [micro_batch[worker::workers] for micro_batch in self]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(m,) samples, (m,) which time each is seen, and where the batches begin, (batches + 1,)."""
        samples, times = self.samples.seen(self.seed, epoch)
        bounds = np.append(np.arange(0, len(samples), self.batch_size), len(samples))
        if self.samples.shards is not None:
            order = self._along_shards(epoch, self.samples.shards[samples], times)
        else:
            order = epoch_order(self.seed, epoch, len(samples))
            if self.samples.images is not None:
                order, bounds = self._by_image(epoch, order, self.samples.images[samples], times)
        return samples[order], times[order], bounds

    def _along_shards(self, epoch: int, shards: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The shuffled shards, their samples shuffled within each, in one row that is cut into as many equal lanes as a
        batch has places. A batch takes the next of each lane: each of its places reads one shard after the other."""
        n = len(shards)
        _, block = np.unique(np.stack([times, shards]), axis=1, return_inverse=True)
        place = np.argsort(epoch_order(self.seed, epoch, block.max() + 1, _SHARDS))  # of each block in the row
        shuffled = epoch_order(self.seed, epoch, n)
        row = shuffled[np.argsort(place[block[shuffled]], kind="stable")]
        lanes = min(self.batch_size, n)
        lengths = np.full(lanes, n // lanes) + (np.arange(lanes) < n % lanes)
        starts, at = np.cumsum(lengths) - lengths, np.arange(n)
        return row[starts[at % lanes] + at // lanes]

    def _by_image(
        self, epoch: int, order: np.ndarray, images: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images go, the largest first, each to the batch that holds least; how full batches get depends on the images'
        sizes alone, so there are equally many in every epoch."""
        _, group, sizes = np.unique(np.stack([times, images]), axis=1, return_inverse=True, return_counts=True)
        if sizes.max() > self.batch_size:
            raise UserError(
                f"an image has {sizes.max()} refs, train.batch_size is {self.batch_size}: raise it, or set data.unit ref"
            )
        group = group[order]
        members = np.split(order[np.argsort(group, kind="stable")], np.cumsum(sizes)[:-1])
        drawn = epoch_order(self.seed, epoch, len(sizes), _SHARDS)
        drawn = drawn[np.argsort(-sizes[drawn], kind="stable")]
        count = math.ceil(len(order) / self.batch_size)
        while (batches := _spread(sizes[drawn], count, self.batch_size)) is None:
            count += 1
        shuffled = epoch_order(self.seed, epoch, count, _BATCHES)
        batches = [[members[drawn[i]] for i in batches[b]] for b in shuffled]
        bounds = np.cumsum([0] + [sum(map(len, b)) for b in batches])
        return np.concatenate([m for b in batches for m in b]), bounds


def _spread(sizes: np.ndarray, bins: int, capacity: int) -> list[list[int]] | None:
    """Which of the sizes, given the largest first, go in which bin; None if one gets too full."""
    heap, filled = [(0, b) for b in range(bins)], [[] for _ in range(bins)]
    for i, size in enumerate(sizes.tolist()):
        load, b = heapq.heappop(heap)
        if load + size > capacity:
            return None
        filled[b].append(i)
        heapq.heappush(heap, (load + size, b))
    return filled


def _in_bins(items: list[Item], images: np.ndarray, capacity: int) -> list[Item]:
    """A batch's items, those of one image in one micro-batch wherever that goes, so that it is decoded once."""
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
    """Batch sampler: each rank takes its part of the batches, whose make-up is the same on any number of ranks.

    All ranks get equally many (ZeRO-3 gathers weights in lockstep): the missing ones repeat the last with weight 0.
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
        """The batches that one of several readers of a stream takes: neighbours, which lie in the same shards."""
        batches = list(self)
        return batches[worker * len(batches) // workers : (worker + 1) * len(batches) // workers]
