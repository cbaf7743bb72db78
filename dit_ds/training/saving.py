"""Between two steps: checkpoints are begun and published, and a run that is to stop is saved and left."""

from __future__ import annotations

import time

from dit_ds.distributed import gather_objects
from dit_ds.engine import engine as ds
from dit_ds.errors import Interrupted, UserError
from dit_ds.training.setup import Run


class Stopped(Exception):
    """`RUN/stop` was asked for, and the run is saved. The message is one line."""


def act_on_flags(run: Run) -> bool:
    """Between two steps: publish what is written, save what is due, stop if that is asked for. Collective.

    Returns:
        Whether an evaluation is asked for.
    Raises:
        Interrupted: a rank got a signal; the run is saved.
        Stopped: it was asked for; the run is saved.
    """
    c, progress = run.config.checkpoint, run.progress
    run.watchdog.at(progress.step, "waiting for the other ranks")
    asked = run.requests.take() if run.world.main else set()
    if c.every_minutes is not None and run.world.main and time.monotonic() - run.saved_at > 60 * c.every_minutes:
        asked.add("save")
    flags = run.stop_signal.agree(asked, written=run.saver.written)
    if flags.written:
        commit(run)
    if flags.interrupt or flags.stop:
        save_and_leave(run)
    if flags.save or (c.every_steps and progress.step % c.every_steps == 0):
        save(run)
    return flags.evaluate


def save_and_leave(run: Run) -> None:
    """Save, and end the training as a signal or a request wants it. Collective.

    Raises:
        Interrupted: a rank got a signal.
        Stopped: none did.
    """
    save(run)
    commit(run)
    signal = next((name for name in gather_objects(run.stop_signal.signal) if name), None)
    step, last = run.progress.step, run.saver.published
    saved = "saved" if last == step else f"last saved at step {last}" if last else "not saved"
    line = f"stopped by {signal or f'{run.config.run_dir}/stop'} at step {step}, {saved}: go on with --resume"
    raise Interrupted(line) if signal else Stopped(line)


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
