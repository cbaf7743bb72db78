"""The time of a candidate's step, predicted from FLOPs, bytes and rates. Nothing here is measured.

`scaling` predicts computation and the communication that does not overlap. This module adds, by assumptions that every
report prints (`Assumptions`): the cost of small micro-batches, the attention maps of eager attention and the wider heads
of the other kernels, the optimizer's update, and offload's traffic over PCIe and host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson
from dit_ds.models.sam import SIZES
from dit_ds.planning.communication import ModuleTrace, count_fetches
from dit_ds.planning.flops import Passes
from dit_ds.planning.gpus import BANDWIDTH, known_gpu, require_peak
from dit_ds.planning.scaling import Machine, Work
from dit_ds.planning.scaling import predict as predict_step
from dit_ds.planning.tune.candidates import Candidate

PARTS = (
    "compute", "recompute", "small_micro_batch", "attention_maps", "gradients", "weights", "update", "offload"
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """Assumed rates and costs, beyond the counted FLOPs and bytes.

    Attributes:
        machine: GPU, links, MFU, overlap; see `scaling.Machine`.
        hbm_share: share of the GPU memory's nominal bandwidth that elementwise kernels reach.
        half_tokens: fixed cost of a micro-batch (kernel launches, unfilled waves) in tokens: at this many tokens a
            micro-batch the GPU computes at half of the MFU.
        map_passes: reads and writes of eager attention's (heads, N, keys) map in a forward and in a backward pass.
        update_bytes: read and written by an update for each trained element: master and two moments in fp32 both ways,
            the gradient in bf16 and fp32, the weight.
        pcie_gb_s: GB/s between a GPU and its host, one way; assumed not to overlap with computation.
        host_gb_s: GB/s of a node's memory, which the updates of its ranks share.
        host_update_bytes: as `update_bytes`, for an update on the host.
    """

    machine: Machine = field(default_factory=Machine)
    hbm_share: float = 0.8
    half_tokens: int = 1024
    map_passes: tuple[int, int] = (10, 12)
    update_bytes: int = 36
    pcie_gb_s: float = 25
    host_gb_s: float = 200
    host_update_bytes: int = 32

    @property
    def hbm(self) -> float:
        """Bytes a second of the GPU's memory that elementwise kernels reach."""
        return self._bandwidth * 1e9 * self.hbm_share

    @property
    def _bandwidth(self) -> float:
        """Nominal GB/s of the GPU's memory."""
        return BANDWIDTH[known_gpu(self.machine.gpu) or self.machine.gpu]

    def as_dict(self) -> dict[str, Any]:
        """All values in one flat dictionary, with `hbm_gb_s`, the GPU memory's nominal bandwidth."""
        values = asdict(self)
        return values.pop("machine") | values | {"hbm_gb_s": self._bandwidth}


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs and module order of a run, by policy of activation checkpointing.

    Attributes:
        model_flops: of a sample, without recomputation; see `flops.step_flops`.
        passes: FLOPs of a sample as computed, by policy; see `flops.hardware_flops`.
        traces: of the model, by policy.
    """

    model_flops: int
    passes: dict[str, Passes]
    traces: dict[str, ModuleTrace]

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return next(iter(self.traces.values())).trained_size


@dataclass(frozen=True)
class _Attention:
    """Sizes of a layer's attention.

    Attributes:
        queries, keys: of each window.
        width: of a head.
        folded: width of a head with the relative positions and the padding mask folded in, a multiple of 8.
    """

    windows: int
    queries: int
    keys: int
    heads: int
    width: int
    folded: int


def _layers(config: RunConfig) -> Iterator[_Attention]:
    size, m = SIZES[config.model.size], config.model
    side = config.data.image_size // size.patch_size
    static = m.static_tokens if m.static_form == "concat" else 0
    text = config.data.tokens + static if m.scheme != "default" else 0
    for i in range(size.depth):
        is_global = not m.window_size or i in size.global_layers
        length = side if is_global else m.window_size
        width = size.embed_dim // size.num_heads
        yield _Attention(
            windows=1 if is_global else (-(-side // m.window_size)) ** 2,
            queries=length**2,
            keys=length**2 + text,
            heads=size.num_heads,
            width=width,
            folded=-(-(width + 2 * length + bool(text and m.mask_padding)) // 8) * 8,
        )


class Predictor:
    """Predicts steps of one run on one machine.

    Args:
        ds: the run's DeepSpeed JSON.
        dtype: of the computation.
        counts: of the run, for every policy among the candidates.
    Raises:
        UserError: an impossible assumption, an unknown GPU, or one that doesn't compute in the run's type.
    """

    def __init__(
        self, config: RunConfig, ds: dict[str, Any], dtype: torch.dtype, counts: FlopCounts, assumed: Assumptions
    ):
        self.config, self.ds, self.dtype, self.counts, self.assumed = config, ds, dtype, counts, assumed
        self.rate = require_peak(assumed.machine.gpu, dtype) * assumed.machine.mfu
        self.layers = list(_layers(config))
        side = config.data.image_size // SIZES[config.model.size].patch_size
        self.tokens = side**2 + config.data.tokens

    def step(self, c: Candidate, ranks: int) -> dict[str, Any]:
        """Predict a candidate's step.

        Returns:
            `step_seconds`, `samples_per_second`, `sent_bytes` a GPU, and `parts`, the seconds of each of `PARTS`.
        """
        a = self.assumed
        micro_batches, samples = c.accumulation, c.micro_batch * c.accumulation
        plain, passes = self._passes(c.kernel, "none"), self._passes(c.kernel, c.policy)
        maps = self._map_seconds(c)
        # communication overlaps with these seconds of a pass, too: they enter as FLOPs
        extra = [f / self.rate * a.half_tokens / self.tokens + m * c.micro_batch for f, m in zip(passes, maps)]
        work = Work(
            model_flops=self.counts.model_flops,
            passes=Passes(*(round(f + s * self.rate / c.micro_batch) for f, s in zip(passes, extra))),
            trace=self.counts.traces[c.policy],
            ds=c.deepspeed(self.ds),
            dtype=self.dtype,
            batch=self.config.train.batch_size,
            micro_batch=c.micro_batch,
        )
        sent = predict_step(work, a.machine, ranks // a.machine.gpus_per_node, c.micro_batch, micro_batches)
        parts = {
            "compute": sum(plain) / self.rate * samples,
            "recompute": (sum(passes) - sum(plain)) / self.rate * samples,
            "small_micro_batch": sum(passes) / self.rate * a.half_tokens / self.tokens * micro_batches,
            "attention_maps": sum(maps) * samples,
            "gradients": sent["gradients_seconds"],
            "weights": sent["weights_seconds"],
        } | self._update(c, ranks)
        step = sum(parts.values())
        rate = self.config.train.batch_size / step
        return {"step_seconds": step, "samples_per_second": rate, "parts": parts, "sent_bytes": sent["sent_bytes"]}

    def _passes(self, kernel: str, policy: str) -> Passes:
        """FLOPs of a sample; the counts are of a kernel whose products have the head's width, not the folded one."""
        forward, backward = self.counts.passes[policy]
        if kernel == "eager":  # saves its map, where fused kernels recompute the product of queries and keys
            return Passes(forward, backward - (sum(self.counts.passes["none"]) - self.counts.model_flops))
        # products over the folded width, in a forward and a backward pass
        in_forward, in_backward = (2, 5) if kernel in ("sdpa_flash", "sdpa_cudnn") else (1, 3)
        recomputed = in_forward if policy not in ("none", "selective") else 0
        for x in self.layers:
            product = 2 * x.windows * x.queries * x.keys * x.heads * (x.folded - x.width)
            forward, backward = forward + in_forward * product, backward + (in_backward + recomputed) * product
        return Passes(forward, backward)

    def _map_seconds(self, c: Candidate) -> tuple[float, float]:
        """Seconds a sample, forward and backward, of reading and writing eager attention's maps."""
        if c.kernel != "eager":
            return 0.0, 0.0
        elements = sum(x.windows * x.heads * x.queries * x.keys for x in self.layers)
        forward, backward = self.assumed.map_passes
        recomputed = forward if c.policy != "none" else 0
        one = elements * self.dtype.itemsize / self.assumed.hbm
        return forward * one, (backward + recomputed) * one

    def _update(self, c: Candidate, ranks: int) -> dict[str, float]:
        """Seconds of the optimizer's update and of what offload moves over PCIe."""
        a, element_bytes = self.assumed, self.dtype.itemsize
        partition = self.counts.trained / (ranks if c.stage else 1)
        if not c.offload:
            return {"update": partition * a.update_bytes / a.hbm, "offload": 0.0}
        # gradients go to the host after every micro-batch; updated weights come back once a step or, where parameters
        # stay on the host, a rank's partition of them before every gather
        moved = partition * element_bytes * (c.accumulation + 1)
        if c.stage == 3:
            uploads = self._gathered_elements(c) / ranks
            moved = partition * element_bytes * c.accumulation + uploads * element_bytes * c.accumulation
        update = partition * a.host_update_bytes * a.machine.gpus_per_node / (a.host_gb_s * 1e9)
        return {"update": update, "offload": moved / (a.pcie_gb_s * 1e9)}

    def _gathered_elements(self, c: Candidate) -> int:
        """Elements that stage 3 gathers in a micro-batch."""
        zero, trace = DeepSpeedJson(c.deepspeed(self.ds)).zero, self.counts.traces[c.policy]
        keys = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
        fetches, _ = count_fetches(trace, *(zero[f"stage3_{key}"] for key in keys))
        return sum(trace.sizes[p] * times for (p, _), times in fetches.items())
