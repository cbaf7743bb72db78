"""Throughput, waiting times and memory of a run, averaged over `log.every_steps` steps."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_ds.distributed import World, gather_values
from dit_ds.files import GIB


@dataclass(frozen=True)
class FlopsPerSample:
    """Tokens and FLOPs of a sample, to turn samples per second into tokens per second and MFU.

    Attributes:
        tokens: of a sample, image patches and text tokens.
        flops: of a sample's forward and backward pass, recomputation not counted; None where not counted.
        peak: FLOP/s of one device by its data sheet; None where unknown.
    """

    tokens: int
    flops: float | None = None
    peak: float | None = None


class ThroughputMeter:
    """Averages over some steps. The loop marks its phases in the order of the methods.

    `close` is the only method that synchronises with the device and between ranks.

    A rank's own time is what it does before it waits for another: waiting for its data, and the forward pass (on GPUs
    between two events of the compute stream, so that a queue on the host does not count). The backward pass and the
    optimizer step hold the reduction of gradients, in which the fast wait for the slow, and are left out. So own time
    shows a slow loader, a slow or throttled device, a busy or stopped host; not a slow network, and not what is slow in
    the backward pass alone. Under ZeRO-3 the forward pass gathers parameters from all ranks and lasts equally long on
    all: own time is then that of the data alone, and a slow device is not seen (`dit-ds doctor` measures it).

    Args:
        forward_waits: the forward pass has collectives (ZeRO-3): it is no part of own time.
    """

    def __init__(self, world: World, flops: FlopsPerSample, forward_waits: bool = False):
        self.world, self.flops, self.forward_waits = world, flops, forward_waits
        self.loss: Tensor | float = 0.0
        self.finite: Tensor | float = 0.0  # how many losses were
        self.samples = 0
        self.steps: list[float] = []  # seconds of each
        self.waited = self.forward = 0.0  # seconds
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.start = self._step_start = self._requested = self._received = time.perf_counter()

    def data_requested(self) -> None:
        """The loop asks for a micro-batch."""
        self._requested = time.perf_counter()

    def data_received(self) -> None:
        """The loop has its micro-batch; the forward pass begins."""
        self._received = time.perf_counter()
        self.waited += self._received - self._requested
        if self.world.device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def forward_done(self, loss: Tensor, samples: int) -> None:
        """The forward pass is over.

        Args:
            loss: the micro-batch's, a detached scalar; left out of the average where it is not finite.
            samples: of the micro-batch, without padding.
        """
        if self._events:
            self._events[-1][1].record()
        else:
            self.forward += time.perf_counter() - self._received
        finite = torch.isfinite(loss)
        self.loss = self.loss + torch.where(finite, loss, 0.0)
        self.finite = self.finite + finite
        self.samples += samples

    def step_done(self) -> None:
        """An optimizer step is over."""
        now = time.perf_counter()
        self.steps.append(now - self._step_start)
        self._step_start = now

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, which were spent on a save."""
        self.start += seconds
        self._step_start += seconds

    def close(self) -> dict[str, Any]:
        """The averages over the steps and all ranks. Collective.

        Returns:
            `loss` (the mean of the finite ones), `samples_per_second`, `tokens_per_second`, `mfu` (a GPU's share of its
            peak), `data_wait` (share of the time, mean over ranks), `step_seconds_p50`, `_p95`, `_max`,
            `slowest_rank` and `slowest_over_median` (of the ranks' own time), `peak_memory_gib` and
            `reserved_memory_gib` (the largest of the ranks'), `seconds`, `step_seconds_mean`, and `own_seconds` (of each
            rank, for an optimizer step).
        """
        seconds = time.perf_counter() - self.start
        device = self.world.device
        if self._events:
            torch.cuda.synchronize()
            self.forward = sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        own = self.waited + (0.0 if self.forward_waits else self.forward)
        mine = [float(self.loss), float(self.finite), self.samples, self.waited, own]
        rows = gather_values([*mine, *memory_gib(device)], device)
        loss, finite, samples, waited, *_ = rows.sum(0).tolist()
        busy, rate = rows[:, 4].tolist(), samples / seconds  # own time of each rank
        f, world, steps = self.flops, self.world.world_size, sorted(self.steps)
        median = statistics.median(busy)
        return {
            "loss": loss / finite if finite else float("nan"),
            "samples_per_second": rate,
            "tokens_per_second": rate * f.tokens,
            "mfu": rate * f.flops / (world * f.peak) if f.flops and f.peak else None,
            "data_wait": waited / world / seconds,
            "step_seconds_p50": steps[len(steps) // 2] if steps else None,
            "step_seconds_p95": steps[int(len(steps) * 0.95)] if steps else None,
            "step_seconds_max": steps[-1] if steps else None,
            "slowest_rank": busy.index(max(busy)),
            "slowest_over_median": max(busy) / median if median else 1.0,
            "peak_memory_gib": float(rows[:, 5].max()),
            "reserved_memory_gib": float(rows[:, 6].max()),
            "seconds": seconds,
            "step_seconds_mean": statistics.fmean(steps) if steps else 0.0,
            "own_seconds": [b / max(1, len(steps)) for b in busy],
        }


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Peak memory so far in GiB, allocated and reserved on the GPU; on a CPU this process's resident memory, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return peak, peak
