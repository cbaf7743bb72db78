"""Names, in the log, the rank that the others wait for, and ends a run that hangs."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from dit_ds.distributed import World, connect_store

STALLED = 76  # exit status: slurm/train.sbatch starts the run again
_MAY_LAST = ("saving",)  # phases whose time is a disk's: they are waited for
_log = logging.getLogger("dit_ds")


class Heartbeat(NamedTuple):
    """What a rank posts. It holds no time of day: the clocks of hosts differ, and are set while a run goes on."""

    beat: int  # counts the heartbeats
    phases: int  # of the loop, begun so far
    step: int
    phase: str  # the current one
    seconds: float  # that it lasts so far
    host: str


class Sighting(NamedTuple):
    """The newest heartbeat of a rank, and when rank 0 first saw it, by its own monotonic clock."""

    heartbeat: Heartbeat
    at: float


class Watchdog:
    """Logs a warning that names the stalled rank, when the loop has made no progress for some time; then ends the run.

    A thread of each rank posts heartbeats to a store on rank 0: how many phases of the loop it has begun, and the
    current one. Rank 0's thread reads them, and notes when it saw each change. The stalled rank is one whose heartbeats
    stopped (its process is stopped, its node is down), else the one that has begun the fewest phases. When rank 0 does
    not answer, rank 1 does the same. A rank that hangs can't be asked to end: the process that notices ends itself, with
    `STALLED`, and the launcher ends the others. A slow disk is waited for while heartbeats come.

    Args:
        seconds: without progress before a warning, and between warnings; after twice as many the run is ended.
        ending: called with the reason before that.
    """

    def __init__(self, world: World, seconds: float, ending: Callable[[str], None] = lambda why: None):
        self.world, self.seconds, self.ending = world, seconds, ending
        self._answered = time.monotonic()  # when rank 0 last did
        self._phases, self._step, self._phase, self._since = 0, 0, "starting", time.monotonic()
        self._beats, self._warned = 0, time.monotonic()
        self._sightings: dict[int, Sighting] = {}  # by rank
        self._closed = threading.Event()
        self._store = connect_store(world)
        self._threads = [threading.Thread(target=self._run, name="stall-watch", daemon=True)]
        if world.rank == 1:
            self._threads.append(threading.Thread(target=self._watch_rank_0, name="rank-0-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    def at(self, step: int, phase: str) -> None:
        """The loop begins a phase of optimizer step `step`. All ranks call this equally often, in the same order."""
        self._phases, self._step, self._phase, self._since = self._phases + 1, step, phase, time.monotonic()

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join(60)  # a request to a store that does not answer never ends

    def _run(self) -> None:
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            try:
                self._beat()
                self._answered = time.monotonic()
            except dist.DistStoreError:  # no answer in time
                continue
            except (RuntimeError, ValueError):  # rank 0 has ended, and the store with it
                self._closed.set()

    def _watch_rank_0(self) -> None:
        """Whether rank 0's store answers: a thread of its own, as the other one may wait for the answer without end."""
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            now = time.monotonic()
            if now - max(self._answered, self._warned) > self.seconds:
                self._warned = now
                why = "rank 0's process does not answer; the others wait for it"
                self._say(why, now - self._answered, silent=True)

    def _beat(self) -> None:
        """Post a heartbeat; on rank 0 look at all of them, and warn when that is due."""
        key, now, self._beats = f"rank{self.world.rank}", time.monotonic(), self._beats + 1
        heartbeat = Heartbeat(
            self._beats,
            self._phases,
            self._step,
            phase=self._phase,
            seconds=now - self._since,
            host=socket.gethostname(),
        )
        self._store.set(key, json.dumps(heartbeat))
        self._store.get(key)  # set() does not wait for an answer, so it cannot time out
        if self.world.main:
            self._look()
            if time.monotonic() - max(self._warned, self._since) > self.seconds:
                self._warned = time.monotonic()
                self._warn()

    def _look(self) -> None:
        """Note which ranks' heartbeats changed."""
        now = time.monotonic()
        for rank in range(self.world.world_size):
            key = f"rank{rank}"
            if rank in self._sightings or self._store.check([key]):
                heartbeat = Heartbeat(*json.loads(self._store.get(key)))
                if rank not in self._sightings or heartbeat.beat != self._sightings[rank].heartbeat.beat:
                    self._sightings[rank] = Sighting(heartbeat, now)

    def _say(self, why: str, seconds: float, silent: bool) -> None:
        """Warn; after twice `seconds` end this process, and with it the run. `silent`: heartbeats have stopped."""
        if seconds < 2 * self.seconds or (self._phase in _MAY_LAST and not silent):
            _log.warning(f"warning: {why}")
            return
        _log.error(f"dit-ds: error: {why}: ended, go on with --resume (log.stall_seconds {self.seconds:g})")
        self.ending(why)
        os._exit(STALLED)  # the loop is in a collective, which nothing else leaves

    def _warn(self) -> None:
        ranks, now, seen = range(self.world.world_size), time.monotonic(), self._sightings
        silent = [r for r in ranks if r not in seen or now - seen[r].at > self.seconds / 2]
        rank = silent[0] if silent else min(seen, key=lambda r: seen[r].heartbeat.phases)
        never = Sighting(Heartbeat(0, 0, 0, phase="starting", seconds=now - self._since, host="an unknown host"), now)
        stalled, at = seen.get(rank, never)
        how = "its process does not answer" if silent else f"it is {stalled.phase}"
        waiting = "; the others wait for it" if self.world.world_size > 1 else ""
        self._say(
            f"nothing done for {now - self._since:.0f} s: rank {rank} on {stalled.host} stalled at step "
            f"{stalled.step} for {stalled.seconds + now - at:.0f} s, {how}{waiting}",
            now - self._since,
            silent=bool(silent),
        )
