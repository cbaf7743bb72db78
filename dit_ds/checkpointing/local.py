"""Checkpoints on the nodes' own disks, which are quick to write: `checkpoint.local`.

`LOCAL/run_ID/step_00001200_ATTEMPT/` holds `rank_00000.safetensors` of each of the node's ranks, `rank_00001.copy.safetensors`
of ranks of the node before it, and beside each file a record of it, `.json`, which is written last. ID is the run's, from
`local.json` in its folder; ATTEMPT is of one start of the training. A checkpoint is whole if every rank's part of one
attempt lies on some node, so that nothing is published: `local_resume.py` looks for what is there.
"""

from __future__ import annotations

import base64
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
from dit_ds.checkpointing.part_writer import PartWriter
from dit_ds.checkpointing.parts import CHUNK, HostImage, Part, part_name
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, gather_objects
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import UserError
from dit_ds.files import write_json

RUN_FILE = "local.json"  # in the run's folder: its ID, `checkpoint.local`, and the step of the last one there
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


def other_runs(folder: Path, run_id: str | None) -> tuple[int, int]:
    """How many other runs have checkpoints on this node's disk, and their bytes."""
    others = [p for p in folder.glob("run_*") if p.name != f"run_{run_id}"]
    return len(others), sum(p.stat().st_blocks * 512 for other in others for p in _files(other))


