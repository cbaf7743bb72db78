"""`dit-ds ARGS` on a rank whose connections for copies break while it saves a second time.

python tests/local_saves_worker.py RANK ARGS
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from dit_ds.checkpointing.exchange import Exchange
from dit_ds.cli.entry import main

make, send_size = Exchange.__init__, Exchange.send_size
connections: list[int] = []  # the first exchange's file descriptors
calls = 0


def sockets() -> set[int]:
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                found.add(fd)
    return found


def noting(self: Exchange, *args) -> None:
    before = sockets()
    make(self, *args)
    connections[:] = connections or sorted(sockets() - before)


def broken_once(self: Exchange, size: int) -> None:
    global calls
    calls += 1
    if calls == 3:  # the second checkpoint's size; the first one's and its record's came before
        assert connections
        for fd in connections:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
                connection.getpeername()  # not one that listens
                connection.shutdown(socket.SHUT_RDWR)
    send_size(self, size)


if os.environ["RANK"] == sys.argv[1]:
    Exchange.__init__, Exchange.send_size = noting, broken_once
sys.argv[1:] = sys.argv[2:]
sys.exit(main())
