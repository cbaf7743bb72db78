"""DeepSpeed: the one place that imports it."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dit_ds.config.load import RunConfig, TrainConfig, merge
from dit_ds.distributed import World
from dit_ds.engine.batchnorm import in_fp32, running_statistics
from dit_ds.engine.zero_state import TrainingState
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
    # said, where the JSON leaves it open: in what type gradients are added up, between micro-batches and between ranks
    name = next(k for k, v in _PRECISIONS.items() if v == dtype(ds))
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


def dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The type that DeepSpeed turns the model into; fp32 masters are kept beside the shorter ones."""
    return _PRECISIONS[precision(ds_config)]


def precision(ds_config: dict[str, Any]) -> str:
    """bf16, fp16 or fp32."""
    return next((kind for kind in ("bf16", "fp16") if ds_config.get(kind, {}).get("enabled")), "fp32")


def _what_divides(batch: int, micro: int, world_size: int) -> str:
    message = f"train.batch_size {batch} is not a multiple of micro-batch {micro} x {world_size} ranks: "
    if batch % world_size:
        unit = micro * world_size if micro * world_size <= batch else world_size
        nearest = max(1, round(batch / unit)) * unit
        return message + f"set train.batch_size {nearest}, or use {_divisors(batch)} ranks"
    return (
        message
        + f"micro-batches that divide are {_divisors(batch // world_size)} (--deepspeed.override.train_micro_batch_size_per_gpu)"
    )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def import_deepspeed() -> Any:
    """Import DeepSpeed, quiet on stdout and without compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # DeepSpeed's calls to torch.distributed under names that torch is renaming: nothing for our users to act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:  # which is for results
            handler.setStream(sys.stderr)
    # the shared-memory collectives for CPUs are compiled at start-up, which hangs for ever on a lock that a killed
    # process left; gloo serves
    for name in ("shm_comm", "deepspeed_shm_comm"):
        deepspeed.ops.__compatible_ops__[name] = False
    return deepspeed


def initialize(model: nn.Module, config: RunConfig, world: World) -> Any:
    """Wrap the model in a DeepSpeed engine with AdamW over its trainable parameters.

    Frozen parameters never reach the optimizer.
    """
    ds_config = deepspeed_config(config, world.world_size)
    deepspeed = import_deepspeed()
    t = config.train
    model.to(world.device)
    # fused: one pass over the states, no temporaries of their size; torch has it for CUDA and for CPUs
    optimizer = torch.optim.AdamW(parameter_groups(model, t), lr=t.lr, betas=t.betas, eps=t.eps, fused=True)
    # torch's synchronised BatchNorm is for CUDA alone; and not in shorter types, in which its statistics would be short
    if world.device.type == "cuda" and world.world_size > 1 and dtype(ds_config) == torch.float32:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    exact = {n: x.clone() for n, x in running_statistics(model).items()}
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    in_fp32(engine.module, exact)
    # stage 0 in bf16 makes Adam's states by a step of zero gradients, which Adam counts and corrects its bias for
    engine.basic_optimizer.state.clear()
    return engine


def parameter_groups(model: nn.Module, t: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters for AdamW, those without weight decay by themselves."""
    spared = set() if t.decay_norms else model.no_decay()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n not in spared], "weight_decay": t.weight_decay},
        {"params": [p for n, p in trained if n in spared], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def step(engine: Any) -> float:
    """Make the update, if it is due and its gradient is finite: every rank decides alike, by the reduced gradient.

    Returns:
        The norm of the update's gradient before clipping, not finite where the update was left out (which
        `engine.skipped_steps` counts); 0 where no update was due.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return 0.0
    if not isinstance(engine.optimizer, torch.optim.Optimizer):  # DeepSpeed's optimizers look themselves
        # at stage 0 fp16's norm is of the scaled loss
        scale = getattr(getattr(engine.optimizer, "loss_scale_config", None), "cur_scale", 1.0)
        engine.step()
        return float(engine.get_global_grad_norm()) / scale
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained]))
    if not math.isfinite(norm):
        engine.skipped_steps += 1
        for p in trained:
            p.grad = None  # which Adam passes over
    engine.step()
    return norm


def write_events(engine: Any, kind: str, values: dict[str, Any]) -> None:
    """Hand metrics to the monitors that the DeepSpeed JSON enables (wandb, comet, csv_monitor). Rank 0 writes."""
    if engine.monitor.enabled and dist.get_rank() == 0:
        step = values["step"]
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        engine.monitor.write_events([(f"{kind}/{k}", v, step) for k, v in numbers.items()])


def averaged(state: TrainingState) -> Any:
    """A context in which the engine's module computes with the moving average of its weights. Collective."""
    return state.averaged(import_deepspeed().zero.GatheredParameters)


_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, Any]:
    """DeepSpeed's own counters and fp16's loss scale, for a checkpoint."""
    counts = {k: getattr(engine, k) for k in ("global_steps", "global_samples", "micro_steps", "skipped_steps")}
    scaler = _loss_scaler(engine) if engine.fp16_enabled() else None
    return counts | {"loss_scale": {k: getattr(scaler, k) for k in _LOSS_SCALE if hasattr(scaler, k)}}


def set_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Go on counting where a checkpoint was."""
    for key, value in saved.items():
        if key == "micro_steps":  # of the micro-batches there are now
            engine.micro_steps = saved["global_steps"] * engine.gradient_accumulation_steps()
        elif key != "loss_scale":
            setattr(engine, key, value)
    for key, value in saved["loss_scale"].items():
        setattr(_loss_scaler(engine), key, value)


def _loss_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def learning_rate(step: int, steps_per_epoch: int, t: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule. A pure function."""
    epoch = step / steps_per_epoch
    warmup_steps = t.warmup_epochs * steps_per_epoch
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    total = min(t.max_steps or math.inf, t.epochs * steps_per_epoch)
    done = min(1.0, max(0.0, step - warmup_steps) / max(1.0, total - warmup_steps))
    if t.schedule == "cosine":
        return warm * (t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if t.schedule == "poly":
        return t.lr * warm * (1 - done) ** t.poly_power
    return t.lr * warm * t.decay ** sum(epoch >= m for m in t.milestones)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the rate of the next update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
