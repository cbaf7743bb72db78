"""The memory allocator's own counters, and their peaks in each phase of a step."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dit_ds.files import atomic_write


class Allocator(Protocol):
    """A device's memory. All numbers are bytes."""

    def reset(self) -> None:
        """Start new peaks."""

    def peaks(self) -> tuple[int, int]:
        """The peaks since `reset`: allocated, reserved."""

    def used(self) -> int:
        """In use on the device, by all processes."""

    def capacity(self) -> int:
        """The device's memory."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def record(self) -> None:
        """From now on record each allocation with its stack trace."""

    def snapshot(self, path: Path) -> None:
        """Write the record, as PyTorch's memory snapshot, and end it."""


class CudaAllocator:
    """PyTorch's caching allocator on a GPU. It counts in the host's order of calls, so that peaks need no synchronization."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def used(self) -> int:
        """In use on the device by all processes, from NVML; where that is missing, from the driver, nearly the same."""
        with contextlib.suppress(Exception):  # its absence shows in several types of exceptions
            return torch.cuda.device_memory_used(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def capacity(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def record(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def snapshot(self, path: Path) -> None:
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        with atomic_write(path) as f:
            pickle.dump(snapshot, f)  # the format of torch's _dump_snapshot, which does not write atomically


class AllocatorPhasePeaks:
    """The allocator's peaks in each phase, see `profiled_step.PhasePeaks`; tensors are not tracked.

    Attributes:
        phase: the current one.
        warming: whether steps count as warm-up.
        peaks: peak (allocated, reserved) bytes by phase so far: load, warmup, forward, backward, step.
    """

    def __init__(self, allocator: Allocator):
        self.allocator, self.phase, self.warming = allocator, "", False
        self.peaks: dict[str, tuple[int, int]] = {}

    def enter(self, phase: str) -> None:
        """Start a phase."""
        if self.phase:
            name = "warmup" if self.warming and self.phase != "load" else self.phase
            (a, r), (a0, r0) = self.allocator.peaks(), self.peaks.get(name, (0, 0))
            self.peaks[name] = (max(a, a0), max(r, r0))
        self.allocator.reset()
        self.phase = phase

    def restart(self) -> None:
        """End the current phase."""
        self.enter("")

    def profile(self) -> None:
        """End the step; its peaks are in `peaks`."""
        self.enter("")

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Nothing: the allocator knows no categories. The iterable is not consumed."""

    def watch(self, model: torch.nn.Module) -> None:
        """Nothing."""

    def unwatch(self) -> None:
        """Nothing."""
