"""What the ranks of a run tell each other at each step: that one was asked to stop, that a save is due, that a part of a
checkpoint is written; and which of them the others wait for."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dit_ds.distributed import World

_log = logging.getLogger("dit_ds")
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # SLURM before a time limit, and on preemption; NCCL takes USR1


class SyncedFlags(NamedTuple):
    """What holds for all ranks alike."""

    stop: bool  # some rank got a signal
    save: bool  # rank 0's clock says that a save is due
    written: bool  # every rank has written its part of the pending checkpoint


class StopSignal:
    """Signals set a flag; flags are agreed on at step boundaries, where all ranks can act together.

    Use as a context: the handlers before it come back at its end.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._group: Any = None
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
        self.signal = signal.Signals(number).name

    def connect(self, world: World) -> None:
        """Before the first `agree`: on GPUs flags go over gloo, so that no kernel is waited for. Collective."""
        self._group = dist.new_group(backend="gloo") if world.device.type == "cuda" else None

    def agree(self, save_due: bool, written: bool) -> SyncedFlags:
        """One small all-reduce."""
        flags = torch.tensor([self.signal is not None, save_due, not written], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        stop, save, unwritten = (bool(x) for x in flags.tolist())
        return SyncedFlags(stop, save, not unwritten)
