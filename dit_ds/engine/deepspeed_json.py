"""The DeepSpeed JSON that a run names, completed with what the run's YAML determines, and a typed view of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from dit_ds.config.load import merge
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import exact_split
from dit_ds.errors import UserError
from dit_ds.files import read_json

# keys of DeepSpeed's that the run's YAML determines, and the keys there
_SET_BY_RUN = {
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (it follows from the world size and the micro-batch)",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
}


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DeepSpeedJson:
    """A typed view of DeepSpeed's JSON, with DeepSpeed's defaults for keys that are absent.

    Attributes:
        raw: the JSON itself, which goes to DeepSpeed.
    """

    raw: dict[str, Any]

    @property
    def zero(self) -> dict[str, Any]:
        """`zero_optimization`."""
        return self.raw.get("zero_optimization", {})

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.zero.get("stage", 0)

    @property
    def offload_optimizer(self) -> bool:
        """Whether the JSON has optimizer states in host memory."""
        return "offload_optimizer" in self.zero

    @property
    def offload_param(self) -> bool:
        """Whether the JSON has ZeRO-3's parameters in host memory."""
        return "offload_param" in self.zero

    @property
    def precision(self) -> str:
        """The model's type: bf16, fp16 or fp32."""
        return next((kind for kind in ("bf16", "fp16") if self.raw.get(kind, {}).get("enabled")), "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, to which DeepSpeed casts it; in bf16 and fp16 it keeps fp32 master weights, too."""
        return _DTYPES[self.precision]

    @property
    def grad_accum_dtype(self) -> str:
        """The type in which gradients are accumulated: bf16, fp16 or fp32."""
        return self.raw.get("data_types", {}).get("grad_accum_dtype") or self.precision

    @property
    def communication_data_type(self) -> str:
        """The type in which gradients are reduced between ranks."""
        return self.raw.get("communication_data_type") or self.precision

    @property
    def micro_batch(self) -> int:
        """`train_micro_batch_size_per_gpu`."""
        return self.raw.get("train_micro_batch_size_per_gpu", 1)

    @property
    def accumulation(self) -> int:
        """`gradient_accumulation_steps`."""
        return self.raw.get("gradient_accumulation_steps", 1)


def read_deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """The JSON that the run names, with its overrides; the micro-batch and the types of gradients are made explicit.

    Raises:
        UserError: a missing or malformed file, a key that the run's YAML determines, settings that don't go together.
    """
    path = config.deepspeed.config
    ds = merge(read_json(path, "DeepSpeed configuration"), config.deepspeed.override)
    for key in _SET_BY_RUN:
        if key in ds:
            raise UserError(f"{path} sets '{key}', which the run owns: remove it there and set {_SET_BY_RUN[key]}")
    micro = ds.get("train_micro_batch_size_per_gpu", 1)
    if not isinstance(micro, int) or micro < 1:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is {micro!r}, it must be a whole number from 1")
    ds["train_micro_batch_size_per_gpu"] = micro
    if config.deepspeed.precision:
        ds |= {kind: ds.get(kind, {}) | {"enabled": kind == config.deepspeed.precision} for kind in ("bf16", "fp16")}
    if all(ds.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise UserError(f"{path} enables bf16 and fp16: use one, as by --deepspeed.precision fp16")
    view = DeepSpeedJson(ds)
    if view.stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {view.stage!r}, it must be 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (view.zero.get(key) or {}).get("device") == "nvme":
            raise UserError(f"{path}: zero_optimization.{key}.device is nvme, which is not supported: set it to cpu")
    # explicit where the JSON leaves it open: the types in which gradients are reduced and accumulated
    ds.setdefault("communication_data_type", view.precision)
    ds["data_types"] = {"grad_accum_dtype": view.precision} | ds.get("data_types", {})
    accumulated = ds["data_types"]["grad_accum_dtype"]
    if accumulated != view.precision and view.stage == 0:
        raise UserError(
            f"DeepSpeed adds up {accumulated} gradients of a {view.precision} model at ZeRO stages 1 to 3 only: use one"
        )
    ds.setdefault(
        "zero_force_ds_cpu_optimizer", False
    )  # torch's fused Adam runs on CPUs, too, without compiling an operator
    return ds


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that the run names, with its overrides, as DeepSpeed takes it on so many ranks.

    Where the global batch has fewer micro-batches than there are ranks, the micro-batch shrinks to a rank's samples, so
    that the same run goes on more nodes.

    Raises:
        UserError: as `read_deepspeed_json`; a batch that doesn't divide.
    """
    ds = read_deepspeed_json(config)
    split = exact_split(config.train.batch_size, world_size, DeepSpeedJson(ds).micro_batch)
    ds["train_micro_batch_size_per_gpu"] = split.micro_batch
    ds["train_batch_size"] = split.batch
    ds["gradient_accumulation_steps"] = split.accumulation
    ds["gradient_clipping"] = config.train.gradient_clipping
    ds["steps_per_print"] = sys.maxsize  # the training loop logs instead
    return ds
