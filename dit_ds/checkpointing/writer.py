"""Writing checkpoints, by all ranks together, whole or not at all, in the background where that is wanted; and going
on from one."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from torch import Tensor

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.local import LocalPart, LocalSaver, host_statistics
from dit_ds.checkpointing.parts import HostCopy, Part, copy_part, digests_of, entry, live_part, part_name, write_part
from dit_ds.checkpointing.weights import save_tensors
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, all_or_none, gather_objects
from dit_ds.engine.engine import set_counters
from dit_ds.engine.zero_state import TrainingState, digest
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, patiently, write_json


class LocalDiskFailed(UserError):
    """A part was written to a node's disk, and can't be copied from there."""


class Saver:
    """Saves a run's checkpoints.

    Each rank writes its own ranges into a hidden folder, rank 0 adds meta data and manifest and gives the folder its
    name. In the background a rank's ranges are first copied to host memory, which is all that training waits for.
    While the run's folder can't be reached, it is waited for (`files.PATIENCE`).

    Args:
        frozen: the file of what doesn't train, from `store_frozen`; None leaves it out.
        local: saves to the nodes' disks; a checkpoint is then written there first, and copied from there.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        state: TrainingState,
        frozen: Path | None,
        local: LocalSaver | None = None,
    ):
        self.config, self.world, self.state, self.frozen, self.local = config, world, state, frozen, local
        self.folder = Path(config.run_dir) / "checkpoints"
        self._thread: threading.Thread | None = None
        self._meta: dict[str, Any] | None = None
        self._copy = local.copy if local else HostCopy(state)
        self._reads_copy = False  # while this rank's part is written from the host copy
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

    @property
    def copy_is_free(self) -> bool:
        """Whether the host copy may be made anew: nothing is written from it, to whichever disk."""
        return not self._reads_copy and (self.local is None or self.local.written)

    def begin(self, meta: dict[str, Any], near: bool = True) -> float:
        """Begin a checkpoint, where none is pending; return the seconds for which training waited.

        Args:
            near: write to the node's disk first, where that is configured. Needs that no local checkpoint is pending.
        """
        start = time.perf_counter()
        self._meta = meta | {"shapes": self.state.shapes, "adam_step": self.state.adam_step}
        background = self.config.checkpoint.asynchronous
        local = self.local if near else None
        if local is not None:
            part = local.begin(meta)
        else:
            part = self._copy.take() if background else live_part(self.state)
        self._statistics = host_statistics(self.state)
        self._reads_copy = True
        if background:
            self._thread = threading.Thread(target=self._write, args=(part, local), name="checkpoint")
            self._thread.start()
        else:
            self._thread = None
            self._write(part, None)
        return time.perf_counter() - start

    def _write(self, part: Part, local: LocalSaver | None) -> None:
        """This rank's file; its manifest entry, or the error, in `self._entry`."""
        start = time.perf_counter()
        try:
            name = part_name(self.world.rank)
            with contextlib.ExitStack() as opened, full_disk_is_user_error(self._temporary):
                source = _open(local.wait_for_own() if local else None, opened)
                self._reads_copy = source is None
                if source is None and local is not None:
                    local.copy.fill()
                file = self._temporary / name
                written = patiently(lambda: self._write_file(file, part, source), self.folder.parent)
            self._entry = written | {"name": name, "seconds": time.perf_counter() - start}
        except Exception as e:  # whatever it is, the other ranks must hear of it
            self._entry = {"error": str(e), "of_local_disk": isinstance(e, LocalDiskFailed)}
        self._reads_copy = False

    def _write_file(self, path: Path, part: Part, source: tuple[BinaryIO, LocalPart] | None) -> dict[str, Any]:
        self.folder.mkdir(exist_ok=True)  # not the run's folder: where that is missing, its file system is away
        path.parent.mkdir(exist_ok=True)
        if source is None:
            return write_part(path, part)
        source[0].seek(0)
        return _copy_of_local(*source, path)

    @property
    def _temporary(self) -> Path:
        return self.folder / f".step_{self.step:08d}.tmp"

    def commit(self) -> dict[str, float]:
        """Wait for all ranks' parts, and publish the checkpoint. Collective.

        Returns:
            `bytes` of all parts and `write_seconds` of the slowest.
        Raises:
            UserError: on every rank, if any couldn't write; the former checkpoints are as they were. `LocalDiskFailed`
                where only nodes' own disks are to blame.
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
            of_disk = all(x.get("of_local_disk", True) for x in entries) and any("error" in x for x in entries)
            kind = LocalDiskFailed if of_disk else UserError
            raise kind(f"checkpoint of step {meta['step']} not saved: {e}") from None
        self.published = meta["step"]
        return {"bytes": sum(e["bytes"] for e in entries), "write_seconds": max(e["seconds"] for e in entries)}

    def _publish(self, temporary: Path, meta: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        if self.frozen is not None:
            self._frozen_entry = self._frozen_entry or entry(self.frozen)
        patiently(lambda: publish(self.config, temporary, meta, entries, statistics=self._statistics,
                                  frozen=self.frozen, frozen_entry=self._frozen_entry), self.folder.parent)  # fmt: skip


def _open(part: LocalPart | None, opened: contextlib.ExitStack) -> tuple[BinaryIO, LocalPart] | None:
    """The part's file on the node's disk, to be read; None where there is none, or it is gone."""
    if part is None:
        return None
    try:
        return opened.enter_context(open(part.path, "rb")), part
    except OSError:
        return None


def publish(
    config: RunConfig,
    temporary: Path,
    meta: dict[str, Any],
    entries: list[dict[str, Any]],
    *,
    statistics: dict[str, Tensor],
    frozen: Path | None,
    frozen_entry: dict[str, Any] | None = None,
) -> Path:
    """Make a checkpoint of a folder with all ranks' parts: the rest is added, and it gets its name. On rank 0.

    Can be called again with the same where it was interrupted.

    Args:
        entries: of the parts, each with `name`, `bytes`, `sha256` and `digest`.
        statistics: BatchNorm's.
        frozen: the file of what doesn't train, to be linked.
        frozen_entry: its entry in the manifest, if that is known.
    """
    kinds = dict.fromkeys(k for e in entries for k in e["digest"])
    totals = {k: sum(e["digest"].get(k, 0) for e in entries) % (1 << 64) for k in kinds}
    meta["digest"] = {k: f"{v:016x}" for k, v in totals.items()}
    files = {e["name"]: {"bytes": e["bytes"], "sha256": e["sha256"]} for e in entries}
    folder = Path(config.run_dir) / "checkpoints"
    final = folder / f"step_{meta['step']:08d}"
    if temporary.is_dir() or not final.is_dir():
        _complete(temporary, meta, files, statistics=statistics, frozen=frozen, frozen_entry=frozen_entry)
        checkpoint.replace(final, temporary)
    _sync_folder(folder)
    progress = meta["progress"]
    if progress["best_step"]:  # each time: a kill may have come between the best checkpoint and its note
        name = "giou" if "giou" in progress["metrics"] else "miou"
        best = {"step": progress["best_step"], name: progress["best_score"]}
        write_json(folder.parent / "best.json", best, make_folder=False)
    _prune(config, final, folder / f"step_{progress['best_step']:08d}")
    return final


def _complete(
    temporary: Path,
    meta: dict[str, Any],
    files: dict[str, Any],
    *,
    statistics: dict[str, Tensor],
    frozen: Path | None,
    frozen_entry: dict[str, Any] | None,
) -> None:
    """Add what is no rank's own, and the manifest of `files` and these."""
    if frozen is not None:
        checkpoint.link(frozen, temporary / checkpoint.FROZEN)
        files[checkpoint.FROZEN] = frozen_entry or entry(frozen)
    if statistics:
        save_tensors(statistics, temporary / checkpoint.STATISTICS)
        files[checkpoint.STATISTICS] = entry(temporary / checkpoint.STATISTICS)
    write_json(temporary / "meta.json", meta, make_folder=False)
    files["meta.json"] = entry(temporary / "meta.json")
    write_json(temporary / "manifest.json", {"files": files}, make_folder=False)
    _sync_folder(temporary)


def _prune(config: RunConfig, newest: Path, best: Path) -> None:
    """Keep the best and the newest so many; later ones are damaged, as the run went on from before them."""
    there = checkpoint.all_checkpoints(config.run_dir)
    keep = [p for p in there if p <= newest][-config.checkpoint.keep :]
    for path in there:
        if path not in keep and path != best:
            checkpoint.remove(path)


def _copy_of_local(source: BinaryIO, part: LocalPart, path: Path) -> dict[str, Any]:
    """Copy a part from the node's disk; it can be read to its end if it is removed meanwhile.

    Raises:
        LocalDiskFailed: it can't be read, or is not what was written there.
    """
    try:
        digests = digests_of(Path(f"/proc/self/fd/{source.fileno()}"))
    except (OSError, SafetensorError, LookupError, ValueError) as e:
        raise LocalDiskFailed(f"{part.path} can't be read back ({e})") from None
    copied = copy_part(source, path)
    if (copied["bytes"], copied.pop("checksum")) != (part.bytes, part.checksum):
        raise LocalDiskFailed(f"{part.path} is not what was written: look at that disk")
    return copied | {"digest": digests}


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
