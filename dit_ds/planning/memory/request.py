"""The request for a memory prediction, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.planning.memory.allocator_settings import TRAIN_SETTINGS
from dit_ds.planning.memory.figures import Figures


@dataclass(frozen=True)
class MemoryRequest:
    """What to predict.

    Attributes:
        config: the run; `model.attention` auto means the kernel chosen on a GPU.
        ranks: of the cluster, one GPU each.
        rank: which of them.
        gpu: whose operators' workspaces and scratch count, by its name in `gpus.PEAKS`.
        settings: of the allocator, as in PYTORCH_CUDA_ALLOC_CONF.
        micro_batches: those to profile; if empty, the run's.
        capacity: bytes for segments; if given, the largest micro-batch that they do for is searched.
        memory: bytes of the GPU in all, for the message of an allocation that fails.
        flops: count those of a sample's step, too.
        compare: whether other settings of the allocator are tried.
        share: how far above the least capacity the one found may be, as a share of it.
        bar: label of a progress bar on stderr, which counts the micro-batches profiled; none if empty.
    """

    config: RunConfig
    ranks: int = 1
    rank: int = 0
    gpu: str = "H100"
    settings: str = TRAIN_SETTINGS
    micro_batches: tuple[int, ...] = ()
    capacity: int | None = None
    memory: float = 0.0
    flops: bool = False
    compare: bool = False
    share: float = 0.002
    bar: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """A prediction. What was not requested is None.

    Attributes:
        profiles: `tracker.Profile` by micro-batch.
        figures: allocated, least capacity, reserved by micro-batch, of those that were asked for.
        cudnn: bytes that cuDNN is assumed to take for the largest convolution; not in any other figure.
        parameters: elements of all parameters.
        trained: elements of the trained ones.
        failure: of the first micro-batch, where it does not fit: `site` and PyTorch's `message`.
        largest: the largest micro-batch that fits, 0 where not even one sample does.
        flops: computed in a sample's step by this run's kernels, activation recomputation included.
    """

    profiles: dict[int, Any]
    figures: dict[int, Figures]
    cudnn: int
    parameters: int
    trained: int
    failure: dict[str, str] | None = None
    largest: int | None = None
    flops: int | None = None


def on_gpu(config: RunConfig) -> RunConfig:
    """The configuration as it would be on a GPU; for xformers' cutlass kernel torch's copy of it is used."""
    changes: dict[str, Any] = {"text": {"cache": 0}}
    if config.model.name == "dit_sam" and config.model.attention in ("auto", "xformers", "sdpa"):
        changes["model"] = {"attention": "sdpa_efficient"}
    return validate(merge(config.model_dump(), changes))
