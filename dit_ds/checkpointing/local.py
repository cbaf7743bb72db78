"""Checkpoints on the nodes' own disks, which are quick to write: `checkpoint.local`.

`LOCAL/run_ID/step_00001200_ATTEMPT/` holds `rank_00000.safetensors` of each of the node's ranks, `rank_00001.copy.safetensors`
of ranks of the node before it, and beside each file a record of it, `.json`, which is written last. ID is the run's, from
`local.json` in its folder; ATTEMPT is of one start of the training. A checkpoint is whole if every rank's part of one
attempt lies on some node, so that nothing is published: `local_resume.py` looks for what is there.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from dit_ds.checkpointing.exchange import Exchange
from dit_ds.checkpointing.nodes import copy_holders, ranks_by_node
from dit_ds.checkpointing.parts import PAGE, Checksum, HostImage, Part, chunks, part_name
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, gather_objects
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, write_json

RUN_FILE = "local.json"  # in the run's folder: its ID
KEEP = 2  # whole checkpoints on a node's disk, beside the one that is being written


def local_folder(config: RunConfig) -> Path | None:
    """`checkpoint.local` on this node, with environment variables replaced by their values.

    Raises:
        UserError: one is not set.
    """
    if config.checkpoint.local is None:
        return None
    path = os.path.expandvars(config.checkpoint.local)
    if unset := re.search(r"\$\{?\w+\}?", path):
        raise UserError(f"checkpoint.local names {unset[0]}, which is not set on this node: set it, or name a folder")
    return Path(path)


def host_statistics(state: TrainingState) -> dict[str, Tensor]:
    """A copy of BatchNorm's running statistics, which are the same on all ranks."""
    return {n: x.to("cpu", copy=True) for n, x in running_statistics(state.engine.module).items()}


class LocalPart(NamedTuple):
    """A part that was written to this node's disk."""

    path: Path
    bytes: int
    checksum: int


@dataclass(frozen=True)
class Finished:
    """A local checkpoint that all ranks have tried to write.

    Attributes:
        whole: every rank's part lies on some node.
        errors: each different one.
        copies: whether parts can be sent to other nodes from here on.
        bytes: of all parts.
        write_seconds, cpu_seconds: of the slowest rank, and its thread's processor time.
    """

    step: int
    whole: bool
    errors: list[str]
    copies: bool
    bytes: int
    write_seconds: float
    cpu_seconds: float


