"""Processes forked from one that has imported torch, DeepSpeed, transformers and dit_ds: a start takes a moment, not ten
seconds.

`start` asks the server of the test session for one; the first to ask starts it. It has one thread and computes nothing,
so that a fork of it is as a process that has done its imports: it gets an environment, a folder and output files, runs
`dit-ds ARGS` or a script, and ends by way of the interpreter's exit handlers.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

_START_LIMIT = 180  # seconds for the server's imports
FOLDER = "DIT_DS_TEST_RANKS"  # the environment variable that names the session's folder


class WarmProcess:
    """One forked process, with what the tests use of `subprocess.Popen`'s interface.

    Args:
        command: `["dit-ds", *ARGS]`, or a script's path and its arguments.
        out: files that its stdout and stderr are appended to.
    """

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, out: tuple[Path, Path]):
        self.args, self._out = command, out
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_server())
        self._replies = self._socket.makefile("r")
        request = {"command": command, "env": env, "cwd": str(cwd), "out": [str(x) for x in out]}
        self._socket.sendall((json.dumps(request) + "\n").encode())
        self.pid: int = json.loads(self._replies.readline())["pid"]

    @property
    def stdout(self) -> TextIO:
        """What it has printed so far."""
        return open(self._out[0], errors="replace")

    @property
    def stderr(self) -> TextIO:
        """What it has printed to stderr so far."""
        return open(self._out[1], errors="replace")

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            line = self._replies.readline()
            if not line:
                raise RuntimeError("the server of warm ranks has ended")
            self.returncode = json.loads(line)["status"]
            self._replies.close()
            self._socket.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return all that it printed."""
        self.wait(timeout)
        return self._out[0].read_text(errors="replace"), self._out[1].read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """kill -15."""
        self.send_signal(signal.SIGTERM)


def output_files() -> tuple[Path, Path]:
    """New files for stdout and stderr, in the session's folder."""
    folder = Path(tempfile.mkdtemp(dir=os.environ[FOLDER]))
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    return folder / "stdout", folder / "stderr"


def finish(processes: list[WarmProcess], timeout: float) -> int:
    """Wait for all ranks as a launcher does: one that fails ends the others. Return the first failure's status, or 0.

    Raises:
        subprocess.TimeoutExpired: some still run; they are killed.
    """
    deadline, failed = time.monotonic() + timeout, 0
    try:
        while running := [p for p in processes if p.poll() is None]:
            if not failed and (failed := next((p.returncode for p in processes if p.returncode), 0)):
                time.sleep(0.5)  # what fails on all ranks is said by each
                for p in running:
                    p.terminate()
                deadline = min(deadline, time.monotonic() + 30)
            if time.monotonic() > deadline:
                if failed:
                    break
                raise subprocess.TimeoutExpired(processes[0].args, timeout)
            try:
                running[0].wait(0.05)
            except subprocess.TimeoutExpired:
                pass
    finally:
        for p in processes:
            p.kill()
            p.wait(30)
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def _server() -> str:
    """The socket of this session's server, which is started if there is none."""
    folder = Path(os.environ[FOLDER])
    path = folder / "socket"
    if path.exists():
        return str(path)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return str(path)
        from conftest import environment

        # no library may have threads at a fork
        env = environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(folder / "log", "ab") as log:
            server = subprocess.Popen(
                [sys.executable, __file__, str(path), folder.name.rpartition("-")[2]], env=env, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_LIMIT
        while not path.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"no server of warm ranks: {(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)
    return str(path)


# --- the server -------------------------------------------------------------------------------------------------------


def _import_all() -> None:
    import importlib

    from dit_ds.engine.engine import import_deepspeed

    import_deepspeed()
    for name in ("dit_ds.cli.entry", "dit_ds.training.train", "dit_ds.evaluation.inference", "dit_ds.doctor.check",
                 "dit_ds.checkpointing.export", "dit_ds.data.shards.write", "dit_ds.data.shards.verify",
                 "dit_ds.planning.memory.measure", "dit_ds.planning.memory.fake_cluster", "dit_ds.planning.scaling",
                 "dit_ds.planning.memory.worker", "transformers", "transformers.models.bert.modeling_bert", "yaml",
                 "pytest"):  # fmt: skip
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"imports have left {len(threads)} threads, which no fork can take along")
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared


def _serve(path: str, session: int) -> dict[str, Any] | None:
    """Fork a process for each request until the session's process ends: None. In a fork, return its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    selector = selectors.DefaultSelector()
    session_end = os.pidfd_open(session)
    selector.register(listener, selectors.EVENT_READ)
    selector.register(session_end, selectors.EVENT_READ)
    clients: dict[int, tuple[int, int, socket.socket]] = {}  # the fork's pidfd to (it, its pid, who asked for it)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                request = json.loads(client.makefile("r").readline())
                pid = os.fork()
                if not pid:
                    for fd in (listener.fileno(), session_end, client.fileno()):
                        os.close(fd)
                    for fd, _, other in clients.values():
                        os.close(fd)
                        other.detach() if other.fileno() < 0 else os.close(other.detach())
                    listener.detach(), client.detach()
                    selector.close()
                    return request
                fork = os.pidfd_open(pid)
                clients[fork] = fork, pid, client
                selector.register(fork, selectors.EVENT_READ, fork)
                selector.register(client, selectors.EVENT_READ, fork)
                client.sendall(json.dumps({"pid": pid}).encode() + b"\n")
            elif key.fileobj == session_end:
                for _, pid, _ in clients.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            elif key.data in clients:
                fork, pid, client = clients[key.data]
                if key.fileobj is client:  # who asked for it has ended
                    selector.unregister(client)
                    os.kill(pid, signal.SIGKILL)
                    continue
                del clients[fork]
                selector.unregister(fork)
                if client in selector.get_map():
                    selector.unregister(client)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                try:
                    client.sendall(json.dumps({"status": status}).encode() + b"\n")
                except OSError:
                    pass
                client.close()
                os.close(fork)


def _run(request: dict[str, Any]) -> Any:
    os.setsid()
    for fd, path in zip((1, 2), request["out"]):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program, *arguments = request["command"]
    if program == "dit-ds":
        from dit_ds.cli.entry import main

        sys.argv = ["dit-ds", *arguments]
        return main(arguments)
    import runpy

    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
    return 0


def _end(asked: dict[str, Any]) -> NoReturn:
    """Run, and end as Python ends: threads, exit handlers, streams. But for tearing the imported modules down."""
    try:
        status = _run(asked) or 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _import_all()
    if asked := _serve(sys.argv[1], int(sys.argv[2])):
        _end(asked)
