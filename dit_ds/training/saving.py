"""Between two steps: checkpoints are begun and published, and a run that is to stop is saved and left."""

from __future__ import annotations

import copy
import time
from typing import Any

from dit_ds.checkpointing.writer import LocalDiskFailed
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
    if run.local is not None and run.world.main and time.monotonic() - run.local.begun_at > 60 * c.local_every_minutes:
        asked.add("local")
    flags = run.stop_signal.agree(asked, written=run.saver.written, copy_is_free=run.saver.copy_is_free)
    if flags.written:
        commit(run)
    if flags.copy_is_free:
        finish_local(run)
    if flags.interrupt or flags.stop:
        save_and_leave(run)
    if flags.save or (c.every_steps and progress.step % c.every_steps == 0):
        save(run)
    elif flags.local and flags.copy_is_free:
        save_to_local_disk(run)
    return flags.evaluate


def save_and_leave(run: Run) -> None:
    """Save, and end the training as a signal or a request wants it. Collective.

    Raises:
        Interrupted: a rank got a signal.
        Stopped: none did.
    """
    save(run, to_local_disk=False)  # there may be little time, and the next start on other nodes
    commit(run)
    signal = next((name for name in gather_objects(run.stop_signal.signal) if name), None)
    step, last = run.progress.step, run.saver.published
    saved = "saved" if last == step else f"last saved at step {last}" if last else "not saved"
    line = f"stopped by {signal or f'{run.config.run_dir}/stop'} at step {step}, {saved}: go on with --resume"
    raise Interrupted(line) if signal else Stopped(line)


def save(run: Run, to_local_disk: bool = True) -> None:
    """Begin a checkpoint of this step; publish it, too, unless it is written in the background. Collective.

    Args:
        to_local_disk: write it to the nodes' disks first, where that is configured.
    """
    commit(run)
    finish_local(run)
    run.watchdog.at(run.progress.step, "saving")
    run.save_seconds, run.saved_at = run.saver.begin(_meta(run), to_local_disk), time.monotonic()
    if not run.config.checkpoint.asynchronous:
        commit(run)


def save_to_local_disk(run: Run) -> None:
    """Begin a checkpoint of this step on the nodes' disks alone. Collective."""
    assert run.local is not None
    run.watchdog.at(run.progress.step, "saving")
    run.local.begin(_meta(run))


def _meta(run: Run) -> dict[str, Any]:
    progress = run.progress
    meta = run.resume_keys | {"step": progress.step} | run.batches.state(progress.epoch, progress.batch)
    meta |= {
        "progress": copy.deepcopy(vars(progress)),
        "config": run.config.model_dump(mode="json"),
        "frozen": run.frozen_digest,
    }
    meta |= {"engine": ds.counters(run.engine), "world_size": run.world.world_size}
    meta |= {"zero_stage": run.engine.zero_optimization_stage()}
    if run.datasets.val is not None:
        meta |= {"val_manifest_sha": run.datasets.val.index.manifest_sha}
    return meta


def finish_local(run: Run) -> None:
    """Note how the checkpoint on the nodes' disks went that was begun, if one was. Collective."""
    start = time.perf_counter()
    if run.local is None or (done := run.local.finish()) is None:
        return
    if done.errors and not run.local_fails:
        kept = "" if done.whole else f" not saved to {run.config.checkpoint.local}"
        run.log.log(f"warning: checkpoint of step {done.step}{kept}: {done.errors[0]}: going on, and trying again")
        if not done.copies:
            run.log.log("warning: copies on other nodes are tried again at a later save")
    elif run.local_fails and not done.errors:
        run.log.log(f"checkpoint of step {done.step} saved to {run.config.checkpoint.local}, as before")
    run.local_fails = bool(done.errors)
    run.local_failures += not done.whole
    run.copy_failures += not done.copies
    line = {
        "bytes": done.bytes,
        "write_seconds": done.write_seconds,
        "whole": done.whole,
        "failures": run.local_failures,
        "copy_failures": run.copy_failures,
    }
    line |= {"blocked_seconds": run.local.waited_seconds + time.perf_counter() - start}
    run.log.metrics("local_save", {"step": done.step} | line)


def commit(run: Run, anew: bool = True) -> None:
    """Publish the checkpoint that was begun, if one was. Collective.

    Args:
        anew: where a node's disk does not give back what was to be copied, save the run as it is now, without that disk.
    Raises:
        UserError: it could not be written, and `checkpoint.on_full_disk` is "stop".
    """
    if not run.saver.pending:
        return
    start, step = time.perf_counter(), run.saver.step
    run.watchdog.at(run.progress.step, "saving")
    try:
        try:
            line = run.saver.commit()
        except LocalDiskFailed as e:
            run.log.log(f"warning: {e}" + ": written anew, without that disk" * anew)
            if not anew:
                return
            finish_local(run)
            step, run.save_seconds = run.progress.step, run.saver.begin(_meta(run), near=False)
            line = run.saver.commit()
    except UserError as e:
        if run.config.checkpoint.on_full_disk == "stop":
            raise
        run.log.log(f"warning: {e}: going on, the former checkpoint is whole")
        return
    line |= {"blocked_seconds": run.save_seconds + time.perf_counter() - start}
    run.log.metrics("save", {"step": step} | line)