def _files(folder: Path) -> Iterator[Path]:
    """Those that are there when they are looked at: other runs may be writing."""
    for path in folder.glob("step_*/*"):
        if path.is_file():
            yield path


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
        copies: whether nothing is wrong with sending parts to other nodes.
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
        self._run_file = Path(config.run_dir) / RUN_FILE
        self._run = {"run": run_id, "folder": config.checkpoint.local}
        self.nodes = ranks_by_node()
        self._holders = copy_holders(self.nodes)
        self._exchange = Exchange(world.rank, self._holders) if self._holders else None
        self._exchange_failures = 0  # of connecting anew, in a row
        self._saves_until_retry = 0
        self._thread: threading.Thread | None = None
        self._own_done = threading.Event()
        self._own: LocalPart | None = None
        self._result: dict[str, Any] = {}
        self._step = 0
        self.kept: list[Path] = []
        self.begun_at = time.monotonic()  # the last one, or this object
        self._begin_seconds = 0.0

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

    @property
    def waited_seconds(self) -> float:
        """For which training has waited for the pending checkpoint until now."""
        return self._begin_seconds + self.copy.waited

    def begin(self, meta: dict[str, Any]) -> Part:
        """Begin a checkpoint, where none is pending. Collective.

        Returns:
            The host copy of this rank's part, which is whole after `wait_for_own`, and read until `written`.
        """
        self._step, self.begun_at, start = meta["step"], time.monotonic(), time.perf_counter()
        problem = self._connect_anew() if self._holders and self._exchange is None else ""
        part = self.copy.begin()
        record = {
            "step": self._step, "attempt": self.attempt, "rank": self.world.rank, "world_size": self.world.world_size,
            "meta": meta | {"shapes": self.state.shapes, "adam_step": self.state.adam_step},
            "statistics": base64.b64encode(save(host_statistics(self.state))).decode(),
        }  # fmt: skip
        self._own, self._result = None, {"errors": [problem] if problem else []}
        self._own_done.clear()
        self._thread = threading.Thread(target=self._write, args=(record,), name="local-checkpoint", daemon=True)
        self._thread.start()
        self._begin_seconds = time.perf_counter() - start - self.copy.waited
        return part

    def _connect_anew(self) -> str:
        """After an error of the network, at the next save; where it fails, each time later. Collective.

        Returns:
            What is wrong.
        """
        if self._saves_until_retry:
            self._saves_until_retry -= 1
            return "no connection for copies on other nodes"
        error = ""
        try:
            self._exchange = Exchange(self.world.rank, self._holders)
        except Exception as e:  # training goes on without copies
            error = f"no connection for copies on other nodes: {e}"
        if error := next(filter(None, gather_objects(error)), ""):
            self._disconnect()
            self._exchange_failures += 1
            self._saves_until_retry = self._exchange_failures
        else:
            self._exchange_failures = 0
        return error

    def _disconnect(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None

    def _note_run(self) -> None:
        """Write the run's ID into its folder, on rank 0: local checkpoints belong to the run whose folder says so."""
        try:
            write_json(self._run_file, self._run | {"step": self._step}, make_folder=False)
        except (UserError, OSError) as e:
            self._result["errors"].append(str(e))

    def _write(self, record: dict[str, Any]) -> None:
        """Copy, write and send this rank's part, and write those that other ranks send; into `self._result`."""
        start, exchange = time.perf_counter(), self._exchange
        there: list[int] = []
        self._result |= {"there": there, "bytes": len(self.copy.image), "disconnected": False}
        try:
            self._prune()
            if self._write_own(record):
                there.append(self.world.rank)
            self._own_done.set()
            if self.world.main:
                self._note_run()
            if exchange is not None:
                exchange.send_record(json.dumps(record).encode())
                there += [rank for rank in exchange.sources if self._write_copy(exchange, rank)]
                exchange.wait()
                self._result["disconnected"] = bool(exchange.error)
                self._result["errors"] += [exchange.error] if exchange.error else []
        except Exception as e:  # training goes on, as far as it can without this checkpoint
            self._result["errors"].append(f"{type(e).__name__}: {e}")
            self._result["disconnected"] = (
                exchange is not None
            )  # what was not received would be taken for the next one's
        self._own_done.set()
        self._result |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.thread_time()}

    def _write_own(self, record: dict[str, Any]) -> bool:
        """This rank's part to its node's disk and to another node; `record` gets its size and checksum."""
        image, exchange = self.copy.image, self._exchange
        own = PartWriter(self._temporary, part_name(self.world.rank))
        if exchange is not None:
            exchange.send_size(len(image))
        for at in range(0, len(image), CHUNK):
            self.copy.fill(at + CHUNK)
            piece = image[at : at + CHUNK]
            if exchange is not None:
                exchange.send(piece)
            own.write(piece.numpy().data)
        record |= {"bytes": own.size, "checksum": own.checksum.value}
        if own.finish(record):
            self._own = LocalPart(own.path, own.size, own.checksum.value)
        self._result["errors"] += [own.error] if own.error else []
        return self._own is not None

    def _write_copy(self, exchange: Exchange, rank: int) -> bool:
        """Another rank's part to this node's disk; whether it is there."""
        copy = PartWriter(self._temporary, f"rank_{rank:05d}.copy.safetensors")
        text = exchange.receive(rank, copy.write)
        if text is None:
            copy.abandon()
            return False
        done = copy.finish(json.loads(text), checked=True)
        self._result["errors"] += [copy.error] if copy.error else []
        return done

    def wait_for_own(self) -> LocalPart | None:
        """Wait until this rank's part is on its node's disk; None where it can't be written."""
        self._own_done.wait()
        return self._own

    def finish(self) -> Finished | None:
        """Wait for the pending checkpoint; None if none is. Collective."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        results = gather_objects(self._result)
        whole = {r for x in results for r in x["there"]} == set(range(self.world.world_size))
        if any(x["disconnected"] for x in results):
            self._disconnect()
        if whole:
            self.kept = [*self.kept, self._temporary][-KEEP:]
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)
        errors = list(dict.fromkeys(e for x in results for e in x["errors"]))
        return Finished(
            self._step, whole, errors, self._exchange is not None or not self._holders,
            bytes=sum(x["bytes"] for x in results), write_seconds=max(x["seconds"] for x in results),
            cpu_seconds=max(x["cpu_seconds"] for x in results),
        )  # fmt: skip

    def _prune(self) -> None:
        """Remove what whole checkpoints make superfluous, and what former starts of the training left.

        Not in the thread that trains: a file system takes a while to free gigabytes.
        """
        if not self.kept or not self.folder.is_dir():
            return
        for path in self.folder.glob("step_*"):
            being_written = path.name.endswith(f"_{self.attempt}") and path.name >= self._temporary.name
            if path not in self.kept and not being_written:
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
