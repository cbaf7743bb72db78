"""Writing checkpoints, by all ranks together, whole or not at all, in the background where that is wanted; and going
on from one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.weights import save_tensors
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, all_or_none, gather_objects
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.engine.engine import set_counters
from dit_ds.engine.zero_state import Fragment, TrainingState, digest
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, sha256_of, write_json

_CHUNK = 1 << 24  # bytes written and hashed at once
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Saver:
    """Saves a run's checkpoints.

    Each rank writes its own ranges into a hidden folder, rank 0 adds meta data and manifest and gives the folder its
    name. In the background a rank's ranges are first copied to host memory, which is all that training waits for.

    Args:
        frozen: the file of what doesn't train, from `store_frozen`; None leaves it out.
    """

    def __init__(self, config: RunConfig, world: World, state: TrainingState, frozen: Path | None):
        self.config, self.world, self.state, self.frozen = config, world, state, frozen
        self.folder = Path(config.run_dir) / "checkpoints"
        self._thread: threading.Thread | None = None
        self._meta: dict[str, Any] | None = None
        self._copies: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}  # BatchNorm's, of the pending checkpoint
        self._entry: dict[str, Any] = {}  # this rank's in the pending checkpoint's manifest
        self._frozen_entry: dict[str, Any] | None = None
        self.published: int | None = None  # the last step that was

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not committed."""
        return self._meta is not None

    @property
    def _pending_meta(self) -> dict[str, Any]:
        if self._meta is None:
            raise RuntimeError("no checkpoint is pending")
        return self._meta

    @property
    def step(self) -> int:
        """Of the pending checkpoint."""
        return self._pending_meta["step"]

    @property
    def written(self) -> bool:
        """Whether this rank's part of the pending checkpoint is written, or failed."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, meta: dict[str, Any]) -> float:
        """Begin a checkpoint, where none is pending; return the seconds for which training waited."""
        start = time.perf_counter()
        self._meta = meta | {"shapes": self.state.shapes, "adam_step": self.state.adam_step}
        background = self.config.checkpoint.asynchronous
        tensor = self._copy if background else self.state.tensor
        parts = [
            (kind, f, tensor(kind, f))
            for kind in self.state.all_kinds()
            for f in self.state.saved()
            if kind in self.state.kinds(f)
        ]
        self._statistics = {n: x.to("cpu", copy=True) for n, x in running_statistics(self.state.engine.module).items()}
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        if background:
            self._thread = threading.Thread(target=self._write, args=(parts,), name="checkpoint")
            self._thread.start()
        else:
            self._thread = None
            self._write(parts)
        return time.perf_counter() - start

    def _copy(self, kind: str, f: Fragment) -> Tensor:
        """A host copy, in memory that is kept from one checkpoint to the next."""
        live = self.state.tensor(kind, f)
        key = f"{kind}/{f.name}"
        if key not in self._copies:
            self._copies[key] = torch.empty(f.numel, dtype=live.dtype, pin_memory=live.is_cuda)
        return self._copies[key].copy_(live, non_blocking=True)

    def _write(self, parts: list[tuple[str, Fragment, Tensor]]) -> None:
        """This rank's file; its manifest entry, or the error, in `self._entry`."""
        start = time.perf_counter()
        try:
            name = f"rank_{self.world.rank:05d}.safetensors"
            with full_disk_is_user_error(self._temporary):
                self._temporary.mkdir(parents=True, exist_ok=True)
                entry = _write_ranges(self._temporary / name, parts)
            self._entry = entry | {"name": name, "seconds": time.perf_counter() - start}
        except Exception as e:  # whatever it is, the other ranks must hear of it
            self._entry = {"error": str(e)}

    @property
    def _temporary(self) -> Path:
        return self.folder / f".step_{self.step:08d}.tmp"

    def commit(self) -> dict[str, float]:
        """Wait for all ranks' parts, and publish the checkpoint. Collective.

        Returns:
            `bytes` of all parts and `write_seconds` of the slowest.
        Raises:
            UserError: on every rank, if any couldn't write; the former checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
        meta, temporary = self._pending_meta, self._temporary
        entries = gather_objects(self._entry)
        self._meta = self._thread = None
        error: Exception | None = next((UserError(e["error"]) for e in entries if "error" in e), None)
        try:
            if self.world.main and error is None:
                with full_disk_is_user_error(temporary):
                    self._publish(temporary, meta, entries)
        except Exception as e:  # of rank 0: the others wait for what it says
            error = e
        if self.world.main and error is not None:  # before the others may begin the next
            shutil.rmtree(temporary, ignore_errors=True)
        try:
            all_or_none(error)
        except UserError as e:
            raise UserError(f"checkpoint of step {meta['step']} not saved: {e}") from None
        self.published = meta["step"]
        return {"bytes": sum(e["bytes"] for e in entries), "write_seconds": max(e["seconds"] for e in entries)}

    def _publish(self, temporary: Path, meta: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        kinds = dict.fromkeys(k for e in entries for k in e["digest"])
        totals = {k: sum(e["digest"].get(k, 0) for e in entries) % (1 << 64) for k in kinds}
        meta["digest"] = {k: f"{v:016x}" for k, v in totals.items()}
        files = {e["name"]: {"bytes": e["bytes"], "sha256": e["sha256"]} for e in entries}
        if self.frozen is not None:
            checkpoint.link(self.frozen, temporary / checkpoint.FROZEN)
            self._frozen_entry = self._frozen_entry or _entry(self.frozen)
            files[checkpoint.FROZEN] = self._frozen_entry
        if self._statistics:
            save_tensors(self._statistics, temporary / checkpoint.STATISTICS)
            files[checkpoint.STATISTICS] = _entry(temporary / checkpoint.STATISTICS)
        write_json(temporary / "meta.json", meta)
        files["meta.json"] = _entry(temporary / "meta.json")
        write_json(temporary / "manifest.json", {"files": files})
        _sync_folder(temporary)
        final = self.folder / f"step_{meta['step']:08d}"
        checkpoint.replace(final, temporary)
        _sync_folder(self.folder)
        progress = meta["progress"]
        if progress["best_step"]:  # each time: a kill may have come between the best checkpoint and its note
            name = "giou" if "giou" in progress["metrics"] else "miou"
            best = {"step": progress["best_step"], name: progress["best_score"]}
            write_json(self.folder.parent / "best.json", best)
        self._prune(final, self.folder / f"step_{progress['best_step']:08d}")

    def _prune(self, newest: Path, best: Path) -> None:
        """Keep the best and the newest so many; later ones are damaged, as the run went on from before them."""
        there = checkpoint.all_checkpoints(self.config.run_dir)
        keep = [p for p in there if p <= newest][-self.config.checkpoint.keep :]
        for path in there:
            if path not in keep and path != best:
                checkpoint.remove(path)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write_ranges(path: Path, parts: list[tuple[str, Fragment, Tensor]]) -> dict[str, Any]:
    """Stream tensors to a safetensors file, hashed on the way: no copy of them all is made.

    Returns:
        `bytes`, `sha256`, and by kind the `digest` of the values.
    """
    header: dict[str, Any] = {"__metadata__": {"ranges": json.dumps({f.name: [f.start, f.numel] for _, f, _ in parts})}}
    end = 0
    for kind, f, x in parts:
        size = x.numel() * x.element_size()
        header[f"{kind}/{f.name}"] = {"dtype": _DTYPES[x.dtype], "shape": [f.numel], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digests: dict[str, int] = {}
    with open(path, "wb") as file:
        out = _Hashed(file)
        out.write(len(text).to_bytes(8, "little") + text)
        for kind, f, x in parts:
            x = x.cpu()
            digests[kind] = digests.get(kind, 0) + digest(f.name, f.start, x)
            out.write(memoryview(x.view(torch.uint8).numpy().data))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": out.sha.hexdigest(), "digest": digests}


class _Hashed:
    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        for at in range(0, len(data), _CHUNK):
            piece = data[at : at + _CHUNK]
            self.file.write(piece)
            self.sha.update(piece)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(engine: Any, state: TrainingState, path: Path) -> None:
    """Fill an engine, of any world size and ZeRO stage, from a checkpoint, and compare digests. Collective.

    The module's weights are those that `weights.load_weights` put there before DeepSpeed got it.

    Raises:
        UserError: on every rank, if any rank's part is damaged or other parameters train.
    """
    error: UserError | None = None
    mine: dict[str, int] = {}
    try:
        reader = checkpoint.Reader(path)
        if reader.shapes != state.shapes:
            other = sorted(reader.shapes.keys() ^ state.shapes.keys())[:1]
            raise UserError(f"{path} trained other parameters ({', '.join(other)}): freeze the same as then")
        state.load(reader.read, reader.kinds, reader.meta["adam_step"])
        set_counters(engine, reader.meta["engine"])
        for f in state.saved():
            for kind in reader.kinds & set(state.kinds(f)):
                rounded = kind in state.optimizer.rounded
                x = reader.read(kind, f.name, f.start, f.numel) if rounded else state.tensor(kind, f)
                mine[kind] = mine.get(kind, 0) + digest(f.name, f.start, x)
    except UserError as e:
        error = e
    all_or_none(error)
    parts = gather_objects(mine)
    reader.compare({kind: sum(p.get(kind, 0) for p in parts) for kind in set().union(*parts)})
