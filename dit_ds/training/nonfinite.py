"""After each optimizer step: what to do when its gradient is not finite, or samples of it were damaged."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_ds.distributed import gather_objects
from dit_ds.errors import RunFailed, UserError
from dit_ds.training.setup import Run

_MAX_SKIPPED_IN_A_ROW = 50  # optimizer steps, after which the run has failed


@dataclass
class StepSamples:
    """What this rank's micro-batches of one optimizer step held."""

    losses: list[Tensor] = field(default_factory=list)  # a scalar for each micro-batch, detached
    samples: list[int] = field(default_factory=list)  # indices, without padding
    damaged: list[str] = field(default_factory=list)  # a message for each sample that the loader skipped

    def add(self, loss: Tensor, batch: dict[str, Any]) -> int:
        """Add a micro-batch; return its number of samples without padding."""
        samples = batch["sample"][batch["weight"] > 0].tolist()
        self.losses.append(loss)
        self.samples += samples
        self.damaged += batch.get("bad", [])
        return len(samples)


def check_gradient(run: Run, norm: float, step: StepSamples) -> bool:
    """Whether the gradient was finite; if not, log the step's samples of all ranks. Collective where it was not.

    DeepSpeed skips the update of such a step. With fp16 it is expected where the losses are finite: the loss scale was
    too high.

    Args:
        norm: the gradient's norm before clipping, the same on every rank.
    Raises:
        RunFailed: `train.on_nonfinite` is "stop", or too many steps in a row were skipped.
    """
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        return True
    run.skipped_in_a_row += 1
    progress = run.progress
    losses = [float(loss) for loss in step.losses]
    keys = [run.datasets.train.key(s) for s in step.samples]
    ranks = gather_objects({"rank": run.world.rank, "losses": losses, "samples": step.samples, "keys": keys})
    run.log.nonfinite({"step": progress.step, "epoch": progress.epoch, "ranks": ranks})
    culprits = [str(r["rank"]) for r in ranks if not all(map(math.isfinite, r["losses"]))]
    failed = run.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW
    if run.engine.fp16_enabled() and not culprits and not failed:
        return False
    where = f"the loss of rank {', '.join(culprits)}" if culprits else "the gradient"
    log = f"{run.log.folder}/nonfinite.jsonl"
    what = f"{where} is not finite at step {progress.step} (its samples are in {log})"
    if run.config.train.on_nonfinite == "stop" or failed:
        raise RunFailed(f"{what}: lower train.lr, or clip the gradient (train.gradient_clipping)")
    run.log.log(f"warning: {what}: this step is left out")
    return False


def count_damaged(run: Run, damaged: list[str]) -> None:
    """Log the damaged samples that this step skipped, where `data.max_bad_samples` allows any. Collective then.

    Raises:
        UserError: the run has skipped more than allowed, on all ranks alike.
    """
    allowed, skipped = run.config.data.max_bad_samples, run.progress.bad_samples
    if not allowed:
        return
    for message in itertools.chain(*gather_objects(damaged)):
        if message not in skipped:
            skipped.append(message)
            run.log.log(f"warning: skipped, {len(skipped)} of {allowed}: {message}")
    if len(skipped) > allowed:
        raise UserError(f"more than data.max_bad_samples ({allowed}) samples are damaged; the last is {skipped[-1]}")
