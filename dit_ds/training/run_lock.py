"""A run's folder belongs to one training at a time, on file systems that several hosts share, and across kills.

`run.lock` names its owner. The owner's thread sets the file's time every `INTERVAL` seconds, which needs no room on the
disk. No clocks are compared: whoever finds the lock of a process that it cannot look up watches whether that time moves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_ds.distributed import World, all_or_none
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, parse_json, replace_on_success
from dit_ds.training.run_folder import wait_for_known_folder

NAME = "run.lock"
INTERVAL = 10.0  # seconds between two heartbeats
PATIENCE = 45.0  # seconds without a heartbeat after which an owner on another host is taken for dead
SETTLE = 1.0  # seconds after which a lock that was taken over is read back: of several that try, the last one has it
_log = logging.getLogger("dit_ds")


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        token: of this lock alone.
        host, pid: of rank 0, for people.
        machine: which kernel and which process table the pid is of.
        started: when the process started, in the kernel's ticks, as pids are used anew.
        job: of SLURM, with its restarts, as "cluster/1234.0"; empty outside.
        step: the job's step, numbered in each of its restarts anew; empty outside.
    """

    token: str
    host: str
    pid: int
    machine: str
    started: str
    job: str
    step: str = ""

    @classmethod
    def this_process(cls) -> Owner:
        """This process, as an owner of a new lock."""
        env, pid = os.environ, os.getpid()
        job = f"{env.get('SLURM_CLUSTER_NAME', '')}/{env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
        job += f".{env.get('SLURM_RESTART_COUNT', 0)}" if job else ""
        step = env.get("SLURM_STEP_ID", "") if job else ""
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _machine(), _started(pid), job, step)

    def said(self) -> str:
        """For messages: process, host and job."""
        return f"process {self.pid} on {self.host}" + (f", job {self.job.rpartition('/')[2]}" if self.job else "")

    def alive(self) -> bool | None:
        """Whether the process runs; None where this process cannot tell."""
        if self.started and self.machine == _machine():
            return _started(self.pid) == self.started
        here = Owner.this_process().job
        if self.job and here and self.job != here and self.job.rpartition(".")[0] == here.rpartition(".")[0]:
            return False  # SLURM ended the job's processes before it started the job anew
        return None

    def superseded(self) -> bool:
        """Whether this process runs in a later step of the owner's job: the job starts one only when the other ended.

        The owner may live all the same where SLURM has lost its node.
        """
        here = Owner.this_process()
        if not self.job or self.job != here.job or not (self.step.isdigit() and here.step.isdigit()):
            return False
        return int(self.step) < int(here.step)


class RunLock:
    """Rank 0's lock on a run's folder.

    Raises:
        UserError: another training holds it, or the folder can't be written.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / NAME
        self.owner = Owner.this_process()
        self._made_folder = not self.path.parent.exists()
        self._closed = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the folder free."""
        self._closed.set()
        self._thread.join()
        if (owner := _read(self.path)) and owner.token == self.owner.token:
            self.path.unlink(missing_ok=True)
        if self._made_folder:
            with contextlib.suppress(OSError):  # it holds a run
                self.path.parent.rmdir()

    def _acquire(self) -> None:
        with full_disk_is_user_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                owner = _read(self.path)
                if owner is None:  # its owner has just ended, or is just writing it
                    time.sleep(SETTLE)
                    owner = _read(self.path)
                if owner is None and not self.path.exists():
                    continue
                fence = owner is not None and owner.superseded() and owner.alive() is not False
                if owner is not None and not fence and _still_held(self.path, owner):
                    raise UserError(
                        f"{self.path.parent} is being trained by {owner.said()}: wait for it, or choose another "
                        f"--run_dir (if that process is gone, remove {self.path})"
                    )
                _log.warning(
                    f"warning: {self.path.parent} was being trained by {owner.said() if owner else 'an unknown process'},"
                    " which has ended without closing it: taken over"
                )
                self._write()
                if fence and owner is not None:
                    self._wait_for_end(owner)
                time.sleep(SETTLE)
                now = _read(self.path)
                if now is not None and now.token == self.owner.token:
                    return

    def _wait_for_end(self, owner: Owner) -> None:
        """Until an owner whose lock was taken has ended: it finds that out at its next heartbeat, and leaves unsaved."""
        end = time.monotonic() + 1.5 * INTERVAL
        while owner.alive() is not False and time.monotonic() < end:
            os.utime(self.path)
            time.sleep(INTERVAL / 20)

    def _create(self) -> bool:
        """Write the lock where there is none: a link is made by one process only, on NFS, too."""
        temporary = self.path.with_name(f".{NAME}.{self.owner.token}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(self.owner)))
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return self._create_without_links()
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_without_links(self) -> bool:
        try:
            with open(self.path, "x") as f:
                f.write(json.dumps(asdict(self.owner)))
        except FileExistsError:
            return False
        return True

    def _write(self) -> None:
        with replace_on_success(self.path) as temporary:
            temporary.write_text(json.dumps(asdict(self.owner)))

    def _renew(self) -> None:
        while not self._closed.wait(INTERVAL):
            try:
                owner = _read(self.path)
                if owner is not None and owner.token != self.owner.token:
                    _lost(self.path, owner)
                if self.path.exists():
                    os.utime(self.path)
                else:
                    self._write()
            except OSError:  # the file system can't be reached for now
                continue


def lock_run(run_dir: str | Path, world: World) -> RunLock | None:
    """Rank 0 takes the lock; None on the other ranks. Collective.

    Raises:
        UserError: on every rank, as of `RunLock`.
    """
    lock, error = None, None
    try:
        if world.main:
            wait_for_known_folder(run_dir)
            _require_own_files(Path(run_dir))
            lock = RunLock(run_dir)
    except UserError as e:
        error = e
    all_or_none(error)
    return lock


def _require_own_files(folder: Path) -> None:
    """Refuse a folder that came with links, pipes or devices where a run reads and appends to its own files.

    Folders may be links, as `checkpoints` to a larger disk.

    Raises:
        UserError: names one.
    """
    for pattern in ("*.txt", "*.json", "*.jsonl*", "*.yaml", NAME, "samples/*"):
        for path in sorted(folder.glob(pattern)):
            if not path.is_dir() and (path.is_symlink() or not path.is_file()):
                raise UserError(f"{path} is a link, a pipe or a device, not a file of the run: remove it")


def _lost(path: Path, owner: Owner) -> None:
    """This process was taken for dead, as after a long stop, and must not write to the folder any more."""
    _log.error(f"dit-ds: error: {path.parent} was taken over by {owner.said()}: this process ends without saving")
    os._exit(1)


def _still_held(path: Path, owner: Owner) -> bool:
    """Whether the owner lives: its process is looked up, or its heartbeat is watched."""
    alive = owner.alive()
    if alive is not None:
        return alive
    _log.info(f"{path.parent} is locked by {owner.said()}: watching for up to {PATIENCE:.0f} s whether it is alive")
    before, end = _time(path), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 4))
        now = _read(path)
        if now is None or now.token != owner.token or _time(path) != before:
            return now is not None
    return False


def _time(path: Path) -> int | None:
    """When the file was last renewed, by its server's clock. Opened, as NFS asks its server anew then only."""
    try:
        with open(path) as f:
            return os.fstat(f.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> Owner | None:
    """None where there is no lock, or one that cannot be understood."""
    try:
        values: Any = parse_json(path.read_text())
        return Owner(**values)
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    """The kernel since its boot, and the process table that pids are of: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process started; empty where there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
