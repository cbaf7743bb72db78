"""Names, in the log, the rank that the others wait for."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from dit_ds.distributed import World, connect_store

_log = logging.getLogger("dit_ds")


class Heartbeat(NamedTuple):
    """What a rank posts; times are seconds since the epoch, by the rank's clock."""

    phases: int  # of the loop, begun so far
    step: int
    phase: str  # the current one
    since: float  # when it began
    posted: float
    host: str


class Watchdog:
    """Logs a warning that names the stalled rank, when the loop has made no progress for some time.

    A thread of each rank posts heartbeats to a store on rank 0: how many phases of the loop it has begun, and the
    current one. Rank 0's thread reads them. The stalled rank is one whose heartbeats stopped (its process is stopped,
    its node is down), else the one that has begun the fewest phases. When rank 0 does not answer, rank 1 warns.

    Args:
        seconds: without progress before a warning, and between warnings.
    """

    def __init__(self, world: World, seconds: float):
        self.world, self.seconds = world, seconds
        self._phases, self._step, self._phase, self._since = 0, 0, "starting", time.time()
        self._closed = threading.Event()
        self._store = connect_store(world)
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """The loop begins a phase of optimizer step `step`. All ranks call this equally often, in the same order."""
        self._phases, self._step, self._phase, self._since = self._phases + 1, step, phase, time.time()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        interval = min(5.0, self.seconds / 4)
        warned = time.time()
        while not self._closed.wait(interval):
            try:
                key, host = f"rank{self.world.rank}", socket.gethostname()
                heartbeat = Heartbeat(
                    self._phases, self._step, self._phase, since=self._since, posted=time.time(), host=host
                )
                self._store.set(key, json.dumps(heartbeat))
                self._store.get(key)  # set() does not wait for an answer, so it cannot time out
                if self.world.main and time.time() - max(warned, self._since) > self.seconds:
                    warned = time.time()
                    self._warn()
            except dist.DistStoreError:  # no answer in time
                if self.world.rank == 1:
                    _log.warning("warning: rank 0's process does not answer; the others wait for it")
            except (RuntimeError, ValueError):  # rank 0 has ended, and the store with it
                return

    def _warn(self) -> None:
        ranks, now = range(self.world.world_size), time.time()
        posted = [r for r in ranks if self._store.check([f"rank{r}"])]
        heartbeats = {r: Heartbeat(*json.loads(self._store.get(f"rank{r}"))) for r in posted}
        silent = [r for r in ranks if r not in heartbeats or now - heartbeats[r].posted > self.seconds / 2]
        rank = silent[0] if silent else min(heartbeats, key=lambda r: heartbeats[r].phases)
        stalled = heartbeats.get(rank, Heartbeat(0, 0, "starting", since=now, posted=now, host="an unknown host"))
        how = "its process does not answer" if silent else f"it is {stalled.phase}"
        waiting = "; the others wait for it" if self.world.world_size > 1 else ""
        _log.warning(
            f"warning: nothing done for {now - self._since:.0f} s: rank {rank} on {stalled.host} stalled at step "
            f"{stalled.step} for {now - stalled.since:.0f} s, {how}{waiting}"
        )
