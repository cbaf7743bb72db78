"""Finding the newest checkpoint that is whole, on the nodes' disks or in the run's folder."""

from __future__ import annotations

import base64
import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.integrity import checked
from dit_ds.checkpointing.local import RUN_FILE, local_folder
from dit_ds.checkpointing.meta import Count, check_meta
from dit_ds.checkpointing.nodes import node_name
from dit_ds.checkpointing.parts import CHUNK, Checksum, copy_part, digests_of, part_name
from dit_ds.checkpointing.writer import publish
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, all_or_none, gather_objects
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, read_json

_ID = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger("dit_ds")


class _Record(BaseModel):
    """What lies beside a part's file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    step: Count
    attempt: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    rank: Count
    world_size: Annotated[int, Field(ge=1, lt=2**20)]
    bytes: Count
    checksum: Count
    meta: dict[str, Any]
    statistics: str


@dataclass(frozen=True)
class _Found:
    """A part on a node's disk."""

    step: int
    attempt: str
    rank: int
    world_size: int
    node: str
    record: str  # its path


def run_id(run_dir: str | Path) -> str | None:
    """The ID that ties local checkpoints to a run's folder; None where there is none yet."""
    try:
        found = read_json(Path(run_dir) / RUN_FILE, "run's ID")["run"]
        return found if _ID.fullmatch(found) else None
    except (UserError, LookupError, TypeError):
        return None


def new_run_id() -> str:
    """For a run that has none."""
    return uuid.uuid4().hex


def newest_checkpoint(config: RunConfig, world: World) -> Path | None:
    """The newest checkpoint that is whole, wherever it lies, as a folder of the run. Collective.

    One that lies on the nodes' disks is copied into the run's folder first.

    Raises:
        UserError: as of `newest_whole`, or the copy can't be written.
    """
    folder = local_folder(config)
    identity = gather_objects(run_id(config.run_dir))[0]
    if folder is None and world.main:
        _say_what_is_not_looked_at(config)
    if folder is None or identity is None:
        return checkpoint.newest_whole(config.run_dir, world)
    whole = _whole_parts(list(_parts_of(folder / f"run_{identity}")), world)
    step = whole[0].step if whole else -1
    there = gather_objects([p.name for p in checkpoint.all_checkpoints(config.run_dir)])[0]
    if not whole or there and _step(there[-1]) >= step:
        newest = None
        try:
            newest = checkpoint.newest_whole(config.run_dir, world)
        except UserError:  # of all ranks alike
            if not whole:
                raise
        if not whole or newest is not None and _step(newest.name) >= step:
            return newest
    if world.main:
        _log.info(f"the newest checkpoint, of step {step}, is on the nodes' disks: copying it to {config.run_dir}")
    return _bring(config, world, whole)


def _say_what_is_not_looked_at(config: RunConfig) -> None:
    """Where this run saved to nodes' disks later than to its folder, and is resumed without `checkpoint.local`."""
    try:
        noted = read_json(Path(config.run_dir) / RUN_FILE, "run's ID")
        folder, step = str(noted["folder"]), int(noted["step"])
    except (UserError, LookupError, TypeError, ValueError):  # there were none
        return
    there = checkpoint.all_checkpoints(config.run_dir)
    if not there or _step(there[-1].name) < step:
        _log.warning(f"warning: a checkpoint of step {step} was written to {folder} on the run's nodes, where nothing is "
                     f"looked for without --checkpoint.local '{folder}'")  # fmt: skip


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _parts_of(folder: Path) -> Iterator[_Found]:
    """The parts on this node's disk whose records can be read, and whose files are as long as they say."""
    for path in sorted(folder.glob("step_*/rank_*.json")):
        try:
            r = checked(path.parent, _Record, read_json(path, "record"), path.name)
            if path.with_suffix(".safetensors").stat().st_size == r["bytes"] and r["rank"] < r["world_size"]:
                yield _Found(
                    **{k: r[k] for k in ("step", "attempt", "rank", "world_size")}, node=node_name(), record=str(path)
                )
        except (UserError, OSError) as e:
            _log.warning(f"warning: {path} can't be used ({e})")


