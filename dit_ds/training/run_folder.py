"""The run's folder, of which a SLURM job knows that it was there when the job started before.

Where a shared file system is away at that moment, a run that is not found would otherwise begin anew, without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from dit_ds.errors import UserError
from dit_ds.files import PATIENCE

VARIABLE = "DIT_DS_JOB_FOLDER"  # set by slurm/common.sh: a folder of the job's own, which its restarts share
NAME = "run_folder"  # in that folder: the run that the job trains
_log = logging.getLogger("dit_ds")


def note_folder(run_dir: str | Path) -> None:
    """Note, for later starts of this job, that the run's folder is there. Where that can't be noted, nothing is."""
    if job := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(job, NAME).write_text(os.path.abspath(run_dir))


def wait_for_known_folder(run_dir: str | Path, seconds: float = PATIENCE) -> None:
    """Wait for a run's folder that this job has trained in before.

    Raises:
        UserError: it is not there after `seconds`.
    """
    job = os.environ.get(VARIABLE)
    try:
        known = bool(job) and Path(str(job), NAME).read_text() == os.path.abspath(run_dir)
    except OSError:
        return
    if not known or os.path.isdir(run_dir):
        return
    _log.warning(f"warning: {run_dir}, which this job has trained in, is not there: waiting for up to {seconds:.0f} s")
    end = time.monotonic() + seconds
    while not os.path.isdir(run_dir):
        if time.monotonic() > end:
            raise UserError(f"{run_dir}, which this job has trained in, is gone: bring it back, or submit a new job")
        time.sleep(min(1.0, seconds / 4))
