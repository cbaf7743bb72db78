"""Checks: their result, their context, and how they are run so that none can stop another.

A check is a generator of `Check`s. Numbers in `found` stand between spaces, so that `report.merge` can print those that
differ between ranks as a range.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_ds.config.schema import RunConfig
from dit_ds.distributed import local_ranks
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.errors import UserError

THREAD = "dit-ds check"  # name of the threads that checks run in
CHECK_SECONDS = 60  # limit of one check: the first import from a cold network file system is slow


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        status: ok, warn or fail.
        remedy: what to do about a warning or a failure; empty where all is well.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass
class Context:
    """What checks read, and the facts that they record.

    Attributes:
        config: of the run to check for, or None.
        timeout: seconds to wait for other ranks.
        facts: by name, what `report.compare` compares between ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    config: RunConfig | None = None
    timeout: float = 60.0
    facts: dict[str, Any] = field(default_factory=lambda: {"host": socket.gethostname()})

    @property
    def run_config(self) -> RunConfig:
        """The configuration, for checks that run only where there is one."""
        if self.config is None:
            raise UserError("this check needs a configuration: name one with --config")
        return self.config

    @property
    def local_ranks(self) -> int:
        """Processes on this node, by the launcher's variables."""
        return local_ranks(self.world_size)

    @property
    def nodes(self) -> int:
        """Nodes, by the launcher's variables."""
        text = os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or "1"
        return int(text) if text.isdigit() and self.world_size > 1 else 1

    @property
    def model_dtype(self) -> torch.dtype:
        """Of the model's weights: as configured, else bf16 on GPUs and fp32 on CPUs."""
        try:
            if self.config:
                return DeepSpeedJson(deepspeed_config(self.config, self.world_size)).dtype
        except UserError:  # which `configuration` reports
            pass
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def from_error(name: str, error: UserError, remedy: str) -> Check:
    """A failed check from a message that reads `what is wrong: what to do`.

    Args:
        remedy: for a message that has none, as it ends in the operating system's error text.
    """
    text = " ".join(str(error).split())
    what, _, todo = text.rpartition(": ")
    if not what or todo in {os.strerror(n) for n in errno.errorcode}:
        return Check(name, "fail", text, remedy)
    return Check(name, "fail", what, todo)


def run_checks(functions: Iterable[Callable[[Context], Iterator[Check]]], c: Context, seconds: float) -> list[Check]:
    """Run checks one after the other.

    Args:
        seconds: limit of all together; a check that hangs or is not reached is reported as failed.
    """
    deadline = time.monotonic() + seconds
    found: list[Check] = []
    for function in functions:
        found += _bounded(function, c, min(CHECK_SECONDS, deadline - time.monotonic()))
    return found


def _bounded(function: Callable[[Context], Iterator[Check]], c: Context, seconds: float) -> list[Check]:
    """Run one check in a thread. An exception or a time-out is a failed check; a thread that hangs is left running."""
    name = function.__name__.replace("_", " ")
    if seconds <= 0:
        return [Check(name, "fail", "not run: the checks before it took all the time", "mend those first")]
    found: list[Check] = []

    def work() -> None:
        try:
            for check in function(c):
                found.append(check)
        except UserError as e:
            found.append(from_error(name, e, "see the message"))
        except Exception as e:
            text = (str(e).strip() or "no message").splitlines()[0][:300]
            found.append(Check(name, "fail", f"{type(e).__name__}: {text}", "mend what the message names"))

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        remedy = "a file system, device or network does not answer: look at dmesg and the mounts of this host"
        return [*found, Check(name, "fail", f"did not finish in {seconds:.0f} s", remedy)]
    return found
