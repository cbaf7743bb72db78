"""How fast a run goes and where its time and memory go, window by window of `log.every_steps` steps."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_ds.distributed import World, gather_values


@dataclass(frozen=True)
class FlopsPerSample:
    """What turns samples a second into others.

    Attributes:
        tokens: of a sample, image and words.
        flops: of a sample's training, forward and backward, nothing computed twice; None where not counted.
        peak: FLOP/s of one device on paper; None where unknown.
    """

    tokens: int
    flops: float | None = None
    peak: float | None = None


class ThroughputMeter:
    """Averages over some steps.

    `close` is the only point that synchronises with the device and between ranks.
    """

    def __init__(self, world: World, rates: FlopsPerSample):
        self.world, self.rates = world, rates
        self.loss: Tensor | float = 0.0
        self.finite: Tensor | float = 0.0
        self.samples = 0
        self.steps: list[float] = []
        self.waited = self.forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.start = self._step = time.perf_counter()

    def waiting(self) -> None:
        """The loop asks for data."""
        self._asked = time.perf_counter()

    def got(self) -> None:
        """The loop got its data; the forward pass begins."""
        self._got = time.perf_counter()
        self.waited += self._got - self._asked
        if self.world.device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def add(self, loss: Tensor, samples: int) -> None:
        """The forward pass is over: one micro-batch's loss and real samples. A loss that isn't finite is left out."""
        if self._events:
            self._events[-1][1].record()
        else:
            self.forward += time.perf_counter() - self._got
        finite = torch.isfinite(loss)
        self.loss = self.loss + torch.where(finite, loss, 0.0)
        self.finite = self.finite + finite
        self.samples += samples

    def stepped(self) -> None:
        """An optimizer step is over."""
        now = time.perf_counter()
        self.steps.append(now - self._step)
        self._step = now

    def leave_out(self, seconds: float) -> None:
        """What just passed was not training: a save."""
        self.start += seconds
        self._step += seconds

    def close(self) -> dict[str, float | int | None]:
        """The window over all ranks.

        Returns:
            `loss` (the mean of the finite ones), `samples_per_second`, `tokens_per_second`, `mfu` (a GPU's share of its
            peak), `data_wait` (share of the time, mean over ranks), `step_seconds_p50`, `_p95`, `_max`,
            `slowest_rank` and `slowest_over_median` (time for data and forward, in which ranks don't wait for one
            another), `peak_memory_gib` and `reserved_memory_gib` (largest of the ranks), and `seconds`.
        """
        seconds = time.perf_counter() - self.start
        device = self.world.device
        if self._events:
            torch.cuda.synchronize()
            self.forward = sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        mine = [float(self.loss), float(self.finite), self.samples, self.waited, self.waited + self.forward]
        rows = gather_values([*mine, *memory_gib(device)], device)
        loss, finite, samples, waited, *_ = rows.sum(0).tolist()
        own, rate = rows[:, 4].tolist(), samples / seconds
        r, world, steps = self.rates, self.world.world_size, sorted(self.steps)
        median = statistics.median(own)
        return {
            "loss": loss / finite if finite else float("nan"),
            "samples_per_second": rate,
            "tokens_per_second": rate * r.tokens,
            "mfu": rate * r.flops / (world * r.peak) if r.flops and r.peak else None,
            "data_wait": waited / world / seconds,
            "step_seconds_p50": steps[len(steps) // 2] if steps else None,
            "step_seconds_p95": steps[int(len(steps) * 0.95)] if steps else None,
            "step_seconds_max": steps[-1] if steps else None,
            "slowest_rank": own.index(max(own)),
            "slowest_over_median": max(own) / median if median else 1.0,
            "peak_memory_gib": float(rows[:, 5].max()),
            "reserved_memory_gib": float(rows[:, 6].max()),
            "seconds": seconds,
        }


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Peaks so far of what was allocated and reserved on the GPU; on a CPU of this process's resident memory. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return peak, peak
