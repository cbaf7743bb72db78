"""How long a candidate's step takes: predicted from FLOPs, bytes and rates, none of it measured.

`scaling` gives computation and exposed communication. Here come on top, by assumptions that are printed with every
answer (`Assumptions`): what a small micro-batch costs, the maps of eager attention and the folded heads of the other
kernels, the optimizer's update, and what offload moves over PCIe and through host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson
from dit_ds.errors import UserError
from dit_ds.models.sam import SIZES
from dit_ds.planning.communication import ModuleTrace, fetched
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
    """All that a prediction assumes beyond what is counted.

    Attributes:
        machine: GPU, links, MFU, overlap; see `scaling.Machine`.
        hbm_share: of the GPU memory's bandwidth on paper, what elementwise work reaches.
        half_tokens: each micro-batch takes as long as so many tokens more (launches, unfilled waves): at this many
            tokens a micro-batch the GPU computes at half of the MFU.
        map_passes: how often eager attention goes over its (heads x N x keys) map in a forward and a backward pass.
        update_bytes: a trained element, read and written by an update: master and two moments in fp32 both ways, the
            gradient in bf16 and fp32, the weight.
        pcie_gb_s: between a GPU and its host, one way. Nothing of it is taken to hide.
        host_gb_s: of a node's memory, which the updates of its ranks share.
        host_update_bytes: as `update_bytes`, of an update on the host.
    """

    machine: Machine = field(default_factory=Machine)
    hbm_share: float = 0.8
    half_tokens: int = 1024
    map_passes: tuple[int, int] = (10, 12)
    update_bytes: int = 36
    pcie_gb_s: float = 25
    host_gb_s: float = 200
    host_update_bytes: int = 32

    def check(self) -> None:
        """Raise a `UserError` where a value is impossible."""
        self.machine.check()
        for option, value in {"pcie": self.pcie_gb_s, "host-bandwidth": self.host_gb_s}.items():
            if not 0 < value < float("inf"):
                raise UserError(f"--{option} is {value}: it must be above 0")
        if self.half_tokens < 0:
            raise UserError(f"--half-tokens is {self.half_tokens}: it can't be negative")

    @property
    def hbm(self) -> float:
        """Bytes a second."""
        return BANDWIDTH[known_gpu(self.machine.gpu)] * 1e9 * self.hbm_share

    def as_dict(self) -> dict[str, Any]:
        """Flat, for the output."""
        values = asdict(self)
        return values.pop("machine") | values | {"hbm_gb_s": BANDWIDTH[known_gpu(self.machine.gpu)]}


@dataclass(frozen=True)
class FlopCounts:
    """What the run asks of a GPU, by activation checkpointing.

    Attributes:
        model_flops: of a sample, nothing computed twice.
        passes: of a sample, as computed, by policy.
        shapes: the modules' order, by policy.
    """

    model_flops: int
    passes: dict[str, Passes]
    shapes: dict[str, ModuleTrace]

    @property
    def trained(self) -> int:
        """Parameters."""
        shape = next(iter(self.shapes.values()))
        return sum(size for size, t in zip(shape.sizes, shape.trained) if t)


@dataclass(frozen=True)
class _Attention:
    """A layer's: windows, queries and keys of each, heads, their width, and the width when positions are folded in."""

    windows: int
    queries: int
    keys: int
    heads: int
    width: int
    folded: int


