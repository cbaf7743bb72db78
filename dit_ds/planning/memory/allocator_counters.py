"""What the memory's allocator says of itself, and of each phase of a step."""

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
        """The peaks start anew."""

    def peaks(self) -> tuple[int, int]:
        """Most allocated and most reserved since `reset`."""

    def used(self) -> int:
        """In use on the device, by whomever."""

    def capacity(self) -> int:
        """What the device has."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def record(self) -> None:
        """From here on note where each allocation is made."""

    def snapshot(self, path: Path) -> None:
        """Write what was noted."""


class CudaAllocator:
    """PyTorch's caching allocator on a GPU. Its peaks are those of the host's order, so that none needs a wait."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def used(self) -> int:
        """As NVML counts; without its package as the driver does, which is nearly the same."""
        with contextlib.suppress(Exception):  # each lack of NVML is another exception
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
            pickle.dump(snapshot, f)  # as torch's _dump_snapshot, which would leave half a file behind


class Meter:
    """In the tracker's place: the allocator's peaks in each phase, and no look at any tensor.

    Attributes:
        phase: the one under way.
        warming: what comes counts as warm-up.
        peaks: (allocated, reserved) bytes at most in each phase so far: load, warmup, forward, backward, step.
    """

    def __init__(self, allocator: Allocator):
        self.allocator, self.phase, self.warming = allocator, "", False
        self.peaks: dict[str, tuple[int, int]] = {}

    def enter(self, phase: str) -> None:
        """From here on it is another phase."""
        if self.phase:
            name = "warmup" if self.warming and self.phase != "load" else self.phase
            (a, r), (a0, r0) = self.allocator.peaks(), self.peaks.get(name, (0, 0))
            self.peaks[name] = (max(a, a0), max(r, r0))
        self.allocator.reset()
        self.phase = phase

    def restart(self) -> None:
        """What was before is over."""
        self.enter("")

    def profile(self) -> None:
        """The step is over."""
        self.enter("")

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Whose they are is not asked, and the tensors aren't looked for."""

    def watch(self, model: torch.nn.Module) -> None:
        """No hooks."""

    def unwatch(self) -> None:
        """No hooks."""
