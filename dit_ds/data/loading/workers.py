"""Worker processes of a DataLoader: their settings, their deadline, their end, and what is reported when one dies.

All private names of PyTorch's DataLoader that this package uses are in `WorkerProcesses`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from dit_ds.data.loading.shared_memory import forget_pools
from dit_ds.errors import RankFailed
from dit_ds.processes import die_with_parent

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def worker_init_fn(_: int) -> None:
    """Set up a worker process: one thread, memory and its reuse, signals, and death along with its parent."""
    torch.set_num_threads(1)
    die_with_parent()
    gc.freeze()  # what the worker was forked with is neither searched for garbage nor, by that, copied
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # keep freed image memory for the next image: page faults cost as much as resizing it (musl has no mallopt)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's maximum
            libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    # SLURM signals all processes of a task, and Ctrl-C all of a terminal; the training process handles these and ends its workers itself
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class WorkerProcesses:
    """The worker processes of one iterator over a DataLoader; none with `num_workers=0`.

    Raises:
        RuntimeError: this version of PyTorch lacks one of the private attributes.
    """

    PRIVATE = (
        "_workers",
        "_worker_pids_set",
        "_shutdown",
        "_shutdown_workers",
    )  # of torch.utils.data.dataloader's multi-process iterator

    def __init__(self, loader: DataLoader, iterator: Any):
        missing = [name for name in self.PRIVATE if loader.num_workers and not hasattr(iterator, name)]
        if missing:
            raise RuntimeError(f"PyTorch {torch.__version__}'s DataLoader iterator has no {', '.join(missing)}")
        self.persistent = loader.persistent_workers
        self.processes: list[Any] = iterator._workers if loader.num_workers else []
        self._iterator = iterator

    def end(self, died: bool) -> None:
        """End them.

        Args:
            died: one of them died, maybe holding a lock that an orderly shutdown would wait for.
        """
        if not died:
            self._iterator._shutdown_workers()
            self.forget()
            return
        self._iterator._shutdown = True  # else the iterator's destructor would attempt the orderly shutdown
        for process in self.processes:
            process.kill()
        # PyTorch's watch on these processes ends too: the next iterator may get this one's id, which it is kept by
        if self._iterator._worker_pids_set:
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False
        _heed_dead_workers()

    def forget(self) -> None:
        """Give back the memory that they sent batches in, once they have ended."""
        forget_pools(p.pid for p in self.processes)


class Deadline:
    """Context manager: worker processes are killed if its body takes longer than `seconds`.

    PyTorch raises their death even where it blocks in a read from a worker that wrote half a message.

    Attributes:
        expired: they were killed.
    """

    def __init__(self, processes: Sequence[Any], seconds: float):
        # not `WorkerProcesses`: the timer's thread must not keep the iterator, whose destructor ends the workers
        self.processes, self.seconds, self.expired = processes, seconds, False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        if self.processes:
            self._timer = threading.Timer(self.seconds, self._expire)
            self._timer.start()

    def __exit__(self, *_: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self.expired = True
        for process in self.processes:
            process.kill()


@contextlib.contextmanager
def ended_on_error(workers: WorkerProcesses) -> Iterator[None]:
    """End the workers when the body raises, even while the exception still refers to the iterator.

    Persistent workers stay when the caller merely stops iterating.
    """
    try:
        yield
    except BaseException as e:
        if workers.processes and (isinstance(e, RankFailed) or not all(p.is_alive() for p in workers.processes)):
            workers.end(died=True)
        elif workers.processes and not (isinstance(e, GeneratorExit) and workers.persistent):
            workers.end(died=False)
        raise


@contextlib.contextmanager
def worker_failures(deadline: Deadline | None = None) -> Iterator[None]:
    """Turn PyTorch's error of a dead worker, raised anywhere in the main thread, into one line.

    Args:
        deadline: tells a stalled worker from a dead one.
    Raises:
        RankFailed: a worker died or stalled.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as e:
        text = " ".join(str(e).split())
        if not isinstance(e, RuntimeError):  # it died while it sent a batch
            text = "DataLoader worker exited unexpectedly"
        if not text.startswith("DataLoader worker"):
            raise
        _ignore_dead_workers()
        what = f"{text.split('. ')[0].rstrip('.')}: if it was killed, memory may have run out: lower data.workers"
        if deadline is not None and deadline.expired:
            what = (
                f"no batch from {len(deadline.processes)} loader workers for {deadline.seconds:g} s: see whether "
                "the file system with the shards answers, or raise data.worker_timeout"
            )
        raise RankFailed(f"{what}, and go on with --resume") from None


_pytorch_handler: Any = None  # of SIGCHLD, while it is replaced


def _ignore_dead_workers() -> None:
    """Set SIGCHLD's default: PyTorch's handler would raise at each further death, wherever the main thread is."""
    global _pytorch_handler
    if threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _pytorch_handler = former if callable(former) else _pytorch_handler


def _heed_dead_workers() -> None:
    """Set PyTorch's handler again, which PyTorch sets once in a process: without it a read from a later iterator's worker
    that dies within a message would never end."""
    global _pytorch_handler
    if _pytorch_handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _pytorch_handler)
        _pytorch_handler = None


@atexit.register
def _kill_workers() -> None:
    """Kill daemonic children at exit: Python would send SIGTERM, which workers ignore, and wait for them."""
    children = [c for c in multiprocessing.active_children() if c.daemon]
    if children:
        _ignore_dead_workers()
    for child in children:
        child.kill()
