"""Flags that the ranks of a run agree on between steps: a signal came, something was asked for, a checkpoint is written."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dit_ds.distributed import World

# SLURM before a time limit, and on preemption (NCCL takes USR1); and Ctrl-C
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_ONE_STOP = 1.0  # seconds within which signals count as one: a terminal and a launcher may both send it
_log = logging.getLogger("dit_ds")


class SyncedFlags(NamedTuple):
    """Flags that are the same on all ranks."""

    interrupt: bool  # some rank got a signal
    save: bool  # by rank 0's clock, or asked for
    stop: bool  # asked for
    evaluate: bool  # asked for
    local: bool  # a checkpoint on the nodes' disks, by rank 0's clock
    written: bool  # every rank has written its part of the pending checkpoint
    copy_is_free: bool  # no rank writes from its host copy


class StopSignal:
    """Notes SIGUSR2, SIGTERM and SIGINT, and synchronizes flags at step boundaries, where all ranks can act together.

    A SIGINT that comes more than a second after the first signal is an impatient user's: it raises `KeyboardInterrupt`.

    A context manager: the former signal handlers are restored at its end. Handlers are set in the main thread only.

    Attributes:
        signal: the name of the last signal that this rank got; None before.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._noted_at = 0.0
        self._group: dist.ProcessGroup | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal is not None and now - self._noted_at > _ONE_STOP:
            raise KeyboardInterrupt
        if self.signal is None:
            self._noted_at = now
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            _log.info("stopping after this step, with a checkpoint; Ctrl-C again ends at once without one")

    def connect(self, world: World) -> None:
        """Call before the first `agree`. On GPUs flags go over gloo, so that no kernel is waited for. Collective."""
        self._group = dist.new_group(backend="gloo") if world.device.type == "cuda" else None

    def agree(self, asked: Collection[str] = (), written: bool = True, copy_is_free: bool = True) -> SyncedFlags:
        """Synchronize the flags by one all-reduce of seven integers. Collective.

        Args:
            asked: of save, stop, evaluate and local, what is due; on any rank, for all.
            written: this rank has no part of a checkpoint still to write.
            copy_is_free: this rank writes nothing from its host copy.
        """
        mine = [self.signal is not None, *(x in asked for x in ("save", "stop", "evaluate", "local"))]
        flags = torch.tensor([*mine, not written, not copy_is_free], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        interrupt, save, stop, evaluate, local, unwritten, copy_in_use = (bool(x) for x in flags.tolist())
        return SyncedFlags(
            interrupt, save, stop, evaluate, local, written=not unwritten, copy_is_free=not copy_in_use
        )  # fmt: skip
