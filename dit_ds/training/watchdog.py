"""Names the rank that stalls."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time

import torch.distributed as dist

from dit_ds.distributed import World, connect_store

_log = logging.getLogger("dit_ds")


class Watchdog:
    """Names the rank for which the others wait, in the log, once nothing was done for `seconds`.

    Each rank's thread posts where its loop is to a store on rank 0, whose thread reads them. The rank that is named is
    the one whose thread no longer posts (the process is stopped, its node is gone), else the one least far in the loop,
    which is the same for all. When rank 0 does not answer, rank 1 says so.

    Args:
        seconds: without anything done, before a rank is named; and before it is named again.
    """

    def __init__(self, world: World, seconds: float):
        self.world, self.seconds = world, seconds
        self._passed, self._step, self._what, self._since = 0, 0, "starting", time.time()
        self._over = threading.Event()
        self._store = connect_store(world)
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        self._thread.start()

    def at(self, step: int, what: str) -> None:
        """The loop begins `what`. All ranks call this equally often, in the same order."""
        self._passed, self._step, self._what, self._since = self._passed + 1, step, what, time.time()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(5.0, self.seconds / 4)
        named = time.time()
        while not self._over.wait(interval):
            try:
                beat = [self._passed, self._step, self._what, self._since, time.time(), socket.gethostname()]
                self._store.set(f"rank{self.world.rank}", json.dumps(beat))
                self._store.get(f"rank{self.world.rank}")  # setting waits for no answer
                if self.world.main and time.time() - max(named, self._since) > self.seconds:
                    named = time.time()
                    self._name()
            except dist.DistStoreError:  # no answer in time
                if self.world.rank == 1:
                    _log.warning("warning: rank 0's process does not answer; the others wait for it")
            except (RuntimeError, ValueError):  # the store went with rank 0
                return

    def _name(self) -> None:
        beats = {}
        for rank in range(self.world.world_size):
            if self._store.check([f"rank{rank}"]):
                beats[rank] = json.loads(self._store.get(f"rank{rank}"))
        now = time.time()
        silent = [r for r in range(self.world.world_size) if r not in beats or now - beats[r][4] > self.seconds / 2]
        rank = silent[0] if silent else min(beats, key=lambda r: beats[r][0])
        _, step, what, since, _, host = beats.get(rank, [0, 0, "starting", now, now, "an unknown host"])
        how = "its process does not answer" if silent else f"it is {what}"
        waiting = "; the others wait for it" if self.world.world_size > 1 else ""
        _log.warning(
            f"warning: nothing done for {now - self._since:.0f} s: rank {rank} on {host} stalled at step {step} for "
            f"{now - since:.0f} s, {how}{waiting}"
        )
