"""DeepSpeed: the one place that imports it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World
from dit_ds.engine.batchnorm import restore_fp32_buffers, running_statistics
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.engine.deepspeed_schema import MONITORS
from dit_ds.engine.import_deepspeed import import_deepspeed
from dit_ds.engine.optimizers import make_optimizer
from dit_ds.engine.zero_layout import private
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import UserError


def initialize(model: nn.Module, config: RunConfig, world: World, monitors: bool = False) -> Any:
    """Wrap the model in a DeepSpeed engine with the run's optimizer over its trainable parameters.

    Frozen parameters never reach the optimizer.

    Args:
        monitors: start those that the DeepSpeed JSON enables; wandb and comet then open a run.
    Raises:
        UserError: settings that DeepSpeed refuses for this model or number of ranks, in its words.
    """
    ds_config = deepspeed_config(config, world.world_size)
    if not monitors:
        ds_config = {key: value for key, value in ds_config.items() if key not in MONITORS}
    deepspeed = import_deepspeed()
    model.to(world.device)
    optimizer = make_optimizer(model, config.train, world.device)
    # torch's synchronised BatchNorm is for CUDA alone; and not in shorter types, in which its statistics would be short
    if world.device.type == "cuda" and world.world_size > 1 and DeepSpeedJson(ds_config).dtype == torch.float32:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    exact = {n: x.clone() for n, x in running_statistics(model).items()}
    deepspeed.init_distributed(dist_init_required=False)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    except Exception as e:
        monitor = type(e).__module__.partition(".")[0] in MONITORS.values()  # has no account, or no network
        # how DeepSpeed refuses what only an engine can check
        if not monitor and not isinstance(e, (AssertionError, ValueError, NotImplementedError, ImportError)):
            raise
        raise UserError(f"DeepSpeed refuses {config.deepspeed.config} here: {e or type(e).__name__}") from e
    restore_fp32_buffers(engine.module, exact)
    # stage 0 in bf16 makes Adam's states by a step of zero gradients, which Adam counts and corrects its bias for
    engine.basic_optimizer.state.clear()
    return engine


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
        stage_0 = engine.zero_optimization_stage() == 0
        scale = private(private(engine.optimizer, "loss_scale_config"), "cur_scale") if stage_0 else 1.0
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
    return state.average_in_module(import_deepspeed().zero.GatheredParameters)


_COUNTS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, Any]:
    """DeepSpeed's own counters and fp16's loss scale, for a checkpoint."""
    counts = {k: getattr(engine, k) for k in (*_COUNTS, "micro_steps")}
    scaler = _loss_scaler(engine) if engine.fp16_enabled() else None
    return counts | {"loss_scale": {k: getattr(scaler, k) for k in _LOSS_SCALE if hasattr(scaler, k)}}


def set_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Go on counting where a checkpoint was. Other keys than those of `counters` are not looked at."""
    for key in _COUNTS:
        setattr(engine, key, saved[key])
    engine.micro_steps = saved["global_steps"] * engine.gradient_accumulation_steps()  # of those there are now
    for key in _LOSS_SCALE:
        if key in saved["loss_scale"] and engine.fp16_enabled():
            setattr(_loss_scaler(engine), key, saved["loss_scale"][key])


def _loss_scaler(engine: Any) -> Any:
    return private(engine.optimizer, "loss_scaler" if engine.zero_optimization_stage() else "loss_scale_config")
