"""From samples to batches: worker processes, and what they report."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dit_ds.data.dataset import ExpressionDataset, Tokenize
from dit_ds.data.order import EvalBatches, TrainBatches
from dit_ds.data.readers import StreamReader
from dit_ds.errors import RankFailed, UserError

_PR_SET_PDEATHSIG = 1


def collate(samples: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError:
    """Stack arrays to tensors (B, ...); what differs in size or is no array stays a list."""
    for s in samples:
        if isinstance(s, UserError):
            return s
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        stacks = isinstance(values[0], (np.ndarray, np.generic)) and key != "original"
        batch[key] = torch.from_numpy(np.stack(values)) if stacks else values
    return batch


class _Shares(IterableDataset):
    """What one worker reads of a stream: its share of each micro-batch, or its share of the batches to evaluate."""

    def __init__(self, dataset: ExpressionDataset, batches: TrainBatches | EvalBatches):
        self.dataset, self.batches = dataset, batches

    def __iter__(self) -> Iterator[dict[str, Any] | UserError]:
        worker = get_worker_info()
        shares = self.batches.shares(worker.id, worker.num_workers) if worker else list(self.batches)
        reader = self.dataset.reader
        reader.plan([self.dataset.images_of(share) for share in shares])
        for step, share in enumerate(shares):
            reader.at(step)
            yield collate([self.dataset[item] for item in share])


class _StreamLoader:
    """Joins what the workers read of each micro-batch."""

    def __init__(self, loader: DataLoader, batches: TrainBatches | EvalBatches):
        self.loader, self.batches = loader, batches

    def __iter__(self) -> Iterator[dict[str, Any] | UserError]:
        shares = iter(self.loader)  # workers in turn
        joined = isinstance(self.batches, TrainBatches) and self.loader.num_workers > 1
        with _ending(shares):
            while batch := _join(list(itertools.islice(shares, self.loader.num_workers if joined else 1))):
                yield batch


def _join(shares: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError | None:
    """One micro-batch of its workers' shares, every sample in its place."""
    errors = [s for s in shares if isinstance(s, UserError)]
    if errors or len(shares) < 2:
        return (errors or shares or [None])[0]
    batch: dict[str, Any] = {}
    for key in shares[0]:
        parts = [s[key] for s in shares]
        n = sum(map(len, parts))
        joined = _empty_like(parts[0], n) if isinstance(parts[0], torch.Tensor) else [None] * n
        for worker, part in enumerate(parts):
            joined[worker :: len(parts)] = part
        batch[key] = joined
    return batch


def _empty_like(part: torch.Tensor, n: int) -> torch.Tensor:
    """For n rows as `part` has them; pictures are channels last in memory, which decides how convolutions round."""
    form = torch.channels_last if part.dim() == 4 else torch.contiguous_format
    return torch.empty((n, *part.shape[1:]), dtype=part.dtype, memory_format=form)


Loader = DataLoader | _StreamLoader


def make_loader(
    dataset: ExpressionDataset, batches: TrainBatches | EvalBatches, workers: int, pin: bool, timeout: float = 300
) -> Loader:
    """A loader over `batches`; iterate it through `checked`.

    Args:
        pin: for fast copies to a GPU.
        timeout: seconds without a batch, after which workers count as stalled.
    """
    training = isinstance(batches, TrainBatches)
    how: dict[str, Any] = {
        "pin_memory": pin,
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": _quiet_worker,
        "timeout": timeout if workers else 0,
    }
    if isinstance(dataset.reader, StreamReader):
        if training:  # each reads its own places in the micro-batch
            workers = min(workers, batches.micro_batch)
        return _StreamLoader(
            DataLoader(_Shares(dataset, batches), None, num_workers=workers, collate_fn=_as_it_is, **how), batches
        )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0 and training,
        **how,
    )


@atexit.register
def _end_workers() -> None:
    """Python ends its daemonic children with SIGTERM and waits for them; loader workers ignore it."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a training process that is killed takes its workers with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # SLURM signals all processes of a task; the training process acts on these and ends its workers itself
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def checked(loader: Loader) -> Iterator[dict[str, Any]]:
    """The loader's batches.

    Raises:
        UserError: a worker met a damaged sample.
        RankFailed: a worker died, or none gave anything for too long.
    """
    batches = iter(loader)
    with _ending(batches), worker_failures():
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


@contextlib.contextmanager
def _ending(batches: Any) -> Iterator[None]:
    """Whatever ends the iteration early ends the workers, too: one that hangs would hold up the end of this process, as
    they ignore SIGTERM."""
    try:
        yield
    except BaseException as e:
        workers = getattr(batches, "_workers", [])
        if workers and isinstance(e, RuntimeError):  # torch's word of a dead or stalled one, which may hold a lock that
            batches._shutdown = True  # an orderly end would wait for
            for worker in workers:
                worker.kill()
        elif workers and not (isinstance(e, GeneratorExit) and batches._persistent_workers):
            batches._shutdown_workers()
        if isinstance(batches, Generator):
            batches.close()  # not only when the error that refers to it is forgotten
        raise


@contextlib.contextmanager
def worker_failures() -> Iterator[None]:
    """Say in one line that a loader worker died or stalled; torch raises it anywhere in the main thread.

    Raises:
        RankFailed: one did.
    """
    try:
        yield
    except RuntimeError as e:
        text = " ".join(str(e).split())
        if not text.startswith("DataLoader"):
            raise
        stalled = "timed out" in text
        hint = (
            "see whether the file system with the shards answers, or raise data.timeout"
            if stalled
            else "where it was killed, memory may have run out: lower data.workers"
        )
        raise RankFailed(f"{text.split('. ')[0].rstrip('.')}: {hint}, and go on with --resume") from None


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """Expressions to `length` ids and a mask of the real ones, by a `transformers` tokenizer."""
    return functools.partial(_tokenize, tokenizer, length)


def _tokenize(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)