def _whole_parts(mine: list[_Found], world: World) -> list[_Found]:
    """Undamaged parts of all ranks, of the newest local checkpoint for which there are; empty if there is none. Collective."""
    nodes = gather_objects(node_name())
    found = {(x.node, x.record): x for of_rank in gather_objects(mine) for x in of_rank}
    checkpoints: dict[tuple[int, str, int], dict[int, list[_Found]]] = {}
    for x in found.values():
        checkpoints.setdefault((x.step, x.attempt, x.world_size), {}).setdefault(x.rank, []).append(x)
    for (_, _, world_size), parts in sorted(checkpoints.items(), reverse=True):
        if parts.keys() != set(range(world_size)):
            continue
        good: dict[int, _Found] = {}
        while len(good) < world_size and all(parts[r] for r in parts if r not in good):
            tried = {r: parts[r].pop(0) for r in parts if r not in good}
            damaged = {r: _damage(x) for r, x in tried.items() if _reader(x, nodes) == world.rank}
            results: dict[int, str | None] = {}
            for of_rank in gather_objects(damaged):
                results |= of_rank
            for r, wrong in results.items():
                if wrong is None:
                    good[r] = tried[r]
                elif world.main:
                    _log.warning(f"warning: {tried[r].record} on {tried[r].node}: {wrong}")
        if len(good) == world_size:
            return [good[r] for r in range(world_size)]
    return []


def _reader(part: _Found, nodes: list[str]) -> int:
    """The rank that reads a part: the ranks of its node share them."""
    there = [r for r, node in enumerate(nodes) if node == part.node]
    return there[part.rank % len(there)]


def _damage(part: _Found) -> str | None:
    """What is wrong with a part's file."""
    checksum, path = Checksum(), Path(part.record)
    try:
        with open(path.with_suffix(".safetensors"), "rb") as f:
            while data := f.read(CHUNK):
                checksum.add(data)
        return None if checksum.value == read_json(path, "record")["checksum"] else "its file is not what was written"
    except (OSError, UserError, LookupError, TypeError) as e:
        return str(e)


def _bring(config: RunConfig, world: World, parts: list[_Found]) -> Path:
    """Make a checkpoint in the run's folder of parts on the nodes' disks. Collective."""
    folder, step = Path(config.run_dir) / "checkpoints", parts[0].step
    temporary = folder / f".step_{step:08d}.tmp"
    nodes = gather_objects(node_name())
    error: UserError | None = None
    try:
        if world.main:
            with full_disk_is_user_error(temporary):
                checkpoint.clear_rests(folder)
                temporary.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as e:
        error = UserError(str(e))
    all_or_none(error)
    entries: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    try:
        for part in (p for p in parts if _reader(p, nodes) == world.rank):
            file = Path(part.record).with_suffix(".safetensors")
            with full_disk_is_user_error(temporary), open(file, "rb") as f:
                temporary.mkdir(parents=True, exist_ok=True)  # other hosts may not see it yet
                copied = copy_part(f, temporary / part_name(part.rank))
            entries.append(copied | {"name": part_name(part.rank), "digest": digests_of(file)})
            if part.rank == 0:
                first = read_json(part.record, "record")
    except (UserError, OSError, SafetensorError, LookupError, ValueError, TypeError) as e:
        error = UserError(str(e))
    all_or_none(error)
    gathered = gather_objects((entries, first))
    final: Path | None = None
    try:
        if world.main:
            record = next(x for _, x in gathered if x is not None)
            final = _publish(config, temporary, record, [e for of_rank, _ in gathered for e in of_rank])
    except (UserError, OSError, SafetensorError, ValueError) as e:
        error = UserError(str(e))
    all_or_none(error)
    return Path(gather_objects(str(final))[0])


def _publish(config: RunConfig, temporary: Path, record: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    statistics = safetensors.torch.load(base64.b64decode(record["statistics"]))
    zeros = dict.fromkeys((k for e in entries for k in e["digest"]), "0" * 16)  # `publish` adds them up
    meta = check_meta(temporary, record["meta"] | {"digest": zeros}, "a part's record")
    frozen: Path | None = Path(config.run_dir) / f"frozen/{meta['frozen']}.safetensors"
    if config.checkpoint.frozen != "store" or frozen is not None and not frozen.exists():
        frozen = None
    return publish(
        config, temporary, meta, sorted(entries, key=lambda e: e["name"]), statistics=statistics, frozen=frozen
    )
