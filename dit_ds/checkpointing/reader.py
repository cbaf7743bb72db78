"""What a checkpoint is: a folder that is whole or not there, found, checked and read.

`checkpoints/step_00001200/` holds `rank_*.safetensors` (of each rank its ranges of the trained parameters: master
weights, Adam's moments, moving average), `frozen.safetensors` (what doesn't change, linked to one file of the run), of
models with BatchNorm `statistics.safetensors` (its running ones, the same on all ranks), `meta.json` and
`manifest.json` (every file's size and SHA-256). Any world size and any ZeRO stage reads it: ranges are found by
parameter name. `saver.py` writes it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from dit_ds.checkpointing.integrity import damage_is_user_error, damaged, damages, manifest_files, require_readable
from dit_ds.checkpointing.meta import Count, read_meta
from dit_ds.distributed import World, all_or_none, gather_objects
from dit_ds.engine.zero_state import MASTER, digest
from dit_ds.errors import UserError
from dit_ds.files import parse_json, read_json, replace_on_success, sha256_of

_RANGES = TypeAdapter(dict[str, tuple[Count, Count]])
FROZEN, STATISTICS = "frozen.safetensors", "statistics.safetensors"
_log = logging.getLogger("dit_ds")


def all_checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p.parent for p in Path(run_dir).glob("checkpoints/step_*/manifest.json"))


def find(path: str | Path) -> Path:
    """A checkpoint from its own folder, or from a run's: its best, else its newest. An exported file is one itself.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "manifest.json").exists() or path.is_file():
        return path
    if (path / "meta.json").exists():
        raise UserError(f"checkpoint {path} has no manifest.json, so it is not whole: use another of the run's")
    checkpoints = all_checkpoints(path)
    if not checkpoints:
        raise UserError(
            f"no checkpoint in {path}: give a run's folder, one of its checkpoints/step_*, or an exported file"
        )
    best = path / "best.json"
    if not best.exists():
        return checkpoints[-1]
    try:
        require_readable(best)
        step = int(read_json(best, "best score")["step"])
    except (UserError, LookupError, TypeError, ValueError, OverflowError) as e:
        step = read_meta(checkpoints[-1])["progress"]["best_step"]
        _log.warning(f"warning: {best} is damaged ({e}): using the best step that {checkpoints[-1]} names, {step}")
    chosen = path / "checkpoints" / f"step_{step:08d}"
    if chosen not in checkpoints:
        _log.warning(
            f"warning: the best checkpoint, of step {step}, is not in {path}: using the newest, {checkpoints[-1]}"
        )
        return checkpoints[-1]
    return chosen


def newest_whole(run_dir: str | Path, world: World) -> Path | None:
    """The newest checkpoint whose every byte is what was written; damaged ones are passed over with a warning. Collective.

    What a killed run left half done is cleared first. None where the run has no checkpoint yet.

    Raises:
        UserError: there are checkpoints, and all are damaged; or one may not be read.
    """
    if world.main:
        clear_rests(Path(run_dir) / "checkpoints")
    there = gather_objects([str(p) for p in _folders(run_dir)])[0]  # all ranks look at the same list
    for path in map(Path, reversed(there)):
        error: UserError | None = None
        found: list[str] = []
        try:
            found = damages(path, world.rank, world.world_size)
        except UserError as e:
            error = e
        all_or_none(error)
        wrong = [w for of_rank in gather_objects(found) for w in of_rank]
        if not wrong:
            return path
        if all(w.startswith(f"{FROZEN} ") for w in wrong):  # they can be read from where they came from
            if world.main:
                _log.warning(f"warning: {path}: {wrong[0]}; reading the frozen weights from their sources")
                _set_frozen_aside(path)
            gather_objects(None)
            return path
        if world.main:
            _log.warning(f"warning: checkpoint {path} is damaged ({wrong[0]}): going back to the one before")
    if there:
        raise UserError(
            f"all {len(there)} checkpoints of {run_dir} are damaged (the newest: {wrong[0]}): bring one back, or start "
            "over with another --run_dir"
        )
    if saved := gather_objects(_saved_steps(Path(run_dir)))[0]:
        raise UserError(
            f"{run_dir} has no checkpoint, but its metrics.jsonl says that one was saved at step {saved[-1]}: bring it "
            "back, or start over with another --run_dir"
        )
    return None


def _set_frozen_aside(path: Path) -> None:
    """Rename a damaged file of frozen weights, the checkpoint's and the run's, which may be one."""
    stored = path.parent.parent / f"frozen/{read_meta(path)['frozen']}.safetensors"
    for file in (path / FROZEN, stored):
        if file.exists():
            file.replace(file.with_name(f"{file.name}.damaged"))


def relink_frozen(run_dir: str | Path, frozen: Path) -> None:
    """Give a run's restored file of frozen weights to all its checkpoints that had it by their manifest, and lack it."""
    sha = sha256_of(frozen)
    for path in all_checkpoints(run_dir):
        file = path / FROZEN
        if manifest_files(path).get(FROZEN, {}).get("sha256") == sha and not (file.exists() and file.samefile(frozen)):
            with replace_on_success(file) as temporary:
                link(frozen, temporary)


