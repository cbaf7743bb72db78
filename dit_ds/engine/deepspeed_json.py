"""The DeepSpeed JSON that a run names, completed with what the run's YAML determines, and a typed view of it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import torch

from dit_ds.config.installed_files import find_file
from dit_ds.config.load import merge
from dit_ds.config.schema import RunConfig
from dit_ds.config.train_schema import TrainConfig
from dit_ds.engine.batch_split import exact_split
from dit_ds.engine.deepspeed_schema import as_deepspeed_reads, refuse_as_deepspeed, without_what_the_run_sets
from dit_ds.errors import UserError
from dit_ds.files import read_json

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
        return self._offloads("offload_optimizer")

    @property
    def offload_param(self) -> bool:
        """Whether the JSON has ZeRO-3's parameters in host memory."""
        return self._offloads("offload_param")

    def _offloads(self, key: str) -> bool:
        return self.zero.get(key, {}).get("device", "none") != "none"

    @property
    def precision(self) -> str:
        """The model's type: bf16, fp16 or fp32."""
        return next((kind for kind in ("bf16", "fp16") if self.raw.get(kind, {}).get("enabled")), "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, to which DeepSpeed casts it; in bf16 and fp16 it keeps fp32 master weights, too."""
        return _DTYPES[self.precision]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of matrix products: under `torch_autocast` its own, else the model's."""
        autocast = self.raw.get("torch_autocast", {})
        if not autocast.get("enabled"):
            return self.dtype
        return torch.float16 if autocast.get("dtype") in ("float16", "fp16") else torch.bfloat16

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
    name = config.deepspeed.config
    found = read_json(find_file(name, ".json"), "DeepSpeed configuration", unique_keys=True)
    try:
        if not isinstance(found, dict):
            raise UserError("it must hold keys and values, as configs/deepspeed/zero2.json does")
        ds = without_what_the_run_sets(merge(found, config.deepspeed.override))
        if config.deepspeed.precision:
            _set_precision(ds, config.deepspeed.precision)
        ds = as_deepspeed_reads(ds)
        ds.setdefault("train_micro_batch_size_per_gpu", 1)
        _check(DeepSpeedJson(ds))
        if why := optimizer_refusal(config.train, DeepSpeedJson(ds)):
            raise UserError(why)
        refuse_as_deepspeed(ds)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    # explicit where the JSON leaves it open: the types in which gradients are reduced and accumulated
    ds.setdefault("communication_data_type", DeepSpeedJson(ds).precision)
    ds["data_types"] = {"grad_accum_dtype": DeepSpeedJson(ds).grad_accum_dtype}
    ds.setdefault(
        "zero_force_ds_cpu_optimizer", False
    )  # torch's fused Adam runs on CPUs, too, without compiling an operator
    if config.train.optimizer == "adamw_8bit":  # which DeepSpeed does not know
        ds["zero_allow_untested_optimizer"] = True
    return ds


def _set_precision(ds: dict[str, Any], precision: str) -> None:
    for kind in ("bf16", "fp16"):
        section = ds.get(kind, {})
        if isinstance(section, dict):  # what else it may be is refused afterwards
            ds[kind] = section | {"enabled": kind == precision}


def _check(ds: DeepSpeedJson) -> None:
    """Refuse settings that don't go together, or not here."""
    if all(ds.raw.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        raise UserError("it enables bf16 and fp16: use one, as by --deepspeed.precision fp16")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = ds.zero.get(key, {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"zero_optimization.{key}.device is nvme, which is not supported: set it to cpu")
        if device != "none" and ds.stage not in stages:
            raise UserError(
                f"zero_optimization.{key} has no effect at stage {ds.stage}: remove it, or set stage {stages[-1]}"
            )
    if ds.grad_accum_dtype != ds.precision and ds.stage == 0:
        raise UserError(
            f"DeepSpeed adds up {ds.grad_accum_dtype} gradients of a {ds.precision} model at ZeRO stages 1 to 3 only: "
            "use one"
        )


def optimizer_refusal(t: TrainConfig, ds: DeepSpeedJson) -> str | None:
    """Why the run's optimizer can't go with DeepSpeed's settings, and what to do; None where it can."""
    if t.optimizer == "adamw":
        return None
    if ds.offload_optimizer or ds.offload_param:
        return f"train.optimizer {t.optimizer} does not go with offload: remove offload_optimizer and offload_param"
    if t.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            return "train.optimizer adamw_8bit needs bitsandbytes: pip install 'dit-ds[8bit]'"
        return None
    if ds.stage not in (1, 2):
        return f"train.optimizer muon goes with ZeRO stages 1 and 2, not {ds.stage}: use zero2"
    if ds.precision == "fp16":
        return "train.optimizer muon does not go with fp16, whose loss scale its momentum would hold: set bf16 or fp32"
    if t.gradient_clipping:
        return (
            "train.gradient_clipping would clip Muon's updates, as DeepSpeed computes them before the norm: set "
            "train.gradient_clipping 0"
        )
    if ds.zero.get("round_robin_gradients"):
        return "train.optimizer muon does not go with zero_optimization.round_robin_gradients: remove it"
    if ds.stage == 1 and ds.precision == "bf16" and ds.grad_accum_dtype == "fp32":
        return "train.optimizer muon at stage 1 does not go with gradients added up in fp32: use stage 2"
    return None


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