class LocalSaver:
    """Saves to the nodes' disks. Made by all ranks together.

    Args:
        folder: `local_folder`.
        run_id: from `run_id`.
    """

    def __init__(self, config: RunConfig, world: World, state: TrainingState, folder: Path, run_id: str):
        self.world, self.state, self.copy = world, state, HostImage(state)
        self.folder = folder / f"run_{run_id}"
        self.attempt: str = gather_objects(uuid.uuid4().hex[:8])[0]
        self.run_id, self._run_file = run_id, Path(config.run_dir) / RUN_FILE
        self._noted = False  # the run's ID, in its folder
        self.nodes = ranks_by_node()
        holders = copy_holders(self.nodes)
        self._exchange = Exchange(world.rank, holders) if holders else None
        self._thread: threading.Thread | None = None
        self._own_done = threading.Event()
        self._own: LocalPart | None = None
        self._result: dict[str, Any] = {}
        self._step = 0
        self.kept: list[Path] = []
        self.begun_at = time.monotonic()  # the last one, or this object
        self.begin_seconds = 0.0  # for which training waited when it was

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished."""
        return self._thread is not None

    @property
    def written(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def _temporary(self) -> Path:
        return self.folder / f"step_{self._step:08d}_{self.attempt}"

    def begin(self, meta: dict[str, Any]) -> Part:
        """Begin a checkpoint, where none is pending.

        Returns:
            The host copy of this rank's part, which is read until `written`.
        """
        self._step, self.begun_at, start = meta["step"], time.monotonic(), time.perf_counter()
        part = self.copy.take()
        record = {
            "step": self._step, "attempt": self.attempt, "rank": self.world.rank, "world_size": self.world.world_size,
            "meta": meta | {"shapes": self.state.shapes, "adam_step": self.state.adam_step},
            "statistics": base64.b64encode(save(host_statistics(self.state))).decode(),
        }  # fmt: skip
        self._own, self._result = None, {"errors": []}
        self._own_done.clear()
        if self.world.main and not self._noted:
            self._note_run()
        self._thread = threading.Thread(target=self._write, args=(record,), name="local-checkpoint", daemon=True)
        self._thread.start()
        self.begin_seconds = time.perf_counter() - start
        return part

    def _note_run(self) -> None:
        """Write the run's ID into its folder: local checkpoints belong to the run whose folder says so."""
        try:
            write_json(self._run_file, {"run": self.run_id}, make_folder=False)
            self._noted = True
        except (UserError, OSError) as e:
            self._result["errors"].append(str(e))

    def _write(self, record: dict[str, Any]) -> None:
        """This rank's part to its node's disk and to another node's, and others' to this one's; into `self._result`."""
        start, there = time.perf_counter(), []
        image = self.copy.image
        try:
            if self._exchange is not None:
                self._exchange.send(image)
            own = _PartWriter(self._temporary, part_name(self.world.rank))
            for piece in chunks(image.numpy().data):
                own.write(piece)
            record |= {"bytes": own.size, "checksum": own.checksum.value}
            if own.finish(record):
                there.append(self.world.rank)
                self._own = LocalPart(own.path, own.size, own.checksum.value)
            errors = [own.error]
            self._own_done.set()
            if self._exchange is not None:
                self._exchange.send_record(json.dumps(record).encode())
                for rank in self._exchange.sources:
                    copy = _PartWriter(self._temporary, f"rank_{rank:05d}.copy.safetensors")
                    if copy.finish(json.loads(self._exchange.receive(rank, copy.write)), checked=True):
                        there.append(rank)
                    errors.append(copy.error)
                self._exchange.wait()
            self._result["errors"] += [e for e in errors if e]
        except Exception as e:  # of the network: training goes on, as far as it can without that rank
            self._result["errors"].append(f"copies to other nodes failed: {e}")
            self._result["disconnected"] = True
        self._own_done.set()
        self._result |= {"there": there, "bytes": len(image), "seconds": time.perf_counter() - start}
        self._result |= {"cpu_seconds": time.thread_time()}

    def wait_for_own(self) -> LocalPart | None:
        """Wait until this rank's part is on its node's disk; None where it can't be written."""
        self._own_done.wait()
        return self._own

    def finish(self) -> Finished | None:
        """Wait for the pending checkpoint, and remove those that it makes superfluous; None if none is. Collective."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        results = gather_objects(self._result)
        whole = {r for x in results for r in x["there"]} == set(range(self.world.world_size))
        if any("disconnected" in x for x in results):
            self._exchange = None
        if whole:
            self.kept = [*self.kept, self._temporary][-KEEP:]
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if whole and self.folder.is_dir():
            self._prune()
        errors = list(dict.fromkeys(e for x in results for e in x["errors"]))
        return Finished(
            self._step, whole, errors, self._exchange is not None,
            bytes=sum(x["bytes"] for x in results), write_seconds=max(x["seconds"] for x in results),
            cpu_seconds=max(x["cpu_seconds"] for x in results),
        )  # fmt: skip

    def _prune(self) -> None:
        """Remove what is older, and what former starts of the training left; another rank may be writing the next one."""
        for path in self.folder.iterdir():
            later = path.name.endswith(f"_{self.attempt}") and path.name > self._temporary.name
            if path not in self.kept and not later:
                shutil.rmtree(path, ignore_errors=True)

    def close(self, remove: bool) -> None:
        """Wait a while for what is being written.

        Args:
            remove: the run is done: remove its folder from this node's disk.
        """
        if self._thread is not None:
            self._thread.join(20)
        if remove and self.written:
            shutil.rmtree(self.folder, ignore_errors=True)


class _PartWriter:
    """Writes a part's file; where it can't, it goes on without, as other nodes wait for what this rank sends."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.checksum, self.size, self.error = Checksum(), 0, ""
        self._hidden = folder / f".{name}.tmp"
        self._file: int | None = None  # its descriptor
        with self._noting_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_direct(self._hidden)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            with full_disk_is_user_error(self.path):
                yield
        except (UserError, OSError) as e:
            self.fail(str(e))

    def write(self, data: memoryview) -> None:
        """Append `CHUNK` bytes, or the last ones."""
        self.checksum.add(data)
        self.size += len(data)
        if self._file is None:
            return
        with self._noting_errors():
            pages = len(data) // PAGE * PAGE
            _write_all(self._file, data[:pages])
            if pages < len(data):  # at the end
                _set_direct(self._file, False)
                _write_all(self._file, data[pages:])

    def fail(self, error: str) -> None:
        """Note the first error, and leave nothing of the file."""
        self.error = self.error or error
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for path in (self._hidden, self.path):
            with contextlib.suppress(OSError):
                path.unlink()

    def finish(self, record: dict[str, Any], checked: bool = False) -> bool:
        """Give the file its name, and write its record; whether both are there.

        Args:
            checked: compare with the record that the sender made.
        """
        if checked and (record["bytes"], record["checksum"]) != (self.size, self.checksum.value):
            self.fail(f"{self.path} did not arrive as it was sent")
        if self._file is None:
            return False
        with self._noting_errors():
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
            self._hidden.replace(self.path)
            write_json(self.path.with_suffix(".json"), record)
        return not self.error


def _write_all(file: int, data: memoryview) -> None:
    """Write to a descriptor, directly if it is set so and the file system can."""
    while data:
        try:
            data = data[os.write(file, data) :]
        except OSError as e:
            if e.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(file, False)


def _open_direct(path: Path) -> int:
    """A descriptor past the system's page cache: filling that takes more processor time than all else."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with contextlib.suppress(OSError):  # tmpfs has no other way
        _set_direct(file, True)
    return file


def _set_direct(file: int, on: bool) -> None:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
