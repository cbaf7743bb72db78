"""Records to WebDataset tars and a manifest, in parallel.

Schema: `data_shards/README.md`. A shard appears complete or not at all, the manifest is written last, and the same input
gives the same bytes for any number of processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset import TarWriter

from dit_ds import __version__
from dit_ds.data.annotations.combine import load_source
from dit_ds.data.annotations.refer import ImageRecord, ReferTree
from dit_ds.data.masks import UnusableRecord, is_polygon_or_rle
from dit_ds.data.parallel import forked_map
from dit_ds.data.shards.image import ImageRules, PictureNotes, load_image, merge_notes, named
from dit_ds.data.shards.manifest import NAME, SCHEMA, load_manifest, read_members, size_errors, write_manifest
from dit_ds.data.shards.sample import LeftOut, Rules, sample
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, full_disk_is_user_error, read_json, sha256_of, write_json

_DROPPED = ("images", "refs", "sentences")
_COUNTED = (
    *_DROPPED,
    "no_target",
    "overlapping",
)  # the latter two count refs: without target; with overlapping polygons
LEFT_OUT = "left_out.txt"  # beside the manifest: a line for each record that --skip-bad left out
_NAMED = 10  # of them are logged, too
_log = logging.getLogger("dit_ds")
_MIN_IMAGES = 50  # in a shard; RefCOCO's train split then has 256 shards of 66 images, 11 MB each


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its name, its images in order, and a digest of everything that determines its bytes."""

    name: str
    split: str
    records: list[ImageRecord]
    digest: str


@dataclass(frozen=True)
class _Job:
    """The worker processes' input; inherited through the fork, so never pickled."""

    folder: Path
    images: Path
    tree: ReferTree
    plans: list[ShardPlan]
    rules: Rules


def shard_refer(
    refer_root: str | Path | None,
    images: str | Path,
    dataset: str,
    split_by: str | None,
    out: str | Path,
    *,
    shards: dict[str, int] | None = None,
    processes: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    legacy_overlap: bool = False,
    with_visibility: bool = False,
    coco: str | Path | None = None,
    parquet: str | Path | None = None,
    exif: str | None = None,
    convert: str | None = None,
) -> dict[str, Any]:
    """Write `OUT/DATASET/SPLIT_BY/SPLIT-00000-of-NNNNN.tar` for each split, then `manifest.json`; return the manifest.

    Shards that an interrupted run finished are checked and kept.

    Args:
        refer_root, coco, parquet, dataset, split_by: as for `load_source`.
        images: folder with the image files.
        out: folder that holds a folder for each dataset.
        shards: number of shards by split; by default the largest power of two that leaves 50 images in each.
        processes: that write shards, by default one a core.
        skip_bad: leave out unusable refs and images, counted, and named in `left_out.txt`, instead of raising.
        overwrite: replace a finished dataset that was made from other files or with other options.
        legacy_overlap, with_visibility: as for `merge_parts`.
        exif, convert: as of `ImageRules`.
    Raises:
        UserError: anything missing, damaged or unusable in the files; nothing left of them; pictures with an EXIF
            orientation that `exif` must decide on; a full disk; another dataset in the folder.
        RunFailed: a worker process was killed.
    """
    _check_folder_names(dataset, split_by)
    if not Path(images).is_dir():
        raise UserError(f"no image folder at {images}: --images must hold the set's pictures, as COCO's train2014")
    tree = load_source(dataset, split_by, refer_root=refer_root, coco=coco, parquet=parquet, images=images)
    counts = _shard_counts(tree, shards or {})
    folder = Path(out) / tree.dataset / tree.split_by
    rules = Rules(skip_bad, legacy_overlap, with_visibility, tree.published, ImageRules(exif, convert))
    plans = [p for split, records in tree.splits.items() for p in _plan(tree, split, records, counts[split], rules)]
    digest = _digest([p.digest for p in plans] + ([] if exif is None else [f"exif {exif}"]))

    if (finished := _finished(folder, digest, overwrite)) is not None:
        return finished
    parts = _write_all(_Job(folder, Path(images), tree, plans, rules), processes)
    _check_orientations(parts)
    manifest = _manifest(tree, plans, parts, digest, rules)
    _check_not_empty(folder, manifest, parts)
    write_manifest(folder / NAME, manifest)
    _remove_leftovers(folder, {p.name for p in plans})
    return manifest


