"""The DeepSpeed JSON that a run names, completed by what the run owns."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dit_ds.config.load import merge
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import _what_divides
from dit_ds.errors import UserError
from dit_ds.files import read_json

# what the run's YAML owns, and the key there
_OWNED = {
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (it follows from the world size and the micro-batch)",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
}


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """The JSON that the run names with its overrides; micro-batch and types are in it.

    Raises:
        UserError: a missing or malformed file, a key that the run owns.
    """
    path = config.deepspeed.config
    ds = merge(read_json(path, "DeepSpeed configuration"), config.deepspeed.override)
    for key in _OWNED:
        if key in ds:
            raise UserError(f"{path} sets '{key}', which the run owns: remove it there and set {_OWNED[key]}")
    micro = ds.get("train_micro_batch_size_per_gpu", 1)
    if not isinstance(micro, int) or micro < 1:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is {micro!r}, it must be a whole number from 1")
    ds["train_micro_batch_size_per_gpu"] = micro
    if config.deepspeed.precision:
        ds |= {kind: ds.get(kind, {}) | {"enabled": kind == config.deepspeed.precision} for kind in ("bf16", "fp16")}
    if all(ds.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise UserError(f"{path} enables bf16 and fp16: use one, as by --deepspeed.precision fp16")
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, it must be 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (ds.get("zero_optimization", {}).get(key) or {}).get("device") == "nvme":
            raise UserError(f"{path}: zero_optimization.{key}.device is nvme, which is not supported: set it to cpu")
    # said, where the JSON leaves it open: in what type gradients are added up, between micro-batches and between ranks
    name = next(k for k, v in _PRECISIONS.items() if v == model_dtype(ds))
    ds.setdefault("communication_data_type", name)
    ds["data_types"] = {"grad_accum_dtype": name} | ds.get("data_types", {})
    accumulated = ds["data_types"]["grad_accum_dtype"]
    if accumulated != name and not ds.get("zero_optimization", {}).get("stage", 0):
        raise UserError(
            f"DeepSpeed adds up {accumulated} gradients of a {name} model at ZeRO stages 1 to 3 only: use one"
        )
    ds.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused Adam runs on CPUs, and compiles nothing
    return ds


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that the run names with its overrides, completed by what the run owns.

    Where there are more ranks than micro-batches in the global batch, the micro-batch shrinks to a rank's share, so that
    the same run goes on more nodes.

    Raises:
        UserError: a missing or malformed file, a key that the run owns, a batch that doesn't divide.
    """
    ds = read_deepspeed_json(config)
    micro = ds["train_micro_batch_size_per_gpu"]
    batch = config.train.batch_size
    if micro * world_size > batch and batch % world_size == 0:
        micro = ds["train_micro_batch_size_per_gpu"] = batch // world_size
    if batch % (micro * world_size):
        raise UserError(_what_divides(batch, micro, world_size))
    ds["train_batch_size"] = batch
    ds["gradient_accumulation_steps"] = batch // (micro * world_size)
    ds["gradient_clipping"] = config.train.gradient_clipping
    ds["steps_per_print"] = sys.maxsize  # train.py reports
    return ds


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The type that DeepSpeed turns the model into; fp32 masters are kept beside the shorter ones."""
    return _PRECISIONS[model_precision(ds_config)]


def model_precision(ds_config: dict[str, Any]) -> str:
    """bf16, fp16 or fp32."""
    return next((kind for kind in ("bf16", "fp16") if ds_config.get(kind, {}).get("enabled")), "fp32")
