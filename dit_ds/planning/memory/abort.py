"""Ends all ranks when one fails while the others wait for it in a collective."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from dit_ds.distributed import World, connect_store

_POLL = 0.2  # seconds
_REPORT_TIMEOUT = datetime.timedelta(minutes=10)  # for the first rank that failed to write a snapshot
_FAILED, _REPORTED = "failed", "reported"  # the store's keys: how many ranks failed; the exit status, once reported


class AbortChannel:
    """A thread of each rank polls a store on rank 0, apart from the process group, for another rank's failure. Collective.

    The rank that fails first reports why. Once it has, every other process exits with its status, silently.
    """

    def __init__(self, world: World):
        self.world, self._closed = world, threading.Event()
        if world.world_size == 1:
            return
        self._store = connect_store(world)
        self._thread = threading.Thread(target=self._poll, name="abort", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def first_failure(self, status: int = 1) -> Iterator[bool]:
        """A context for a rank that failed: it reports why, if the value is true: it failed first.

        At its end all processes exit with `status`, unless there is only one rank. None exits before the first has
        reported, as launchers kill the remaining ranks when one has ended.
        """
        if self.world.world_size == 1:
            yield True
            return
        self._closed.set()
        first = False
        with contextlib.suppress(RuntimeError):  # rank 0's process has exited: it knew
            first = self._store.add(_FAILED, 1) == 1
        try:
            yield first
            sys.stdout.flush()
        finally:
            if first:
                self._store.set(_REPORTED, str(status))
        if not first:
            self._wait_for_report()
        self._exit(status, delayed=True)

    def close(self) -> None:
        """End the thread. If another rank has failed, its failure caused this rank's: exit silently."""
        self._closed.set()
        if self.world.world_size > 1:
            self._thread.join()
            self._wait_for_report()

    def _poll(self) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0's process has exited: the process group notices
            while not self._closed.wait(_POLL):
                if self._store.check([_REPORTED]):
                    self._exit(int(self._store.get(_REPORTED)))

    def _wait_for_report(self) -> None:
        """If a rank has failed, wait for its report and exit."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILED]):
                self._store.wait([_REPORTED], _REPORT_TIMEOUT)
                self._exit(int(self._store.get(_REPORTED)))

    def _exit(self, status: int, delayed: bool = False) -> NoReturn:
        """End this process; `delayed` so that the others can read the status, as always on rank 0, which has the store."""
        if delayed or self.world.main:
            time.sleep(5 * _POLL)
        os._exit(status)  # a normal exit would wait for the other ranks' collectives