def _layers(config: RunConfig) -> Iterator[_Attention]:
    size, m = SIZES[config.model.size], config.model
    side = config.data.image_size // size.patch_size
    beside = m.static_tokens if m.static_form == "concat" else 0
    words = config.data.tokens + beside if m.scheme != "default" else 0
    for i in range(size.depth):
        whole = not m.window_size or i in size.global_layers
        length = side if whole else m.window_size
        windows = 1 if whole else (-(-side // m.window_size)) ** 2
        width = size.embed_dim // size.num_heads
        folded = -(-(width + 2 * length + bool(words and m.mask_padding)) // 8) * 8
        yield _Attention(windows, length**2, length**2 + words, size.num_heads, width, folded)


class Predictor:
    """Predicts steps of one run on one machine.

    Args:
        ds: the run's DeepSpeed JSON.
    Raises:
        UserError: an impossible assumption, an unknown GPU, or one that doesn't compute in the run's type.
    """

    def __init__(self, config: RunConfig, ds: dict[str, Any], dtype: Any, counted: FlopCounts, assumed: Assumptions):
        assumed.check()
        self.config, self.ds, self.dtype, self.counted, self.assumed = config, ds, dtype, counted, assumed
        self.rate = require_peak(assumed.machine.gpu, dtype) * assumed.machine.mfu
        self.layers = list(_layers(config))
        side = config.data.image_size // SIZES[config.model.size].patch_size
        self.tokens = side**2 + config.data.tokens

    def step(self, c: Candidate, ranks: int) -> dict[str, Any]:
        """`step_seconds` and `samples_per_second` of a candidate, and the seconds of each of `PARTS`."""
        a = self.assumed
        micro_batches, samples = c.accumulation, c.micro_batch * c.accumulation
        plain, passes = self._passes(c.kernel, "none"), self._passes(c.kernel, c.policy)
        # each pass's own share of what depends on the micro-batch, so that communication hides under all of it
        maps = self._map_seconds(c)
        extra = [f / self.rate * a.half_tokens / self.tokens + m * c.micro_batch for f, m in zip(passes, maps)]
        as_flops = Passes(*(round(f + s * self.rate / c.micro_batch) for f, s in zip(passes, extra)))
        work = Work(self.counted.model_flops, as_flops, self.counted.shapes[c.policy], c.deepspeed(self.ds),
                    self.dtype, self.config.train.batch_size, c.micro_batch)  # fmt: skip
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
        """FLOPs of a sample; the counted ones are of a kernel that multiplies at the head's own width."""
        forward, backward = self.counted.passes[policy]
        if kernel == "eager":  # which keeps its map, where kernels multiply queries and keys again
            return Passes(forward, backward - (sum(self.counted.passes["none"]) - self.counted.model_flops))
        more_forward = more_backward = 0
        for x in self.layers:
            each = 2 * x.windows * x.queries * x.keys * x.heads * (x.folded - x.width)
            wide = (2, 5) if kernel in ("sdpa_flash", "sdpa_cudnn") else (1, 3)  # products over the folded width
            again = wide[0] if policy not in ("none", "selective") else 0
            more_forward, more_backward = more_forward + wide[0] * each, more_backward + (wide[1] + again) * each
        return Passes(forward + more_forward, backward + more_backward)

    def _map_seconds(self, c: Candidate) -> tuple[float, float]:
        """Of a sample, forward and backward: eager attention's maps through the GPU's memory."""
        if c.kernel != "eager":
            return 0.0, 0.0
        elements = sum(x.windows * x.heads * x.queries * x.keys for x in self.layers)
        forward, backward = self.assumed.map_passes
        again = forward if c.policy != "none" else 0
        one = elements * self.dtype.itemsize / self.assumed.hbm
        return forward * one, (backward + again) * one

    def _update(self, c: Candidate, ranks: int) -> dict[str, float]:
        a, of_type = self.assumed, self.dtype.itemsize
        mine = self.counted.trained / (ranks if c.stage else 1)
        if not c.offload:
            return {"update": mine * a.update_bytes / a.hbm, "offload": 0.0}
        # gradients go down after every micro-batch, updated weights up once a step, or, where parameters stay on the
        # host, a rank's part of them before every gather
        moved = mine * of_type * (c.accumulation + 1)
        if c.stage == 3:
            moved = mine * of_type * c.accumulation + self._uploads(c) / ranks * of_type * c.accumulation
        update = mine * a.host_update_bytes * a.machine.gpus_per_node / (a.host_gb_s * 1e9)
        return {"update": update, "offload": moved / (a.pcie_gb_s * 1e9)}

    def _uploads(self, c: Candidate) -> int:
        """Elements that stage 3 gathers in a micro-batch."""
        zero, shape = DeepSpeedJson(c.deepspeed(self.ds)).zero, self.counted.shapes[c.policy]
        keys = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
        fetches, _ = fetched(shape, *(zero[f"stage3_{key}"] for key in keys))
        return sum(shape.sizes[p] * times for (p, _), times in fetches.items())
