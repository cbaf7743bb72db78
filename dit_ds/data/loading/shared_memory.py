"""Shared memory in which batches travel from a worker to the training process, and its reuse.

Fresh memory costs a page fault for each 4 KiB, together about as much as resizing the images.
"""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

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

    Attributes:
        key: this process, and a number that tells the pool from one of an earlier process with the same id.
    """

    def __init__(self) -> None:
        self.key = os.getpid(), uuid.uuid4().int
        self._in_use = torch.zeros(_SLOTS, dtype=torch.uint8).share_memory_()
        self._flags = self._in_use.numpy()  # the same memory, quicker to read
        self._slots: list[torch.UntypedStorage] = []
        self._sent: set[int] = set()  # slots whose memory the training process has
        self._taken: tuple[int | None, torch.UntypedStorage] | None = None  # last: its slot, None outside the slots

    def take(self, size: int) -> tuple[torch.UntypedStorage, bool]:
        """A shared storage of at least `size` bytes, and whether it is fresh, that is, zeros."""
        free = np.flatnonzero(self._flags[: len(self._slots)] == 0).tolist()
        slot = next((slot for slot in free if self._slots[slot].nbytes() >= size), None)
        fresh = slot is None
        storage = torch.UntypedStorage._new_shared(size) if slot is None else self._slots[slot]
        if fresh and len(self._slots) < _SLOTS:
            slot = len(self._slots)
            self._slots.append(storage)
        elif fresh and free:
            slot = free[0]
            self._slots[slot] = storage
            self._sent.discard(slot)
        if slot is not None:
            self._flags[slot] = 1
        self._taken = slot, storage
        return storage, fresh

    def share(self, batch: dict[str, Any]) -> SharedBatch:
        """Wrap a batch, whose memory was taken last, for the queue to the training process."""
        assert self._taken is not None
        slot, storage = self._taken
        known = slot in self._sent
        if slot is not None:
            self._sent.add(slot)
        memory = None if known else torch.empty(0, dtype=torch.uint8).set_(storage)
        place = _Place(self.key, slot, memory, None if known else self._in_use)
        first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return SharedBatch({k: _sent_form(v, first, end) for k, v in batch.items()}, place)


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


class _Place(NamedTuple):
    """Where a batch's large tensors are.

    Attributes:
        pool: its key.
        slot: None with fresh memory outside the pool.
        memory, in_use: the slot's bytes and the pool's flags; None if the training process has them already: it costs more
            to send a file descriptor than everything else.
    """

    pool: tuple[int, int]
    slot: int | None
    memory: Tensor | None
    in_use: Tensor | None


class SharedBatch:
    """A batch in the queue, which is unpickled to a dict whose slot is released once its tensors are dropped.

    Args:
        values: of the batch, as of `_sent_form`.
        place: of the storage that its large tensors are in.
    """

    def __init__(self, values: dict[str, Any], place: _Place):
        self._place = place
        # pickled here: PyTorch's thread, which sends it, would take turns with this one for each value
        self._pickled = pickle.dumps(values, pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self._pickled, self._place)


class _View(NamedTuple):
    """A tensor in the place's memory."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _sent_form(value: Any, first: int, end: int) -> Any:
    """A tensor in the memory from the address `first` to `end` as a `_View`; another one, which is small, as an array."""
    if not isinstance(value, Tensor):
        return value
    if not first <= value.data_ptr() < end:
        return value.numpy()
    return _View(value.dtype, int(value.storage_offset()), tuple(value.shape), value.stride())


# in the training process, under the lock: with pinned memory, a thread receives
_lock = threading.Lock()
_received: list[tuple[StorageWeakRef, Tensor, int]] = []  # of batches: storage, its pool's flags, its slot
_pools: dict[tuple[int, int], tuple[Tensor, dict[int, np.ndarray]]] = {}  # flags, and the slots' bytes


def _receive(pickled: bytes, place: _Place) -> dict[str, Any]:
    """The batch; releases the slots of earlier batches that were dropped meanwhile."""
    with _lock:
        for entry in [e for e in _received if e[0].expired()]:
            _received.remove(entry)
            entry[1][entry[2]] = 0
        if place.slot is None:
            assert place.memory is not None
            memory = place.memory
        else:
            if place.memory is not None and place.in_use is not None:
                _pools.setdefault(place.pool, (place.in_use, {}))[1][place.slot] = place.memory.numpy()
            in_use, slots = _pools[place.pool]
            memory = torch.from_numpy(slots[place.slot])  # its storage is this batch's alone, and expires with it
            _received.append((StorageWeakRef(memory.untyped_storage()), in_use, place.slot))
    return {k: _received_form(v, memory) for k, v in pickle.loads(pickled).items()}


def _received_form(value: Any, memory: Tensor) -> Any:
    if isinstance(value, _View):
        tensor = torch.empty(0, dtype=value.dtype)
        return tensor.set_(memory.untyped_storage(), value.offset, value.shape, value.stride)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def forget_pools(processes: Iterable[int]) -> None:
    """Give back the memory of workers that have ended; batches that were received keep theirs.

    Args:
        processes: their ids.
    """
    gone = set(processes)
    with _lock:
        for key in [k for k in _pools if k[0] in gone]:
            del _pools[key]
