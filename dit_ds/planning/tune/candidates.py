"""What is chosen between: ZeRO stage and offload, micro-batch, activation checkpointing, buckets, attention kernel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import every_split
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.models.sam import SIZES

POLICIES = ("none", "selective", "every_2", "block")
KERNELS = ("auto", "sdpa_flash", "eager")  # auto: xformers or SDPA's memory-efficient kernel, which are one in memory
BUCKETS = (25_000_000, 100_000_000)  # elements; the smaller is configs/deepspeed's
_OLD_GPUS = ("V100", "V100 PCIe", "T4")  # for which there is no FlashAttention 2
_WIDEST = 256  # head of FlashAttention 2


@dataclass(frozen=True)
class Candidate:
    """One choice of everything.

    Attributes:
        setting: a key of `SETTINGS`.
        micro_batch, accumulation: samples a rank takes at once, and how often in a step.
        policy: `train.activation_checkpointing`.
        kernel: `model.attention`.
        bucket: elements of `reduce_bucket_size`; 0 where the stage has none.
    """

    setting: str
    micro_batch: int
    accumulation: int
    policy: str
    kernel: str
    bucket: int

    @property
    def name(self) -> str:
        """A name that can be a folder's."""
        words = [self.setting, f"mb{self.micro_batch}", self.policy]
        words += [self.kernel] if self.kernel != "auto" else []
        words += [f"bucket{self.bucket // 1_000_000}M"] if self.bucket not in (0, BUCKETS[0]) else []
        return "-".join(words)

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return SETTINGS[self.setting]["stage"]

    @property
    def offload(self) -> bool:
        """Whether optimizer states lie in host memory."""
        return "offload_optimizer" in SETTINGS[self.setting]

    def choices(self) -> dict[str, Any]:
        """What was chosen, by dimension; accumulation follows from the micro-batch."""
        return {k: v for k, v in asdict(self).items() if k != "accumulation"}

    def deepspeed(self, ds: dict[str, Any]) -> dict[str, Any]:
        """The run's DeepSpeed JSON with this choice in place of its own."""
        zero = dict(SETTINGS[self.setting])
        if self.bucket:
            zero["reduce_bucket_size"] = self.bucket
        return ds | {"train_micro_batch_size_per_gpu": self.micro_batch, "zero_optimization": zero}

    def applied(self, config: RunConfig, json_path: str) -> RunConfig:
        """The run as it would be, with this candidate's JSON at the path."""
        changes: dict[str, Any] = {"train": {"activation_checkpointing": self.policy}}
        if self.kernel != "auto":
            changes["model"] = {"attention": self.kernel}
        changes["deepspeed"] = {"config": json_path, "precision": None}
        values = merge(config.model_dump(), changes)
        values["deepspeed"]["override"] = {}
        return validate(values)


def candidates(config: RunConfig, ds: dict[str, Any], ranks: int, gpu: str = "") -> list[Candidate]:
    """All choices that this run could make on so many ranks.

    Args:
        ds: the run's DeepSpeed JSON.
        gpu: a key of `flops.PEAKS`; kernels it does not have are left out.
    Raises:
        UserError: the global batch does not divide.
    """
    # refuses what does not divide
    deepspeed_config(_with_micro_batch(config, 1), ranks)
    policies = dict.fromkeys((*POLICIES, config.train.activation_checkpointing))
    # stage 0 adds gradients up in the model's type only
    other_type = DeepSpeedJson(ds).grad_accum_dtype != DeepSpeedJson(ds).precision
    found = []
    for setting, zero in SETTINGS.items():
        if other_type and not zero["stage"]:
            continue
        # with one rank nothing is sent, so that larger buckets would only take room
        buckets = BUCKETS if zero["stage"] and ranks > 1 else BUCKETS[: bool(zero["stage"])] or (0,)
        for split in every_split(config.train.batch_size, ranks):
            for policy in policies:
                for kernel in _kernels(config, ds, gpu, policy):
                    found += [
                        Candidate(setting, split.micro_batch, split.accumulation, policy, kernel, b) for b in buckets
                    ]
    return found


def _with_micro_batch(config: RunConfig, micro_batch: int) -> RunConfig:
    override = config.deepspeed.override | {"train_micro_batch_size_per_gpu": micro_batch}
    return config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"override": override})})


def _kernels(config: RunConfig, ds: dict[str, Any], gpu: str, policy: str) -> list[str]:
    if config.model.attention != "auto":  # asked for by name
        return [config.model.attention]
    size = SIZES[config.model.size]
    width = size.embed_dim // size.num_heads + 2 * (config.data.image_size // size.patch_size) + 1
    flash = DeepSpeedJson(ds).dtype != torch.float32 and gpu not in _OLD_GPUS and width <= _WIDEST
    # selective keeps what the kernels return, and eager is none of them
    return [k for k in KERNELS if (k != "sdpa_flash" or flash) and (k != "eager" or policy != "selective")]


def configured_candidate(config: RunConfig, ds: dict[str, Any], among: list[Candidate]) -> Candidate | None:
    """The candidate that is what the configuration says now, if one is."""
    zero = DeepSpeedJson(ds).zero
    for c in among:
        mine = c.deepspeed(ds)
        # a micro-batch larger than a rank's share shrinks to it
        share = c.micro_batch * c.accumulation
        micro_batch = min(DeepSpeedJson(ds).micro_batch, share)
        same = mine["zero_optimization"] == (zero or {"stage": 0}) and c.micro_batch == micro_batch
        if same and (c.policy, c.kernel) == (config.train.activation_checkpointing, config.model.attention):
            return c
    return None
