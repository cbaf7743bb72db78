"""The search space: ZeRO stage and offload, micro-batch, activation checkpointing, bucket size, attention kernel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import every_split
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config, optimizer_refusal
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.models.sam import SIZES

POLICIES = ("none", "selective", "every_2", "block")
# auto: xformers' kernel or SDPA's memory-efficient one, which take the same memory
KERNELS = ("auto", "sdpa_flash", "eager")
BUCKETS = (25_000_000, 100_000_000)  # elements; the smaller as in configs/deepspeed
_WITHOUT_FLASH = ("V100", "V100 PCIe", "T4")  # GPUs that FlashAttention 2 does not support
_MAX_FLASH_WIDTH = 256  # of a head, in FlashAttention 2


@dataclass(frozen=True)
class Candidate:
    """One value of each dimension of the search space.

    Attributes:
        setting: ZeRO stage and offload, a key of `zero_presets.SETTINGS`.
        micro_batch: samples of a rank at once.
        accumulation: micro-batches of a rank in a step.
        policy: `train.activation_checkpointing`.
        kernel: `model.attention`.
        bucket: elements of `reduce_bucket_size`; 0 at stage 0, which has none.
    """

    setting: str
    micro_batch: int
    accumulation: int
    policy: str
    kernel: str
    bucket: int

    @property
    def name(self) -> str:
        """A unique name, usable as a folder's."""
        parts = [self.setting, f"mb{self.micro_batch}", self.policy]
        parts += [self.kernel] if self.kernel != "auto" else []
        parts += [f"bucket{self.bucket // 1_000_000}M"] if self.bucket not in (0, BUCKETS[0]) else []
        return "-".join(parts)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return SETTINGS[self.setting]["stage"]

    @property
    def offload(self) -> bool:
        """Whether optimizer states are in host memory."""
        return "offload_optimizer" in SETTINGS[self.setting]

    def choices(self) -> dict[str, Any]:
        """The values by dimension, without accumulation, which follows from the micro-batch."""
        return {k: v for k, v in asdict(self).items() if k != "accumulation"}

    def deepspeed(self, ds: dict[str, Any]) -> dict[str, Any]:
        """The run's DeepSpeed JSON with its micro-batch and `zero_optimization` replaced by the candidate's."""
        zero = dict(SETTINGS[self.setting])
        if self.bucket:
            zero["reduce_bucket_size"] = self.bucket
        return ds | {"train_micro_batch_size_per_gpu": self.micro_batch, "zero_optimization": zero}

    def applied(self, config: RunConfig, json_path: str) -> RunConfig:
        """The run's configuration with the candidate's settings.

        Args:
            json_path: of the candidate's DeepSpeed JSON, as the file that names it has it; it replaces the run's JSON and overrides.
        """
        changes: dict[str, Any] = {"train": {"activation_checkpointing": self.policy}}
        if self.kernel != "auto":
            changes["model"] = {"attention": self.kernel}
        changes["deepspeed"] = {"config": json_path, "precision": None}
        values = merge(config.model_dump(), changes)
        values["deepspeed"]["override"] = {}
        return validate(values)


def candidates(config: RunConfig, ds: dict[str, Any], ranks: int, gpu: str = "") -> list[Candidate]:
    """All candidates of a run.

    Args:
        ds: the run's DeepSpeed JSON.
        ranks: the global batch is divided by.
        gpu: a key of `gpus.PEAKS`; kernels that it does not support are left out.
    Raises:
        UserError: the ranks do not divide the global batch.
    """
    deepspeed_config(_with_micro_batch(config, 1), ranks)  # raises where the ranks do not divide the batch
    policies = dict.fromkeys((*POLICIES, config.train.activation_checkpointing))
    # stage 0 accumulates gradients in the model's type only
    other_type = DeepSpeedJson(ds).grad_accum_dtype != DeepSpeedJson(ds).precision
    found = []
    for setting, zero in SETTINGS.items():
        if other_type and not zero["stage"]:
            continue
        if optimizer_refusal(config.train, DeepSpeedJson(ds | {"zero_optimization": zero})):
            continue
        # one rank sends nothing: larger buckets would only take memory
        buckets = BUCKETS if zero["stage"] and ranks > 1 else BUCKETS[: bool(zero["stage"])] or (0,)
        for split in every_split(config.train.batch_size, ranks):
            for policy in policies:
                for kernel in _kernels(config, ds, gpu, policy):
                    found += [
                        Candidate(
                            setting=setting,
                            micro_batch=split.micro_batch,
                            accumulation=split.accumulation,
                            policy=policy,
                            kernel=kernel,
                            bucket=bucket,
                        )
                        for bucket in buckets
                    ]
    return found


def _with_micro_batch(config: RunConfig, micro_batch: int) -> RunConfig:
    override = config.deepspeed.override | {"train_micro_batch_size_per_gpu": micro_batch}
    return config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"override": override})})


def _kernels(config: RunConfig, ds: dict[str, Any], gpu: str, policy: str) -> list[str]:
    if config.model.attention != "auto":  # the run names one
        return [config.model.attention]
    size = SIZES[config.model.size]
    # of a head with the relative positions and the padding mask folded in
    width = size.embed_dim // size.num_heads + 2 * (config.data.image_size // size.patch_size) + 1
    flash = DeepSpeedJson(ds).dtype != torch.float32 and gpu not in _WITHOUT_FLASH and width <= _MAX_FLASH_WIDTH
    # selective checkpointing saves the outputs of fused kernels, which eager attention does not use
    return [k for k in KERNELS if (k != "sdpa_flash" or flash) and (k != "eager" or policy != "selective")]


def configured_candidate(config: RunConfig, ds: dict[str, Any], among: list[Candidate]) -> Candidate | None:
    """The candidate that equals the run's present settings; None if there is none."""
    zero = DeepSpeedJson(ds).zero
    for c in among:
        # as the engine does, a micro-batch larger than a rank's share of the batch shrinks to it
        micro_batch = min(DeepSpeedJson(ds).micro_batch, c.micro_batch * c.accumulation)
        same = c.deepspeed(ds)["zero_optimization"] == (zero or {"stage": 0}) and c.micro_batch == micro_batch
        if same and (c.policy, c.kernel) == (config.train.activation_checkpointing, config.model.attention):
            return c
    return None