def _finished(folder: Path, digest: str, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the set in the folder, if it is finished and the one to write; else the folder is made ready.

    Raises:
        UserError: it is another finished set, or the folder can't be made.
    """
    with full_disk_is_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).exists():
        return None
    manifest = load_manifest(folder)
    if manifest["digest"] == digest and not size_errors(folder, manifest):
        return manifest
    if manifest["digest"] != digest and not overwrite:
        raise UserError(f"{folder} holds a finished set made from other files or options: --overwrite replaces it")
    (folder / NAME).unlink()
    return None


def _check_folder_names(*names: str | None) -> None:
    for name in filter(None, names):
        if not re.fullmatch(r"[\w+-][\w+,.-]*", name):
            raise UserError(f"'{name}' can't be a folder's name: write letters, digits, + - _ and . only")


def _shard_counts(tree: ReferTree, requested: dict[str, int]) -> dict[str, int]:
    """The number of shards by split."""
    unknown = sorted(set(requested) - set(tree.splits))
    if unknown:
        raise UserError(
            f"--shards names no split '{unknown[0]}': {tree.dataset} {tree.split_by} has {', '.join(tree.splits)}"
        )
    counts = {}
    for split, records in tree.splits.items():
        counts[split] = requested.get(split, 2 ** int(np.log2(max(1, len(records) // _MIN_IMAGES))))
        if not 1 <= counts[split] <= len(records):
            raise UserError(f"--shards {split}={counts[split]}: choose from 1 to its {len(records)} images")
    return counts


def _plan(tree: ReferTree, split: str, records: list[ImageRecord], n: int, rules: Rules) -> list[ShardPlan]:
    """Distribute the images over `n` shards of equal size (plus or minus one), in the order of a hash of the image id."""
    ordered = sorted(records, key=lambda r: hashlib.sha256(str(r.image["id"]).encode()).digest())
    bounds = np.linspace(0, len(ordered), n + 1).astype(int)
    common = [SCHEMA, _COUNTED, tree.dataset, tree.split_by, tree.sources, rules.mask_policy, rules.skip_bad]
    common += ["xyv"] * rules.with_visibility
    common += [] if rules.image.convert is None else [rules.image.convert]
    plans = []
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        name = f"{split}-{k:05d}-of-{n:05d}.tar"
        plans.append(ShardPlan(name, split, ordered[a:b], _digest([*common, name])))
    return plans


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_all(job: _Job, processes: int | None) -> dict[str, dict[str, Any]]:
    """Write every shard, and say what was left out; the results of `_write_shard` by the shard's name."""
    label, total = f"{job.tree.dataset} {job.tree.split_by}", sum(len(p.records) for p in job.plans)

    def images(written: tuple[str, dict[str, Any]]) -> int:
        return written[1]["entry"]["images"] + written[1]["dropped"]["images"]

    write = functools.partial(_write_shard, job)
    try:
        parts = dict(forked_map(write, job.plans, processes, label, size=images, total=total, unit="img"))
    finally:
        for temporary in job.folder.glob(".*.tmp"):  # of a worker that was killed, in this run or an earlier one
            temporary.unlink()
    _report_left_out(job.folder, [line for p in job.plans for line in parts[p.name].get("left_out", [])])
    if job.tree.published:
        _report_lost_parts(job.tree)
    return parts


def _write_shard(job: _Job, plan: ShardPlan) -> tuple[str, dict[str, Any]]:
    """Write a shard unless an earlier run did, and `.NAME.json`, which marks it as finished.

    Returns:
        The shard's name, and its `digest`, `entry` for the manifest, `dropped` counts, `left_out` lines, `pictures`
        and `undecided` (see `PictureNotes`), and `exif`: the rule, if it decided on any picture.
    """
    path, marker = job.folder / plan.name, job.folder / f".{plan.name}.json"
    if marker.exists() and path.exists():
        part = read_json(marker, "shard note")
        same_rule = part.get("exif") in (None, job.rules.image.exif)
        if part["digest"] == plan.digest and same_rule and part["entry"]["sha256"] == sha256_of(path):
            return plan.name, {"left_out": [], "pictures": {}, "undecided": {}} | part
    marker.unlink(missing_ok=True)
    with atomic_write(path) as f:
        entry, left_out, notes = _write_tar(f, job, plan)
    entry |= {"name": plan.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "samples": read_members(path)}
    part = {"digest": plan.digest, "entry": entry, "dropped": left_out.counts, "left_out": left_out.lines}
    part |= {"pictures": notes.counts, "undecided": notes.undecided}
    part |= {"exif": job.rules.image.exif if notes.by_option else None}
    if not notes.undecided:  # else it is written again, by --exif
        write_json(marker, part, indent=None)
    return plan.name, part


def _write_tar(f: BinaryIO, job: _Job, plan: ShardPlan) -> tuple[dict[str, Any], LeftOut, PictureNotes]:
    """Write the shard's samples; return the counts of what was written, what was left out, and notes on pictures."""
    counts, left_out, notes = dict.fromkeys(_COUNTED, 0), LeftOut(), PictureNotes()
    with TarWriter(f, mtime=0, encoder=False) as tar:
        for record in plan.records:
            try:
                image = load_image(job.images, job.tree.image_set, record, job.rules.image)
                meta, overlapping = sample(job.tree, plan.split, record, job.rules, left_out)
            except UnusableRecord as e:
                if not job.rules.skip_bad:
                    raise UserError(f"{e}: mend it, or leave it out with --skip-bad") from None
                left_out.add("images", e)
                continue
            text = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            key = f"{record.image['id']:012d}"
            tar.write({"__key__": key, image.kind: image.data})  # one by one: `TarWriter` sorts what it is given
            tar.write({"__key__": key, "json": text.encode()})
            notes.add(record.image["file_name"], image)
            counts["images"] += 1
            counts["refs"] += len(meta["refs"])
            counts["sentences"] += sum(len(r["sentences"]) for r in meta["refs"])
            counts["no_target"] += sum(r["no_target"] for r in meta["refs"])
            counts["overlapping"] += overlapping
    return counts, left_out, notes


def _check_orientations(parts: dict[str, dict[str, Any]]) -> None:
    """Refuse pictures of which it is not known whether their annotations are of the turned picture."""
    undecided = {name: n for part in parts.values() for name, n in part["undecided"].items()}
    if not undecided:
        return
    raise UserError(
        f"pictures with an EXIF orientation: {len(undecided)}, of which sizes don't tell whether the annotations are of "
        f"the turned picture: {named(undecided)}: say it with --exif turn (as viewers show it) or --exif ignore (as stored)"
    )


def _check_not_empty(folder: Path, manifest: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Refuse, and remove, a set of which --skip-bad left nothing."""
    if any(split["images"] for split in manifest["splits"].values()):
        return
    _remove_leftovers(folder, set())
    reason = next(line for part in parts.values() for line in part["left_out"])
    raise UserError(
        f"nothing is left to shard, --skip-bad leaves all pictures out, the first because of this: {reason}"
    )


def _manifest(
    tree: ReferTree, plans: list[ShardPlan], parts: dict[str, dict[str, Any]], digest: str, rules: Rules
) -> dict[str, Any]:
    """The manifest, without its checksum."""
    splits: dict[str, Any] = {}
    for plan in plans:
        empty = dict.fromkeys(_COUNTED, 0) | {"dropped": dict.fromkeys(_DROPPED, 0), "shards": []}
        split, part = splits.setdefault(plan.split, empty), parts[plan.name]
        split["shards"].append(part["entry"])
        for what in _COUNTED:
            split[what] += part["entry"][what]
        for what in _DROPPED:
            split["dropped"][what] += part["dropped"][what]
        if part["pictures"]:
            merge_notes(split.setdefault("pictures", {}), part["pictures"])
    options = {"leakage": tree.leakage, "exif": rules.image.exif, "convert": rules.image.convert}
    options |= {"corners": "xyv" if rules.with_visibility else None}
    return {
        "schema": SCHEMA, "tool": f"dit-ds {__version__}", "dataset": tree.dataset, "split_by": tree.split_by,
        "description": tree.description, "image_set": tree.image_set,
        "mask_policy": rules.mask_policy, "sources": tree.sources, "digest": digest, "splits": splits,
    } | {k: v for k, v in options.items() if v is not None}  # fmt: skip


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove the markers of finished shards, and shards of a dataset that was replaced."""
    for marker in folder.glob(".*.tar.json"):
        marker.unlink()
    for tar in folder.glob("*-of-*.tar"):
        if tar.name not in names:
            tar.unlink()


def _report_left_out(folder: Path, lines: list[str]) -> None:
    """Log what `--skip-bad` left out, and name all of it in `left_out.txt`."""
    file = folder / LEFT_OUT
    file.unlink(missing_ok=True)
    if not lines:
        return
    with atomic_write(file) as f:
        f.write("".join(f"{line}\n" for line in lines).encode())
    for line in lines[:_NAMED]:
        _log.warning("left out: %s", line)
    _log.warning("%d records left out, all named in %s", len(lines), file)


def _report_lost_parts(tree: ReferTree) -> None:
    """Log the parts of a published dataset's annotations that no published code reads."""
    found = {a["id"]: a["segmentation"] for records in tree.splits.values() for r in records
             for a in r.annotations.values() if isinstance(a.get("segmentation"), list)}  # fmt: skip
    lost = {i: n for i, parts in found.items() if (n := sum(not is_polygon_or_rle(p) for p in parts))}
    if lost:
        some = ", ".join(map(str, list(lost)[:_NAMED]))
        _log.warning(
            "%d parts of %d annotations are no polygons, and are left out as published code leaves them out: "
            "annotation %s", sum(lost.values()), len(lost), some
        )  # fmt: skip
