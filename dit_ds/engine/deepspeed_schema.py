"""What DeepSpeed's JSON may hold in a run, and how DeepSpeed reads it.

DeepSpeed passes over unknown keys at the top level, drops `"auto"`, and reads single values unchecked, so that a misspelt
key or `"no"` for false would have no effect, or the contrary one. Here each key is known, sections are read by DeepSpeed's
own pydantic models, and what they read goes on: there is one reading.
"""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dit_ds.config.suggestions import did_you_mean
from dit_ds.engine.import_deepspeed import import_deepspeed
from dit_ds.errors import UserError

# keys of DeepSpeed's that the run's YAML determines, and the keys there
_SET_BY_RUN = {
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (it follows from the world size and the micro-batch)",
    "optimizer": "train.optimizer, train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "the section checkpoint",
    "dataloader_drop_last": "the section data",
    "data_efficiency": "the section data",
}

# others that DeepSpeed knows, or knew, which would be without effect or wrong here
_NOT_USED = frozenset(
    "aio allgather_size amp autotuning bfloat16 compression_training curriculum_learning datastates_ckpt eigenvalue elasticity "
    "expert_parallel graph_harvesting hybrid_engine managed_gradient_accumulation nebula pipeline progressive_layer_drop "
    "quantize_training seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients "
    "tensor_parallel use_data_before_expert_parallelism vocabulary_size weight_quantization".split()
)
_INSTEAD = {"amp": "set bf16 or fp16", "bfloat16": "rename it to bf16"}

# sections that the run needs as they are by default: key, value, why
_FIXED = {
    "zero_optimization": ("compute_grad_norm", True, "the training loop reads the gradient's norm"),
    "bf16": ("check_grad_overflow", True, "a step whose gradient is not finite is left out (train.on_nonfinite)"),
}

