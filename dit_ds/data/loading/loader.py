"""From samples to batches: worker processes, and what they report."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dit_ds.data.loading.batch import join
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.readers import StreamReader
from dit_ds.data.loading.sampler import EvalBatchSampler, TrainBatchSampler
from dit_ds.data.loading.shared_memory import share
from dit_ds.errors import RankFailed, UserError

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Loader:
    """What `iterate` iterates.

    Attributes:
        workers: torch's loader.
        shares: of so many in turn each batch is joined.
        timeout: seconds without a batch, after which workers count as stalled.
    """

    workers: DataLoader
    shares: int
    timeout: float


class StreamDataset(IterableDataset):
    """What one worker reads of a stream: its share of each micro-batch, or its share of the batches to evaluate."""

    def __init__(self, dataset: ExpressionDataset, batches: TrainBatchSampler | EvalBatchSampler):
        self.dataset, self.batches = dataset, batches

    def __iter__(self) -> Iterator[dict[str, Any] | UserError]:
        worker = get_worker_info()
        slices = self.batches.worker_slices(worker.id, worker.num_workers) if worker else list(self.batches)
        reader = self.dataset.reader
        reader.plan([self.dataset.images_of(samples) for samples in slices])
        for step, samples in enumerate(slices):
            reader.at(step)
            yield self.dataset.__getitems__(samples)


def make_loader(
    dataset: ExpressionDataset,
    batches: TrainBatchSampler | EvalBatchSampler,
    workers: int,
    pin: bool,
    timeout: float = 300,
) -> Loader:
    """A loader over `batches`; iterate it through `iterate`.

    Args:
        pin: for fast copies to a GPU.
        timeout: see `Loader`.
    """
    training = isinstance(batches, TrainBatchSampler)
    how: dict[str, Any] = {
        "collate_fn": share,  # the dataset makes whole batches
        "pin_memory": pin,
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": worker_init_fn,
    }
    if isinstance(dataset.reader, StreamReader):
        if training:  # each reads its own places in the micro-batch
            workers = min(workers, batches.micro_batch)
        loader = DataLoader(StreamDataset(dataset, batches), batch_size=None, num_workers=workers, **how)
        return Loader(loader, max(1, workers) if training else 1, timeout)
    persistent = workers > 0 and training
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=persistent, **how)
    return Loader(loader, 1, timeout)


def worker_init_fn(_: int) -> None:
    """Set up a loader worker: one thread, kept memory, an end with its training process, no share in its signals."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a training process that is killed takes its workers with it
        # a picture's memory is kept for the next one: new pages cost as much as resizing it (musl has no mallopt)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
            libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    # SLURM signals all processes of a task; the training process acts on these and ends its workers itself
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends its daemonic children with SIGTERM and waits for them; loader workers ignore it."""
    children = [c for c in multiprocessing.active_children() if c.daemon]
    if children:
        _forget_workers()
    for child in children:
        child.kill()


def _forget_workers() -> None:
    """From here on a worker's death is no news: torch's handler would raise at each, wherever the main thread is."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def iterate(loader: Loader) -> Iterator[dict[str, Any]]:
    """The loader's batches.

    Raises:
        UserError: a worker met a damaged sample.
        RankFailed: a worker died, or none gave anything for too long.
    """
    parts = iter(loader.workers)
    watch = _Watch(getattr(parts, "_workers", []), loader.timeout)
    with _ending(parts), worker_failures(watch):
        while True:
            with watch:
                batch = join(list(itertools.islice(parts, loader.shares)))
            if isinstance(batch, UserError):
                raise batch
            if batch is None:
                return
            yield batch


class _Watch:
    """A context that workers have so many seconds for; then they are killed, which torch raises as their death, even
    where it waits for the rest of what a worker was about to say."""

    def __init__(self, workers: list[Any], seconds: float):
        self.workers, self.seconds, self.stalled = workers, seconds, False
        self._timer = threading.Timer(seconds, self._end)

    def __enter__(self) -> None:
        self._timer = threading.Timer(self.seconds, self._end)
        if self.workers:
            self._timer.start()

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.stalled = True
        for worker in self.workers:
            worker.kill()


@contextlib.contextmanager
def _ending(parts: Any) -> Iterator[None]:
    """Whatever ends the iteration early ends the workers, too, even while the error still refers to them."""
    try:
        yield
    except BaseException as e:
        workers = getattr(parts, "_workers", [])
        if workers and (isinstance(e, RankFailed) or not all(w.is_alive() for w in workers)):
            parts._shutdown = True  # one died, maybe with a lock that an orderly end would wait for
            for worker in workers:
                worker.kill()
        elif workers and not (isinstance(e, GeneratorExit) and parts._persistent_workers):
            parts._shutdown_workers()
        raise


@contextlib.contextmanager
def worker_failures(watch: _Watch | None = None) -> Iterator[None]:
    """Say in one line that a loader worker died or stalled; torch raises it anywhere in the main thread.

    Raises:
        RankFailed: one did.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as e:
        text = " ".join(str(e).split())
        if not isinstance(e, RuntimeError):  # it died while it handed a batch over
            text = "DataLoader worker exited unexpectedly"
        if not text.startswith("DataLoader worker"):
            raise
        _forget_workers()
        what = f"{text.split('. ')[0].rstrip('.')}: if it was killed, memory may have run out: lower data.workers"
        if watch is not None and watch.stalled:
            what = (
                f"no batch from {len(watch.workers)} loader workers for {watch.seconds:g} s: see whether the file system "
                "with the shards answers, or raise data.worker_timeout"
            )
        raise RankFailed(f"{what}, and go on with --resume") from None
