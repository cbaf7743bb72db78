"""Learning rate schedules: step (the paper's), cosine, poly."""

from __future__ import annotations

import math
from typing import Any

from dit_ds.config.schema import TrainConfig


def learning_rate(step: int, steps_per_epoch: int, t: TrainConfig) -> float:
    """The learning rate of one optimizer step: linear warm-up, then the schedule. A pure function.

    Args:
        step: optimizer steps taken before this one.
        steps_per_epoch: optimizer steps, which are global batches.
    """
    epoch = step / steps_per_epoch
    warmup_steps = t.warmup_epochs * steps_per_epoch
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    total = min(t.max_steps or math.inf, t.epochs * steps_per_epoch)
    done = min(1.0, max(0.0, step - warmup_steps) / max(1.0, total - warmup_steps))
    if t.schedule == "cosine":
        return warm * (t.min_lr + (t.lr - t.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if t.schedule == "poly":
        return t.lr * warm * (1 - done) ** t.poly_power
    return t.lr * warm * t.lr_decay ** sum(epoch >= m for m in t.milestones)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of the engine's next update: of each parameter group the run's, times the group's factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
