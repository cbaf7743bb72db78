"""When the loop begins a checkpoint, and when it publishes one that was written in the background."""

from __future__ import annotations

import time

from dit_ds.distributed import gather_objects
from dit_ds.engine import engine as ds
from dit_ds.errors import Interrupted, UserError
from dit_ds.training.setup import Run


def save_and_stop_if_due(run: Run) -> None:
    """Between two steps: publish what is written, save what is due, stop if a signal came. Collective.

    Raises:
        Interrupted: a rank got a signal; the run is saved.
    """
    c, progress = run.config.checkpoint, run.progress
    run.watchdog.at(progress.step, "waiting for the other ranks")
    late = c.every_minutes is not None and time.monotonic() - run.saved_at > 60 * c.every_minutes
    flags = run.stop_signal.agree(save_due=run.world.main and late, written=run.saver.written)
    if flags.written:
        commit(run)
    if flags.save or flags.stop or (c.every_steps and progress.step % c.every_steps == 0):
        save(run)
    if flags.stop:
        commit(run)
        name = next(n for n in gather_objects(run.stop_signal.signal) if n)
        last = run.saver.published
        saved = "saved" if last == progress.step else f"last saved at step {last}" if last else "not saved"
        raise Interrupted(f"stopped by {name} at step {progress.step}, {saved}: go on with --resume")


def save(run: Run) -> None:
    """Begin a checkpoint of this step; publish it, too, unless it is written in the background. Collective."""
    progress, config = run.progress, run.config
    commit(run)
    run.watchdog.at(progress.step, "saving")
    meta = run.resume_keys | {"step": progress.step} | run.batches.state(progress.epoch, progress.batch)
    meta |= {"progress": dict(vars(progress)), "config": config.model_dump(mode="json"), "frozen": run.frozen_digest}
    meta |= {"engine": ds.counters(run.engine), "world_size": run.world.world_size}
    meta |= {"zero_stage": run.engine.zero_optimization_stage()}
    if run.datasets.val is not None:
        meta |= {"val_manifest_sha": run.datasets.val.index.manifest_sha}
    run.save_seconds, run.saved_at = run.saver.begin(meta), time.monotonic()
    if not config.checkpoint.asynchronous:
        commit(run)


def commit(run: Run) -> None:
    """Publish the checkpoint that was begun, if one was. Collective.

    Raises:
        UserError: it could not be written, and `checkpoint.on_full_disk` is "stop".
    """
    if not run.saver.pending:
        return
    start, step = time.perf_counter(), run.saver.step
    try:
        line = run.saver.commit()
    except UserError as e:
        if run.config.checkpoint.on_full_disk == "stop":
            raise
        run.log.log(f"warning: {e}: going on, the former checkpoint is whole")
        return
    line |= {"blocked_seconds": run.save_seconds + time.perf_counter() - start}
    run.log.metrics("save", {"step": step} | line)
