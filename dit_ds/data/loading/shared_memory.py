"""Shared memory that batches travel in, from a worker to the training process; and that returns, as a page fault for
each 4 KiB of fresh memory costs about as much as resizing the pictures."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

_SLOTS = 8  # a worker's: those that wait, see `prefetch_factor`, the one in use, the one being filled, two to spare


class SharedBatchPool:
    """A worker's memory for batches. A slot is taken until the training process has dropped every tensor that views it;
    as long as all are, there is fresh memory, as without a pool."""

    def __init__(self) -> None:
        self._taken = torch.zeros(_SLOTS, dtype=torch.uint8).share_memory_()
        self._slots: list[torch.UntypedStorage] = []
        self._by_address: dict[int, int] = {}

    def take(self, size: int) -> tuple[torch.UntypedStorage, bool]:
        """At least `size` bytes; and whether they are fresh, which are zeros."""
        for slot, storage in enumerate(self._slots):
            if not self._taken[slot] and storage.nbytes() >= size:
                self._taken[slot] = 1
                return storage, False
        storage = torch.UntypedStorage._new_shared(size)
        if len(self._slots) < _SLOTS:
            slot = len(self._slots)
            self._taken[slot] = 1
            self._slots.append(storage)
            self._by_address[storage.data_ptr()] = slot
        return storage, True

    def share(self, batch: dict[str, Any]) -> SharedBatch:
        """The batch, ready for the queue to the training process."""
        return SharedBatch(batch, self._taken, self._by_address.get(batch["image"].untyped_storage().data_ptr()))


_pool: SharedBatchPool | None = None  # of this process, if it is a worker


def _pool_here() -> SharedBatchPool:
    global _pool
    _pool = _pool or SharedBatchPool()
    return _pool


def batch_memory(size: int) -> tuple[torch.UntypedStorage, bool]:
    """Memory for a batch, in a worker shared; and whether it is zeros."""
    return (torch.UntypedStorage(size), False) if get_worker_info() is None else _pool_here().take(size)


def share(batch: Any) -> Any:
    """What a worker made, ready for the queue; without workers, or if it is no batch, as it is."""
    return batch if get_worker_info() is None or not isinstance(batch, dict) else _pool_here().share(batch)


class SharedBatch:
    """A batch on its way: unpickled it is a dict again, and from then on is watched.

    Small tensors go through the pipe: a file descriptor each would cost more.
    """

    def __init__(self, batch: dict[str, Any], taken: Tensor, slot: int | None):
        self._batch = {k: v.numpy() if isinstance(v, Tensor) and not v.is_shared() else v for k, v in batch.items()}
        self._taken, self._slot = taken, slot

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self._batch, self._taken, self._slot)


_lock = threading.Lock()
_shared: list[tuple[StorageWeakRef, Tensor, int]] = []  # to this process: memory, and where to say that it is dropped


def _receive(batch: dict[str, Any], taken: Tensor, slot: int | None) -> dict[str, Any]:
    with _lock:  # a thread that pins memory receives, too
        for entry in [e for e in _shared if e[0].expired()]:
            _shared.remove(entry)
            entry[1][entry[2]] = 0
        if slot is not None:
            _shared.append((StorageWeakRef(batch["image"].untyped_storage()), taken, slot))
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
