"""Batches from a dataset and a batch sampler, through PyTorch's DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dit_ds.data.loading.announce import AnnouncingSampler
from dit_ds.data.loading.batch import join_slices
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.packed import PackedDataset
from dit_ds.data.loading.readers import StreamReader
from dit_ds.data.loading.sampler import EvalBatchSampler, TrainBatchSampler
from dit_ds.data.loading.shared_memory import share
from dit_ds.data.loading.workers import Deadline, WorkerProcesses, ended_on_error, worker_failures, worker_init_fn
from dit_ds.errors import UserError


@dataclass(frozen=True)
class Loader:
    """What `iterate` iterates over.

    Attributes:
        loader: PyTorch's.
        slices: so many consecutive items of it are joined to one batch, see `batch.join_slices`.
        timeout: seconds without a batch after which the workers count as stalled.
    """

    loader: DataLoader
    slices: int
    timeout: float


class StreamDataset(IterableDataset):
    """A dataset that is read as a stream: each worker yields its slices of the batches, see `worker_slices`."""

    def __init__(self, dataset: ExpressionDataset, reader: StreamReader, batches: TrainBatchSampler | EvalBatchSampler):
        self.dataset, self.reader, self.batches = dataset, reader, batches

    def __iter__(self) -> Iterator[dict[str, Any] | UserError]:
        worker = get_worker_info()
        slices = self.batches.worker_slices(worker.id, worker.num_workers) if worker else list(self.batches)
        self.reader.plan([self.dataset.images_of(items) for items in slices])
        for step, items in enumerate(slices):
            self.reader.advance(step)
            yield self.dataset.__getitems__(items)


def make_loader(
    dataset: ExpressionDataset,
    batches: TrainBatchSampler | EvalBatchSampler,
    workers: int,
    pin: bool,
    timeout: float = 300,
) -> Loader:
    """A loader of `batches`; iterate over it with `iterate`.

    Args:
        workers: worker processes; 0 loads in this process.
        pin: put batches in pinned memory, for fast copies to a GPU.
        timeout: see `Loader`.
    """
    options: dict[str, Any] = {
        "collate_fn": share,  # the dataset returns batches
        "pin_memory": pin,
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": worker_init_fn,
    }
    reader = dataset.reader
    if isinstance(reader, StreamReader):
        slices = 1
        if isinstance(batches, TrainBatchSampler):  # each worker reads its slice of each micro-batch
            workers = min(workers, batches.micro_batch)
            slices = max(1, workers)
        stream = StreamDataset(dataset, reader, batches)
        return Loader(DataLoader(stream, batch_size=None, num_workers=workers, **options), slices, timeout)
    persistent = workers > 0 and isinstance(batches, TrainBatchSampler)
    announced = AnnouncingSampler(batches, workers) if isinstance(dataset, PackedDataset) else batches
    loader = DataLoader(dataset, batch_sampler=announced, num_workers=workers, persistent_workers=persistent, **options)
    return Loader(loader, 1, timeout)


def iterate(loader: Loader) -> Iterator[dict[str, Any]]:
    """The loader's batches, as `BatchBuilder.collated` describes them.

    Raises:
        UserError: a sample is damaged, or a shard can't be read.
        RankFailed: a worker died or stalled.
    """
    iterator = iter(loader.loader)
    workers = WorkerProcesses(loader.loader, iterator)
    deadline = Deadline(workers.processes, loader.timeout)
    with ended_on_error(workers), worker_failures(deadline):
        while True:
            with deadline:
                batch = join_slices(list(itertools.islice(iterator, loader.slices)))
            if isinstance(batch, UserError):
                raise batch
            if batch is None:
                if not workers.persistent:
                    workers.forget()
                return
            yield batch
