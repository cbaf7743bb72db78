"""Ends all ranks when one can't go on, while the others wait for it in a collective."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time

import torch.distributed as dist

from dit_ds.distributed import World, gather_objects

_POLL = 0.2  # seconds


class Alarm:
    """A thread of each rank asks a store on rank 0, apart from the process group, whether a rank has given up.

    Collective. A rank that hears of it ends at once with status 1 and says nothing: the one that gave up first speaks.
    """

    def __init__(self, world: World):
        self.world, self._over = world, threading.Event()
        if world.world_size == 1:
            return
        address, timeout = os.environ["MASTER_ADDR"], datetime.timedelta(seconds=60)
        store = dist.TCPStore(address, 0, None, True, timeout, wait_for_workers=False) if world.main else None
        port = gather_objects(store.port if store else None)[0]
        self._store = store or dist.TCPStore(address, port, None, False, timeout)
        gather_objects(None)  # rank 0's store stays until all have come
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    def give_up(self) -> bool:
        """This rank can't go on. Whether it is the first, which is to say why and then call `end`."""
        if self.world.world_size == 1:
            return True
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store went with rank 0, which has spoken then
            return self._store.add("given_up", 1) == 1
        return False

    def end(self) -> None:
        """End this rank with status 1, unless it is alone; the first to give up waits until the others have heard."""
        if self.world.world_size == 1:
            return
        sys.stdout.flush()
        time.sleep(5 * _POLL)
        os._exit(1)  # an orderly end would wait for the others' part in collectives

    def close(self) -> None:
        """Hear no more. If a rank gave up, that is why whatever failed here did: end then, and say nothing."""
        self._over.set()
        if self.world.world_size > 1:
            self._thread.join()
            self._ask()

    def _listen(self) -> None:
        while not self._over.wait(_POLL):
            if not self._ask():
                return

    def _ask(self) -> bool:
        """Whether the store is there; this process ends where a rank gave up."""
        try:
            given_up = self._store.check(["given_up"])
        except RuntimeError:  # it went with rank 0: the process group notices
            return False
        if given_up:
            os._exit(1)
        return True
