"""The request for a memory prediction, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig


@dataclass(frozen=True)
class MemoryRequest:
    """What to predict.

    Attributes:
        config: the run; `model.attention` auto means the kernel chosen on a GPU.
        ranks: of the cluster, one GPU each.
        micro_batches: those to profile; if empty, the run's.
        capacity: bytes; if given, the largest micro-batch whose peak is at most this is searched.
        flops: count those of a sample's step, too.
    """

    config: RunConfig
    ranks: int = 1
    micro_batches: tuple[int, ...] = ()
    capacity: int | None = None
    flops: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """A prediction. What was not requested is None.

    Attributes:
        profiles: `tracker.Profile` by micro-batch.
        parameters: elements of all parameters.
        trained: elements of the trained ones.
        largest: the largest micro-batch that fits, 0 where not even one sample does.
        flops: computed in a sample's step by this run's kernels, activation recomputation included.
    """

    profiles: dict[int, Any]
    parameters: int
    trained: int
    largest: int | None = None
    flops: int | None = None

    def peak(self, micro_batch: int) -> float:
        """Peak bytes; between and beyond the profiled micro-batches by linear interpolation."""
        known = sorted((b, p.peak) for b, p in self.profiles.items())
        if len(known) == 1 or micro_batch in self.profiles:
            return float(dict(known).get(micro_batch, known[0][1]))
        below = [k for k in known if k[0] <= micro_batch][-1:] or known[:1]
        above = [k for k in known if k[0] > below[0][0]][:1]
        (b0, p0), (b1, p1) = (below + above) if above else known[-2:]
        return p0 + (p1 - p0) * (micro_batch - b0) / (b1 - b0)


def on_gpu(config: RunConfig) -> RunConfig:
    """The configuration as it would be on a GPU; for xformers' cutlass kernel torch's copy of it is used."""
    changes: dict[str, Any] = {"text": {"cache": 0}}
    if config.model.name == "dit_sam" and config.model.attention in ("auto", "xformers", "sdpa"):
        changes["model"] = {"attention": "sdpa_efficient"}
    return validate(merge(config.model_dump(), changes))
