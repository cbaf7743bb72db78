"""Ends all ranks when one can't go on, while the others wait for it in a collective."""

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
_SPEECH = datetime.timedelta(minutes=10)  # at most, to write a snapshot


class AbortChannel:
    """A thread of each rank asks a store on rank 0, apart from the process group, whether a rank has given up.

    Collective. A rank that hears of it ends at once with its status and says nothing: the one that gave up first speaks.
    """

    def __init__(self, world: World):
        self.world, self._over = world, threading.Event()
        if world.world_size == 1:
            return
        self._store = connect_store(world)
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def first_failure(self, status: int = 1) -> Iterator[bool]:
        """This rank can't go on. Inside, whether it is the first, which is to say why.

        After that all ranks end with its status, but for one that is alone. None ends before the first has spoken, as
        launchers kill the ranks that are left when one has failed.
        """
        if self.world.world_size == 1:
            yield True
            return
        self._over.set()
        first = False
        with contextlib.suppress(RuntimeError):  # the store went with rank 0, which has heard it then
            first = self._store.add("claimed", 1) == 1
        try:
            yield first
            sys.stdout.flush()
        finally:
            if first:
                self._store.set("spoken", str(status))
        if not first:
            self._hear_out()
        self._leave(status, late=True)

    def close(self) -> None:
        """Hear no more. If a rank gave up, that is why whatever failed here did: end then, and say nothing."""
        self._over.set()
        if self.world.world_size > 1:
            self._thread.join()
            self._hear_out()

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went with rank 0: the process group notices
            while not self._over.wait(_POLL):
                if self._store.check(["spoken"]):
                    self._leave(int(self._store.get("spoken")))

    def _hear_out(self) -> None:
        """If a rank gave up, wait until it has said why, and end."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["claimed"]):
                self._store.wait(["spoken"], _SPEECH)
                self._leave(int(self._store.get("spoken")))

    def _leave(self, status: int, late: bool = False) -> NoReturn:
        """End this rank; `late` when the others have heard of it, as always on rank 0, where the store is."""
        if late or self.world.main:
            time.sleep(5 * _POLL)
        os._exit(status)  # an orderly end would wait for the others' part in collectives
