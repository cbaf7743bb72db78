"""Shared memory in which batches travel from a worker to the training process, and its reuse.

Fresh memory costs a page fault for each 4 KiB, together about as much as resizing the images.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

_SLOTS = 8  # of a worker: `prefetch_factor` batches that wait, one in use, one being filled, and two spare


class SharedBatchPool:
    """A worker's reusable memory for batches.

    A slot is in use until the training process has dropped every tensor that views it. While all slots are, batches get
    fresh memory. Where none that is free has the size, one of them is replaced.
    """

    def __init__(self) -> None:
        self._in_use = torch.zeros(_SLOTS, dtype=torch.uint8).share_memory_()
        self._slots: list[torch.UntypedStorage] = []
        self._by_address: dict[int, int] = {}

    def take(self, size: int) -> tuple[torch.UntypedStorage, bool]:
        """A shared storage of at least `size` bytes, and whether it is fresh, that is, zeros."""
        free = [slot for slot in range(len(self._slots)) if not self._in_use[slot]]
        slot = next((slot for slot in free if self._slots[slot].nbytes() >= size), None)
        if slot is not None:
            self._in_use[slot] = 1
            return self._slots[slot], False
        storage = torch.UntypedStorage._new_shared(size)
        if len(self._slots) < _SLOTS:
            slot = len(self._slots)
            self._slots.append(storage)
        elif free:
            slot = free[0]
            self._slots[slot] = storage
        else:
            return storage, True
        self._in_use[slot] = 1
        self._by_address = {s.data_ptr(): i for i, s in enumerate(self._slots)}
        return storage, True

    def share(self, batch: dict[str, Any]) -> SharedBatch:
        """Wrap a batch for the queue to the training process."""
        return SharedBatch(batch, self._in_use, self._by_address.get(_shared_storage(batch).data_ptr()))


def _shared_storage(batch: dict[str, Any]) -> torch.UntypedStorage:
    """The storage of those of a batch's tensors that are in shared memory."""
    return next(v for v in batch.values() if isinstance(v, Tensor) and v.is_shared()).untyped_storage()


_pool: SharedBatchPool | None = None  # of this process, if it is a worker


def _worker_pool() -> SharedBatchPool:
    global _pool
    _pool = _pool or SharedBatchPool()
    return _pool


def batch_memory(size: int) -> tuple[torch.UntypedStorage, bool]:
    """A storage of at least `size` bytes, shared if this process is a worker; and whether it is zeros."""
    return (torch.UntypedStorage(size), False) if get_worker_info() is None else _worker_pool().take(size)


def share(batch: Any) -> Any:
    """The loader's `collate_fn`: wraps a worker's batch for the queue; returns anything else unchanged."""
    return batch if get_worker_info() is None or not isinstance(batch, dict) else _worker_pool().share(batch)


class SharedBatch:
    """A batch in the queue, which is unpickled to a dict whose slot is released once its tensors are dropped.

    Small tensors are sent through the pipe: a file descriptor for each would cost more.

    Args:
        batch: its large tensors are in one storage in shared memory.
        in_use: the pool's flags.
        slot: of that storage in the pool; None with fresh memory outside it.
    """

    def __init__(self, batch: dict[str, Any], in_use: Tensor, slot: int | None):
        self._batch = {k: v.numpy() if isinstance(v, Tensor) and not v.is_shared() else v for k, v in batch.items()}
        self._in_use, self._slot = in_use, slot

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self._batch, self._in_use, self._slot)


_lock = threading.Lock()
_received: list[tuple[StorageWeakRef, Tensor, int]] = []  # in the training process: storage, its pool's flags, its slot


def _receive(batch: dict[str, Any], in_use: Tensor, slot: int | None) -> dict[str, Any]:
    """The batch; releases the slots of earlier batches that were dropped meanwhile."""
    with _lock:  # with pinned memory, a thread receives
        for entry in [e for e in _received if e[0].expired()]:
            _received.remove(entry)
            entry[1][entry[2]] = 0
        if slot is not None:
            _received.append((StorageWeakRef(_shared_storage(batch)), in_use, slot))
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
