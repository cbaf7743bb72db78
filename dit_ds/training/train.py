"""Training: one loop, read from top to bottom. `setup.Run` holds what it works on."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.device_pass import finish_batch
from dit_ds.data.loading.loader import iterate
from dit_ds.data.loading.workers import worker_failures
from dit_ds.distributed import connect, disconnect, set_environment
from dit_ds.engine import engine as ds
from dit_ds.errors import Interrupted, RunFailed, UserError
from dit_ds.evaluation.evaluate import EvaluationLeft, evaluate
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.training.nonfinite import StepSamples, check_gradient, count_damaged
from dit_ds.training.run_lock import lock_run
from dit_ds.training.run_log import trace_of_run
from dit_ds.training.saving import Stopped, act_on_flags, commit, finish_local, save, save_and_leave
from dit_ds.training.schedule import learning_rate, set_learning_rate
from dit_ds.training.setup import Run, check_request, set_up
from dit_ds.training.signals import StopSignal
from dit_ds.training.throughput import ThroughputMeter


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train as configured; return the last evaluation with `run`, `step` and `train_seconds`, the same on every rank.

    Runs as one process, or as one of many under torchrun or srun.

    Raises:
        UserError: a request that can't be met.
        RunFailed: the gradient is not finite, and goes on so or must not be.
        RankFailed: this rank's loader workers died or stalled.
        Interrupted: on SIGUSR2, SIGTERM or SIGINT, once a checkpoint is saved.
        KeyboardInterrupt: on a second SIGINT.
    """
    with StopSignal() as stop_signal:
        # what can be refused without the other ranks is refused before any waits for another
        _, world_size, _ = set_environment()
        datasets = check_request(config, world_size)
        if not resume and (trace := trace_of_run(config.run_dir)):
            raise UserError(
                f"{config.run_dir} holds a run already ({trace}): go on with --resume, or choose another --run_dir"
            )
        world = connect()
        stop_signal.connect(world)
        lock = lock_run(config.run_dir, world)
        try:
            with worker_failures():
                result = train_epochs(set_up(config, datasets, world, stop_signal))
        except (Interrupted, RunFailed):  # of all ranks alike
            disconnect()
            raise
        finally:
            if lock is not None:
                lock.close()
        disconnect()
        return result


def train_epochs(run: Run) -> dict[str, Any]:
    """Epoch by epoch: train, evaluate, save. Returns what `train` does."""
    config, progress, stopped, done = run.config, run.progress, {}, False
    try:
        if evaluate_if_due(run):  # a signal had ended it, or the run before it
            save(run)
        while progress.step < run.total_steps:
            train_epoch(run)
            if progress.batch == run.batches.batches_per_epoch:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            evaluate_if_due(run)
            last = progress.step == run.total_steps
            if last or progress.epoch % config.checkpoint.every_epochs == 0 or progress.best_step == progress.step:
                save(run)
        run.progress_bar.close()
        commit(run)
        finish_local(run)
        done = True
        run.log.ended("done", progress.step)
    except Stopped as e:
        run.log.log(str(e))
        run.log.ended("stopped", progress.step, e)
        stopped = {"stopped": True}
    except RunFailed as e:  # on all ranks alike: the checkpoint that is being written is published
        commit(run, anew=False)
        run.log.ended("failed", progress.step, e)
        raise
    except BaseException as e:
        left = isinstance(e, (Interrupted, KeyboardInterrupt))
        run.log.ended("interrupted" if left else "refused" if isinstance(e, UserError) else "failed", progress.step, e)
        raise
    finally:
        if run.local is not None:
            run.local.close(remove=done)
        run.watchdog.close()
        run.log.close()
    skipped = {"bad_samples": len(progress.bad_samples)} if config.data.max_bad_samples else {}
    ended = {"run": config.run_dir, "step": progress.step, "train_seconds": round(progress.seconds, 1)}
    return progress.metrics | ended | skipped | stopped


def train_epoch(run: Run) -> None:
    """Take optimizer steps to the end of the epoch or of the run: each of one global batch, in micro-batches."""
    config, progress, engine, device = run.config, run.progress, run.engine, run.world.device
    run.batches.start_at(progress.epoch, progress.batch)
    engine.train()
    accumulation = engine.gradient_accumulation_steps()
    meter, step = new_meter(run), StepSamples()
    meter.data_requested()
    run.watchdog.at(progress.step, "loading data")
    for i, batch in enumerate(iterate(run.loader)):
        meter.data_received()
        run.watchdog.at(progress.step, "forward and backward")
        lr = learning_rate(progress.step, run.batches.batches_per_epoch, config.train)
        set_learning_rate(engine, lr)
        # dropout draws from the step and the rank, so that a resumed run draws the same
        torch.manual_seed(_seed_of(config.seed, progress.step, i % accumulation, run.world.rank))
        batch = finish_batch(batch, device, config.data.image_size, config.data.train_mask_rule == "soft")
        mask, weight = (batch[k].to(device, non_blocking=True) for k in ("mask", "weight"))
        loss = engine.module.loss(engine(**model_inputs(batch, device)), mask, weight)
        meter.forward_done(loss.detach(), step.add(loss.detach(), batch))
        engine.backward(loss)
        norm = ds.step(engine)
        if (i + 1) % accumulation == 0:
            progress.step += 1
            progress.batch += 1
            finish_step(run, norm, step)
            step = StepSamples()
            meter.step_done()
            last = progress.step == run.total_steps
            if progress.step % config.log.every_steps == 0 or last:
                report(run, meter, lr, norm)
                meter = new_meter(run)
            if last:
                break
            start = time.perf_counter()
            if act_on_flags(run):
                evaluate_as_asked(run)
            meter.leave_out(time.perf_counter() - start)
        meter.data_requested()
        run.watchdog.at(progress.step, "loading data")
    progress.seconds += meter.close()["seconds"]


