"""What a memory prediction is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig


@dataclass(frozen=True)
class MemoryRequest:
    """What is asked.

    Attributes:
        config: the run; `model.attention` auto means what a GPU gets.
        ranks: GPUs, one a rank.
        micro_batches: those to profile; where there are none, the run's own.
        capacity: bytes; if given, the largest micro-batch whose peak is at most this is looked for.
        flops: count those of a sample's step, too.
    """

    config: RunConfig
    ranks: int = 1
    micro_batches: tuple[int, ...] = ()
    capacity: int | None = None
    flops: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Profiles by micro-batch; `largest` is 0 where not even one sample fits; None is what was not asked for.

    `flops` are those really computed in a sample's step, by this run's kernels and with what it computes again.
    """

    profiles: dict[int, Any]
    parameters: int
    trained: int
    largest: int | None = None
    flops: int | None = None

    def peak(self, micro_batch: int) -> float:
        """Bytes at most at once; between and beyond the profiled micro-batches along a line."""
        known = sorted((b, p.peak) for b, p in self.profiles.items())
        if len(known) == 1 or micro_batch in self.profiles:
            return float(dict(known).get(micro_batch, known[0][1]))
        below = [k for k in known if k[0] <= micro_batch][-1:] or known[:1]
        above = [k for k in known if k[0] > below[0][0]][:1]
        (b0, p0), (b1, p1) = (below + above) if above else known[-2:]
        return p0 + (p1 - p0) * (micro_batch - b0) / (b1 - b0)


def on_gpu(config: RunConfig) -> RunConfig:
    """The configuration as it would be on a GPU; xformers' cutlass kernel stands in as torch has it."""
    changes: dict[str, Any] = {"text": {"cache": 0}}
    if config.model.name == "dit_sam" and config.model.attention in ("auto", "xformers", "sdpa"):
        changes["model"] = {"attention": "sdpa_efficient"}
    return validate(merge(config.model_dump(), changes))
