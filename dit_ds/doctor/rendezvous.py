"""The rendezvous of ranks without a process group: a store at MASTER_ADDR:MASTER_PORT, with a time-out on every wait.

A training's ranks use the same address, so this probes what they need: rank 0 binds the port (under torchrun the agent
has bound it), the others connect to it. A process group made later in this process shares the listener, so the port is
held throughout.
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


class Rendezvous:
    """An exchange of JSON between rank 0 and the others, and which ranks joined.

    Args:
        timeout: seconds to reach rank 0, and in which all ranks have to join.
    Raises:
        UserError: the port can't be bound or reached in time; from any method, rank 0 is gone.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.timeout = rank, timeout
        self.expected = list(range(world_size))
        self.deadline = time.monotonic() + timeout
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serve:
            _check_free(port)
        else:
            _reach(address, port, self.deadline)
        store = _open_store(address, port, serve, timeout)
        self._store = dist.PrefixStore("dit_ds_doctor", store)
        self.publish(f"joined/{rank}", True)

    def publish(self, key: str, value: Any) -> None:
        """Set a key for all ranks."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError:
            raise UserError("rank 0 went away: see its own output") from None

    def wait_for(self, key: str, seconds: float) -> Any:
        """The value of a key, waited for at most so many seconds."""
        if self._missing([key], time.monotonic() + seconds):
            raise UserError(f"rank 0 published nothing for {seconds:.0f} s: see its own output")
        return json.loads(self._store.get(key))

    def collect(self, key: str, value: Any, seconds: float) -> tuple[dict[int, Any], list[Check]]:
        """Publish this rank's value; on rank 0 wait for all of them.

        Args:
            seconds: to wait for the values of the ranks that joined.
        Returns:
            On rank 0 the values by rank, and a failed check for the ranks that did not join, or sent nothing; on the
            others nothing.
        """
        self.publish(f"{key}/{self.rank}", value)
        if self.rank:
            return {}, []
        absent = self._missing([f"joined/{r}" for r in self.expected], self.deadline)
        checks = self._without(absent, f"did not come within {self.timeout:.0f} s",
                               "see their own output; srun --nodes and --ntasks must start all of WORLD_SIZE")  # fmt: skip
        late = self._missing([f"{key}/{r}" for r in self.expected], time.monotonic() + seconds)
        checks += self._without(late, f"came, but sent no findings for {seconds:.0f} s",
                                "they died or hang: see their own output")  # fmt: skip
        return {r: json.loads(self._store.get(f"{key}/{r}")) for r in self.expected}, checks

    def all_joined(self) -> Check:
        """The check that no rank is missing."""
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Check("rendezvous", "ok", f"{len(self.expected)} of {len(self.expected)} ranks met at {where}")

    def close(self) -> None:
        """Leave; rank 0, whose process may serve the store, waits up to 5 s for the others."""
        try:
            self.publish(f"left/{self.rank}", True)
            if self.rank == 0:
                self._missing([f"left/{r}" for r in self.expected], time.monotonic() + 5)
        except UserError:
            pass

    def _without(self, keys: list[str], what: str, remedy: str) -> list[Check]:
        if not keys:
            return []
        gone = [int(k.rpartition("/")[2]) for k in keys]
        self.expected = [r for r in self.expected if r not in gone]
        return [Check("rendezvous", "fail", f"{ranks_text(gone)} {what}", remedy)]

    def _missing(self, keys: list[str], deadline: float) -> list[str]:
        """Keys that are not set at the deadline. Polled one by one: a `wait` of the store that times out breaks the connection."""
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
    """In a thread: a client ignores its time-out while another program holds the port and does not answer."""
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
    """Refuse a port that can't be bound."""
    with socket.socket() as s:
        s.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the store does: a port that was just closed is free
        try:
            s.bind(("", port))
            s.listen()
        except OSError as e:
            raise UserError(
                f"MASTER_PORT {port} can't be bound on {socket.gethostname()} ({e.strerror}): "
                f"export MASTER_PORT={free_port()}, or end what holds it (ss -ltnp)"
            ) from None


def _reach(address: str, port: int, deadline: float) -> None:
    """Wait until rank 0 listens.

    Args:
        deadline: by `time.monotonic()`.
    """
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