MONITORS = {"wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}  # section: the package that it needs

_Type = Literal["bf16", "fp16", "fp32"]


class _Strict(BaseModel):
    """A part of the JSON for which DeepSpeed has no model: it takes these values as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _DataTypes(_Strict):
    grad_accum_dtype: _Type | None = None


class _TorchAutocast(_Strict):
    enabled: bool = False
    dtype: Literal["bfloat16", "float16", "bf16", "fp16"] = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


class _FlopsProfiler(_Strict):
    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    profile_step: Annotated[int, Field(ge=0)] = 1
    module_depth: int = -1
    top_modules: Annotated[int, Field(ge=1)] = 1
    detailed: bool = True
    output_file: str | None = None


class _Throughput(_Strict):
    enabled: bool = True
    synchronized: bool = True


class _Timers(_Strict):
    throughput: _Throughput = Field(default_factory=_Throughput)


class _Json(_Strict):
    """The whole; sections in `_deepspeeds_models` are read by those."""

    train_micro_batch_size_per_gpu: Annotated[int, Field(ge=1)] = 1
    zero_optimization: dict[str, Any] = Field(default_factory=dict)
    bf16: dict[str, Any] = Field(default_factory=dict)
    fp16: dict[str, Any] = Field(default_factory=dict)
    data_types: _DataTypes = Field(default_factory=_DataTypes)
    communication_data_type: _Type | None = None
    torch_autocast: _TorchAutocast = Field(default_factory=_TorchAutocast)
    gradient_allreduce_op: Literal["mean"] = "mean"  # DeepSpeed's "sum" would scale the gradient with the ranks
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    disable_allgather: bool = False
    disable_python_gc: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = False
    wandb: dict[str, Any] = Field(default_factory=dict)
    comet: dict[str, Any] = Field(default_factory=dict)
    csv_monitor: dict[str, Any] = Field(default_factory=dict)
    comms_logger: dict[str, Any] = Field(default_factory=dict)
    flops_profiler: _FlopsProfiler = Field(default_factory=_FlopsProfiler)
    timers: _Timers = Field(default_factory=_Timers)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None


def _deepspeeds_models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own model of each section that has one."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "csv_monitor": CSVConfig,
        "comms_logger": CommsLoggerConfig,
    }


def without_what_the_run_sets(ds: dict[str, Any]) -> dict[str, Any]:
    """The JSON without the run's keys where they are `"auto"`, which asks the run to set them.

    Raises:
        UserError: the JSON sets one of those keys, or one that has no use here, or that does not exist.
    """
    options = [*_Json.model_fields, *_SET_BY_RUN, *_NOT_USED]
    for key, value in ds.items():
        if key in _SET_BY_RUN and value != "auto":
            raise UserError(f"it sets '{key}', which the run owns: remove it there and set {_SET_BY_RUN[key]}")
        if key in _NOT_USED:
            raise UserError(f"it sets '{key}', which is not used here: {_INSTEAD.get(key, 'remove it')}")
        if key not in options:
            near = did_you_mean(str(key), options) or ": see configs/deepspeed/README.md"
            raise UserError(f"unknown key '{key}'{near}")
    return {k: v for k, v in ds.items() if k not in _SET_BY_RUN}


def as_deepspeed_reads(ds: dict[str, Any]) -> dict[str, Any]:
    """The same JSON in the types that DeepSpeed's own models read from it, without nulls.

    Raises:
        UserError: `"auto"`, a value that DeepSpeed does not take, an unknown or deprecated key in a section.
    """
    for key, value in _values(ds):
        if isinstance(value, str) and value == "auto":
            raise UserError(f"{key} is 'auto', which nothing here would replace: remove it, or set a value")
    read = _read(_Json, ds, "")
    for name, model in _deepspeeds_models().items():
        if name in read:
            read[name] = _read(model, read[name], f"{name}.")
            key, needed, why = _FIXED.get(name, ("", None, ""))
            if read[name].get(key, needed) != needed:
                raise UserError(f"{name}.{key} is {read[name][key]!r}, but {why}: remove it")
    return read


def refuse_as_deepspeed(ds: dict[str, Any]) -> None:
    """Let DeepSpeed read the whole, which checks what single sections can't.

    Raises:
        UserError: in DeepSpeed's words.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(dict(ds))
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as e:
        raise UserError(f"DeepSpeed refuses it: {e}") from None


def require_monitors(ds: dict[str, Any]) -> None:
    """See that the packages of the enabled monitors are installed.

    Raises:
        UserError: names the one that is not.
    """
    for monitor, package in MONITORS.items():
        if package and ds.get(monitor, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(f"the DeepSpeed JSON enables {monitor}: install {package}, or remove that section")


def _values(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that is in nested dicts."""
    for key, value in part.items() if isinstance(part, dict) else ():
        yield f"{prefix}{key}", value
        yield from _values(value, f"{prefix}{key}.")


def _read(model: type[BaseModel], given: dict[str, Any], prefix: str) -> dict[str, Any]:
    for key in given:
        if not isinstance(key, str):
            raise UserError(f"the key {prefix}{key} is not text: put it in quotes")
        info = model.model_fields.get(key)
        extra = info.json_schema_extra if info else None
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{prefix}{key} is deprecated: set {extra.get('new_param')} instead")
    aliases = {name: info.alias for name, info in model.model_fields.items() if info.alias}
    twice = [name for name, alias in aliases.items() if name in given and alias in given]
    if twice:
        raise UserError(f"{prefix}{twice[0]} and {prefix}{aliases[twice[0]]} are the same: remove one")
    try:
        read = model(**given)
    except ValidationError as e:
        raise UserError(_refusal(model, e, prefix)) from None
    except (TypeError, AssertionError) as e:
        raise UserError(f"{prefix.rstrip('.')}: {e}") from None
    return _taken(read, given)


def _taken(read: BaseModel, given: dict[str, Any]) -> dict[str, Any]:
    """The given keys with the values that the model read, under the names that DeepSpeed documents."""
    fields = type(read).model_fields
    names = {info.alias: name for name, info in fields.items() if info.alias}
    taken = {}
    for key, value in given.items():
        name = names.get(key, key)
        got = getattr(read, name)
        if isinstance(got, BaseModel):
            got = _taken(got, value) if isinstance(value, dict) else got.model_dump(mode="json", exclude_unset=True)
        elif isinstance(got, enum.Enum):
            got = got.value
        elif isinstance(got, Path):
            got = str(got)
        if got is not None:  # by default all that may be null is
            taken[fields[name].alias or name] = got
    return taken


def _refusal(model: type[BaseModel], errors: ValidationError, prefix: str) -> str:
    """The first error, with the nearest key that exists."""
    error = errors.errors()[0]
    *parents, last = [str(part) for part in error["loc"]] or [""]
    key = prefix + ".".join([*parents, last])
    if error["type"] == "extra_forbidden":
        near = did_you_mean(last, _names(model, parents)) or ": remove it"
        return f"unknown key '{key}'{near}"
    value = repr(error["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    said = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{key.rstrip('.')} is {value}: {said[:1].lower()}{said[1:]}"


def _names(model: type[BaseModel], parents: list[str]) -> list[str]:
    """The keys of a model, or of one within it."""
    for parent in parents:
        info = next((f for n, f in model.model_fields.items() if parent in (n, f.alias)), None)
        inner = [info.annotation, *getattr(info.annotation, "__args__", ())] if info else []
        models = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
        if not models:
            return []
        model = models[0]
    return [f.alias or n for n, f in model.model_fields.items()]