def link(source: Path, target: Path) -> None:
    """A hard link, so that a copied checkpoint is complete; a symbolic one where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(os.path.relpath(source, target.parent))


def _folders(run_dir: str | Path) -> list[Path]:
    """All that have a checkpoint's name, oldest first, finished or not."""
    return sorted(p for p in Path(run_dir).glob("checkpoints/step_*") if p.is_dir())


def _saved_steps(run_dir: Path) -> list[int]:
    """Steps at which a run's metrics say that a checkpoint was saved."""
    path, steps = run_dir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = parse_json(line)
            if entry["kind"] == "save":
                steps.append(int(entry["step"]))
        except (ValueError, LookupError, TypeError, OverflowError):  # a line that a kill cut short
            continue
    return steps


class Reader:
    """A checkpoint's trained parameters, by name and range.

    Raises:
        UserError: a file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.meta = path, read_meta(path)
        self.shapes: dict[str, list[int]] = self.meta["shapes"]
        self.kinds = set(self.meta["digest"])
        self._where: dict[str, list[tuple[int, int, Path]]] = {}
        self._files: dict[Path, Any] = {}
        with damage_is_user_error(path):
            for file in sorted(path / n for n in manifest_files(path) if n.startswith("rank_")):
                for name, (start, numel) in self._ranges(file).items():
                    self._where.setdefault(name, []).append((start, numel, file))

    def _ranges(self, file: Path) -> dict[str, tuple[int, int]]:
        try:
            return _RANGES.validate_json((self._open(file).metadata() or {}).get("ranges", ""))
        except ValidationError as e:
            raise damaged(self.path, f"the ranges in {file.name}: {e.errors()[0]['msg']}") from None

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(file, "pt")
        return self._files[file]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """(numel,) of a parameter's `kind`, from element `start` on."""
        pieces: list[tuple[int, int, int, Any]] = []
        with damage_is_user_error(self.path):
            for at, length, file in self._where.get(name, []):
                low, high = max(at, start), min(at + length, start + numel)
                if low < high:
                    held = self._open(file).get_slice(f"{kind}/{name}")
                    if held.get_shape() != [length]:
                        raise damaged(self.path, f"{file.name} has {kind}/{name} in another length than it says")
                    pieces.append((at, low, high, held))
            if sum(high - low for _, low, high, _ in pieces) != numel:  # before memory for it is taken
                raise damaged(self.path, f"{name} is not whole")
            out = torch.empty(numel)
            for at, low, high, held in pieces:
                out[low - start : high - start] = held[low - at : high - at]
        return out

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every trained parameter's `kind`, compared with the digest that was taken when it was saved."""
        out, total = {}, 0
        for name, shape in self.shapes.items():
            flat = self.read(kind, name, 0, torch.Size(shape).numel())
            total += digest(name, 0, flat)
            out[name] = flat.view(shape)
        self.compare({kind: total})
        return out

    def compare(self, digests: dict[str, int]) -> None:
        """Compare digests, by kind, with those taken when the checkpoint was saved.

        Raises:
            UserError: another.
        """
        for kind, total in digests.items():
            if f"{total % (1 << 64):016x}" != self.meta["digest"][kind]:
                raise damaged(self.path, f"the {kind} digest differs")


def remove(path: Path) -> None:
    """Remove a checkpoint; no reader sees half of it, and nobody waits for the disk to free gigabytes."""
    trash = path.with_name(f".removed_{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    _remove_later(trash)


def replace(path: Path, new: Path) -> None:
    """Give `new` the name `path`; a former one of that name is there until then, or comes back by `clear_rests`."""
    former = path.with_name(f".replaced_{path.name}")
    if path.exists():
        path.rename(former)
    new.rename(path)
    if former.exists():
        _remove_later(former)


def _remove_later(folder: Path) -> None:
    threading.Thread(target=shutil.rmtree, args=(folder, True), name="remove").start()


def clear_rests(folder: Path) -> None:
    """Remove what a killed run left half done, and bring back what it was about to replace."""
    for former in folder.glob(".replaced_*"):
        path = folder / former.name.removeprefix(".replaced_")
        if not path.exists():
            former.rename(path)
    for rest in [*folder.glob(".step_*.tmp"), *folder.glob(".removed_*"), *folder.glob(".replaced_*")]:
        shutil.rmtree(rest, ignore_errors=True)


def best_kind(meta: dict[str, Any]) -> str:
    """The weights to evaluate: the moving average where one was kept."""
    return "ema" if "ema" in meta["digest"] else MASTER


def check_resumable(path: Path, expected: dict[str, Any]) -> None:
    """Compare what must not change between stop and start with what the checkpoint says.

    Raises:
        UserError: it changed.
    """
    meta = read_meta(path)
    for key, value in expected.items():
        was = meta.get(key, "adamw" if key == "optimizer" else None)  # the only one when there was no such key
        if was != value:
            raise UserError(f"{path} was saved with {key} {was}, this run has {value}: resume with the same")
