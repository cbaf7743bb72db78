"""Where ranks meet before there is a process group: a store at MASTER_ADDR:MASTER_PORT, with a time-out on all of it.

A training then meets at the same place, so that what is probed here is what it needs: rank 0 binds the port (under
torchrun the agent has), the others reach it. The process group made later in this process shares the listener, so the
port is not given up in between.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from dit_ds.distributed import free_port
from dit_ds.doctor.check import THREAD, Check
from dit_ds.errors import UserError

_POLL = 0.05  # seconds


class Meeting:
    """The ranks that came, as rank 0 sees it, and an exchange of JSON between it and the others.

    Raises:
        UserError: the port can't be bound or reached within `timeout` seconds; from any method, rank 0 is gone.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.timeout = rank, timeout
        self.expected = range(world_size)
        self.deadline = time.monotonic() + timeout
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serve:
            _check_free(port)
        else:
            _reach(address, port, self.deadline)
        store = _open_store(address, port, serve, timeout)
        self._store = dist.PrefixStore("dit_ds_doctor", store)
        self.say(f"here/{rank}", True)

    def say(self, key: str, value: Any) -> None:
        """Publish a value."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError:
            raise UserError("rank 0 went away: see its own output") from None

    def hear(self, key: str, seconds: float) -> Any:
        """The value, waited for."""
        if self._missing([key], time.monotonic() + seconds):
            raise UserError(f"rank 0 said nothing for {seconds:.0f} s: see its own output")
        return json.loads(self._store.get(key))

    def collect(self, key: str, value: Any, seconds: float) -> tuple[dict[int, Any], list[Check]]:
        """On rank 0 each rank's value, and who is missing as failed checks; on the others nothing."""
        self.say(f"{key}/{self.rank}", value)
        if self.rank:
            return {}, []
        absent = self._missing([f"here/{r}" for r in self.expected], self.deadline)
        checks = self._without(absent, f"did not come within {self.timeout:.0f} s",
                               "see their own output; srun --nodes and --ntasks must start all of WORLD_SIZE")  # fmt: skip
        late = self._missing([f"{key}/{r}" for r in self.expected], time.monotonic() + seconds)
        checks += self._without(late, f"came, but sent no findings for {seconds:.0f} s",
                                "they died or hang: see their own output")  # fmt: skip
        return {r: json.loads(self._store.get(f"{key}/{r}")) for r in self.expected}, checks

    def all_came(self) -> Check:
        """That nobody is missing."""
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Check("rendezvous", "ok", f"{len(self.expected)} of {len(self.expected)} ranks met at {where}")

    def close(self) -> None:
        """Leave; rank 0, whose process holds the store, as the last."""
        try:
            self.say(f"bye/{self.rank}", True)
            if self.rank == 0:
                self._missing([f"bye/{r}" for r in self.expected], time.monotonic() + 5)
        except UserError:
            pass

    def _without(self, keys: list[str], what: str, remedy: str) -> list[Check]:
        if not keys:
            return []
        gone = [int(k.rpartition("/")[2]) for k in keys]
        self.expected = [r for r in self.expected if r not in gone]
        return [Check("rendezvous", "fail", f"{ranks_text(gone)} {what}", remedy)]

    def _missing(self, keys: list[str], deadline: float) -> list[str]:
        """Keys that are not there at the deadline. Asked for one by one: a wait that runs out spoils the connection."""
        missing = list(keys)
        try:
            while missing := [k for k in missing if not self._store.check([k])]:
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL)
        except RuntimeError:
            raise UserError("rank 0 went away: see its own output") from None
        return missing


def ranks_text(ranks: list[int]) -> str:
    """[0, 1, 2, 5] to `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for r in sorted(ranks):
        if parts and r == parts[-1][-1] + 1:
            parts[-1].append(r)
        else:
            parts.append([r])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _open_store(address: str, port: int, serve: bool, timeout: float) -> dist.Store:
    """In a thread: a client ignores its own time-out while a stranger on the port keeps silent."""
    opened: list[dist.Store] = []
    error = "no answer"

    def work() -> None:
        nonlocal error
        limit = datetime.timedelta(seconds=timeout)
        try:
            opened.append(dist.TCPStore(address, port, None, serve, limit, wait_for_workers=False, multi_tenant=True))
        except RuntimeError as e:
            error = str(e).splitlines()[0][:120]

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    thread.start()
    thread.join(timeout)
    if not opened:
        raise UserError(
            f"{address}:{port} answers, but not as the store of rank 0 ({error}): "
            f"another program may hold the port, export MASTER_PORT={free_port()}"
        )
    return opened[0]


def _check_free(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: what just closed is free
        try:
            s.bind(("", port))
            s.listen()
        except OSError as e:
            raise UserError(
                f"MASTER_PORT {port} can't be bound on {socket.gethostname()} ({e.strerror}): "
                f"export MASTER_PORT={free_port()}, or end what holds it (ss -ltnp)"
            ) from None


def _reach(address: str, port: int, deadline: float) -> None:
    """Wait until rank 0 listens."""
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                refused = isinstance(e, ConnectionRefusedError)
                why = "nothing listens there" if refused else e.strerror or "no answer"
                remedy = (
                    "see whether rank 0 started on that host and what it says"
                    if refused
                    else "open the port between the nodes (firewall), or set MASTER_ADDR to the fast network's address"
                )
                raise UserError(
                    f"{socket.gethostname()} can't reach rank 0 at {address}:{port} in {time.monotonic() - start:.0f} s "
                    f"({why}): {remedy}"
                ) from None
            time.sleep(0.2)