def new_meter(run: Run) -> ThroughputMeter:
    """A meter of the steps from now on."""
    return ThroughputMeter(run.world, run.flops, forward_waits=run.engine.zero_optimization_stage() == 3)


def _seed_of(*position: int) -> int:
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def finish_step(run: Run, norm: float, step: StepSamples) -> None:
    """After an optimizer step: BatchNorm's statistics, the weights' moving average, the sample log.

    Raises:
        RunFailed: see `check_gradient`.
        UserError: see `count_damaged`.
    """
    run.log.samples(run.progress.step, run.progress.epoch, step.samples)
    run.batchnorm.stepped(math.isfinite(norm))
    if check_gradient(run, norm, step):
        run.state.update_average()
    count_damaged(run, step.damaged)
    run.progress_bar.update()


def report(run: Run, meter: ThroughputMeter, lr: float, norm: float) -> None:
    """Log the averages of the meter's steps. Collective."""
    line = meter.close()
    run.progress.seconds += line.pop("seconds")
    run.log.own_times(run.progress.step, line.pop("own_seconds"), line.pop("step_seconds_mean"))
    line |= {"lr": lr} | {f"lr/{part}": lr * factor for part, factor in run.part_factors.items()}
    line |= {"grad_norm": norm, "skipped_steps": run.engine.skipped_steps}
    log_metrics(run, "train", line)
    run.progress_bar.set_postfix(
        loss=f"{line['loss']:.4f}", samples_s=f"{line['samples_per_second']:.0f}", refresh=False
    )


def log_metrics(run: Run, kind: str, values: dict[str, Any]) -> None:
    """A line of metrics.jsonl, TensorBoard's scalars, and DeepSpeed's monitors."""
    values = {"step": run.progress.step, "epoch": run.progress.epoch} | values
    run.log.metrics(kind, values)
    ds.write_events(run.engine, kind, values)


def evaluate_if_due(run: Run) -> bool:
    """Evaluate at the end of an epoch or of the run, where that is configured and not done. Collective."""
    progress, every = run.progress, run.config.eval.every_epochs
    if not every or not progress.step or progress.evaluated == progress.step:
        return False
    at_end = progress.step == run.total_steps or (progress.batch == 0 and progress.epoch % every == 0)
    if at_end:
        evaluate_val(run)
    return at_end


def evaluate_as_asked(run: Run) -> None:
    """Evaluate between two steps, and save the run if it is the best so far. Collective."""
    if run.datasets.val is None:
        run.log.log("warning: an evaluation was asked for, but the run has no split to evaluate on")
        return
    try:
        evaluate_val(run)
    except Interrupted:
        if run.world.main:
            (run.log.folder / "evaluate").touch()  # for the training that goes on
        raise
    run.engine.train()
    if run.progress.best_step == run.progress.step:
        save(run)


def evaluate_val(run: Run) -> None:
    """Evaluate on the validation split with the averaged weights, and note whether it is the best so far. Collective.

    Raises:
        Interrupted: a rank got a signal: the evaluation is left, and the run saved.
    """
    config, progress = run.config, run.progress
    assert run.datasets.val is not None  # or `eval.every_epochs` is 0
    run.engine.eval()

    def model(**inputs: Any) -> Any:
        run.watchdog.at(progress.step, "evaluating")
        return run.engine(**inputs)

    try:
        with ds.averaged(run.state):
            metrics = evaluate(
                model,
                run.datasets.val,
                MaskPostprocess.from_config(config),
                run.world,
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
                timeout=config.data.worker_timeout,
                leave=lambda: run.stop_signal.agree().interrupt,
            )
    except EvaluationLeft:  # the module has the trained weights again
        save_and_leave(run)
    progress.metrics = metrics = {"split": config.data.val_split} | metrics
    progress.evaluated = progress.step
    log_metrics(run, "eval", metrics)
    run.log.log(f"step {progress.step}: mIoU {metrics['miou']:.4f}, oIoU {metrics['oiou']:.4f}")
    score = metrics["giou"] if "giou" in metrics else metrics["miou"]  # only gIoU counts expressions without a target
    if score > progress.best_score:
        progress.best_score, progress.best_step = score, progress.step
