"""DeepSpeed, imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch


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
