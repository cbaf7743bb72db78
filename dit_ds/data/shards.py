"""Records to WebDataset tars and a manifest, in parallel; and the checks of what was written.

Schema: `data_shards/README.md`. A shard appears whole or not at all, the manifest comes last, and the same input gives
the same bytes whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dit_ds import __version__
from dit_ds.data.manifest import SCHEMA, load_manifest, read_members, size_errors, write_manifest
from dit_ds.data.refer import ImageRecord, ReferTree, UnusableRecord, annotation_rle, clean_sentence, load_refer
from dit_ds.data.transforms import decode_jpeg
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, read_json, sha256_of, usable_cores, write_json

MASK_POLICY = "union"
_IMAGES_A_SHARD = 50  # at least; RefCOCO's train split then has 256 shards of 66 images, 11 MB each


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its name, its images in order, and a digest of all that decides its bytes."""

    name: str
    split: str
    records: list[ImageRecord]
    digest: str


def shard_refer(
    refer_root: str | Path,
    images: str | Path,
    dataset: str,
    split_by: str,
    out: str | Path,
    shards: dict[str, int] | None = None,
    processes: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `OUT/DATASET/SPLIT_BY/SPLIT-00000-of-NNNNN.tar` for each split, then `manifest.json`; return the manifest.

    Shards that an interrupted run finished are checked and kept.

    Args:
        shards: shards a split; by default the largest power of two that leaves 50 images in each.
        skip_bad: drop refs and images that can't be used, and count them, instead of refusing.
        overwrite: replace a finished set that was made from other files or with other options.
    Raises:
        UserError: anything missing, damaged or unusable in the tree; a full disk; a different set already there.
    """
    if not Path(images).is_dir():
        raise UserError(f"no image folder at {images}: --images must hold COCO's train2014 files")
    tree = load_refer(refer_root, dataset, split_by)
    counts = _shard_counts(tree, shards or {})
    folder = Path(out) / dataset / split_by
    plans = [p for split, records in tree.splits.items() for p in _plan(tree, split, records, counts[split], skip_bad)]
    digest = _digest([p.digest for p in plans])

    published = folder / "manifest.json"
    if published.exists():
        manifest = load_manifest(folder)
        if manifest["digest"] == digest and not size_errors(folder, manifest):
            return manifest
        if manifest["digest"] != digest and not overwrite:
            raise UserError(f"{folder} holds a finished set made from other files or options: --overwrite replaces it")
        published.unlink()
    try:
        parts = _write_all(plans, folder, Path(images), tree, skip_bad, processes)
    finally:
        for half_written in folder.glob(".*.tmp"):  # by a worker that was ended, now or in a run that was killed
            half_written.unlink()
    manifest = _manifest(tree, plans, parts, digest)
    write_manifest(published, manifest)
    _remove_leftovers(folder, {p.name for p in plans})
    return manifest


def _shard_counts(tree: ReferTree, asked: dict[str, int]) -> dict[str, int]:
    unknown = sorted(set(asked) - set(tree.splits))
    if unknown:
        raise UserError(
            f"--shards names no split '{unknown[0]}': {tree.dataset} {tree.split_by} has {', '.join(tree.splits)}"
        )
    counts = {}
    for split, records in tree.splits.items():
        counts[split] = asked.get(split, 2 ** int(np.log2(max(1, len(records) // _IMAGES_A_SHARD))))
        if not 1 <= counts[split] <= len(records):
            raise UserError(f"--shards {split}={counts[split]}: choose from 1 to its {len(records)} images")
    return counts


def _plan(tree: ReferTree, split: str, records: list[ImageRecord], n: int, skip_bad: bool) -> list[ShardPlan]:
    """Deal the images to `n` shards whose sizes differ by one at most, in the order of a hash of the image id."""
    ordered = sorted(records, key=lambda r: hashlib.sha256(str(r.image["id"]).encode()).digest())
    bounds = np.linspace(0, len(ordered), n + 1).astype(int)
    common = [SCHEMA, tree.dataset, tree.split_by, tree.sources, MASK_POLICY, skip_bad]
    plans = []
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        name = f"{split}-{k:05d}-of-{n:05d}.tar"
        plans.append(ShardPlan(name, split, ordered[a:b], _digest([*common, name])))
    return plans


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_job: tuple[Path, Path, ReferTree, list[ShardPlan], bool]  # inherited by the forked workers, so never pickled


def _write_all(
    plans: list[ShardPlan], folder: Path, images: Path, tree: ReferTree, skip_bad: bool, processes: int | None
) -> dict[str, dict[str, Any]]:
    global _job
    _job = (folder, images, tree, plans, skip_bad)
    parts = {}
    total = sum(len(p.records) for p in plans)
    with (
        multiprocessing.get_context("fork").Pool(processes or usable_cores(), initializer=_ignore_interrupt) as pool,
        tqdm(desc=f"{tree.dataset} {tree.split_by}", total=total, unit="img", mininterval=1) as bar,
    ):
        for name, part in pool.imap_unordered(_write_shard, range(len(plans))):
            parts[name] = part
            bar.update(part["entry"]["images"] + part["dropped"]["images"])
    return parts


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool


def _write_shard(k: int) -> tuple[str, dict[str, Any]]:
    """Write shard `k` unless an earlier run did, and the note `.NAME.json` that says so."""
    folder, images, tree, plans, skip_bad = _job
    plan = plans[k]
    path, note = folder / plan.name, folder / f".{plan.name}.json"
    if note.exists() and path.exists():
        part = read_json(note, "shard note")
        if part["digest"] == plan.digest and part["entry"]["sha256"] == sha256_of(path):
            return plan.name, part
    note.unlink(missing_ok=True)
    with atomic_write(path) as f:
        entry, dropped = _write_tar(f, tree, plan, images, skip_bad)
    entry |= {"name": plan.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "samples": read_members(path)}
    part = {"digest": plan.digest, "entry": entry, "dropped": dropped}
    write_json(note, part, indent=None)
    return plan.name, part


def _write_tar(
    f: BinaryIO, tree: ReferTree, plan: ShardPlan, images: Path, skip_bad: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    from webdataset import TarWriter

    counts = {"images": 0, "refs": 0, "sentences": 0}
    dropped = {"images": 0, "refs": 0, "sentences": 0}
    with TarWriter(f, mtime=0, encoder=False) as tar:
        for record in plan.records:
            try:
                jpg = _image_bytes(images, record)
                meta = _sample(tree, plan.split, record, skip_bad, dropped)
            except UnusableRecord as e:
                if not skip_bad:
                    raise UserError(f"{e}: mend it, or leave it out with --skip-bad") from None
                dropped["images"] += 1
                continue
            text = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            tar.write({"__key__": f"{record.image['id']:012d}", "jpg": jpg, "json": text.encode()})
            counts["images"] += 1
            counts["refs"] += len(meta["refs"])
            counts["sentences"] += sum(len(r["sentences"]) for r in meta["refs"])
    return counts, dropped


def _image_bytes(images: Path, record: ImageRecord) -> bytes:
    """The image file as it is, after a look whether it decodes to the size that the annotations speak of."""
    path = images / record.image["file_name"]
    try:
        jpg = path.read_bytes()
    except FileNotFoundError:
        raise UnusableRecord(f"no image {path}") from None
    except OSError as e:
        raise UnusableRecord(f"image {path}: {e.strerror}") from None
    try:
        shape = decode_jpeg(jpg).shape[:2]
    except ValueError as e:
        raise UnusableRecord(f"image {path} is damaged ({e})") from None
    if shape != (record.image["height"], record.image["width"]):
        raise UnusableRecord(f"image {path} is {shape[1]}x{shape[0]}, its annotation says otherwise")
    return jpg


def _sample(
    tree: ReferTree, split: str, record: ImageRecord, skip_bad: bool, dropped: dict[str, int]
) -> dict[str, Any]:
    """The sample's JSON member."""
    height, width = record.image["height"], record.image["width"]
    anns: dict[str, Any] = {}
    refs = []
    for ref in record.refs:
        annotation = record.annotations[ref["ann_id"]]
        try:
            rle = annotation_rle(annotation, height, width)
        except UnusableRecord as e:
            if not skip_bad:
                raise UnusableRecord(f"ref {ref['ref_id']}: {e}") from None
            dropped["refs"] += 1
            continue
        sentences = []
        for s in ref["sentences"]:
            try:
                sentences.append({"sent_id": s["sent_id"], "raw": s.get("raw", ""), "sent": clean_sentence(s)})
            except UnusableRecord as e:
                if not skip_bad:
                    raise UnusableRecord(f"ref {ref['ref_id']}: {e}") from None
                dropped["sentences"] += 1
        if not sentences:
            dropped["refs"] += 1
            continue
        anns[str(ref["ann_id"])] = {k: annotation.get(k) for k in ("bbox", "category_id", "area", "iscrowd")} | {
            "rle": rle
        }
        refs.append({"ref_id": ref["ref_id"], "ann_ids": [ref["ann_id"]], "no_target": False, "sentences": sentences})
    if not refs:
        raise UnusableRecord(f"image {record.image['id']} has no usable ref")
    return {
        "schema": SCHEMA, "dataset": tree.dataset, "split_by": tree.split_by, "split": split,
        "image_id": record.image["id"], "file_name": record.image["file_name"], "height": height, "width": width,
        "anns": anns, "refs": refs,
    }  # fmt: skip


def _manifest(tree: ReferTree, plans: list[ShardPlan], parts: dict[str, dict[str, Any]], digest: str) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for plan in plans:
        split = splits.setdefault(
            plan.split,
            {
                "images": 0,
                "refs": 0,
                "sentences": 0,
                "dropped": dict.fromkeys(["images", "refs", "sentences"], 0),
                "shards": [],
            },
        )
        part = parts[plan.name]
        split["shards"].append(part["entry"])
        for what in ("images", "refs", "sentences"):
            split[what] += part["entry"][what]
            split["dropped"][what] += part["dropped"][what]
    return {
        "schema": SCHEMA, "tool": f"dit-ds {__version__}", "dataset": tree.dataset, "split_by": tree.split_by,
        "description": tree.description, "image_set": tree.image_set,
        "mask_policy": MASK_POLICY, "sources": tree.sources, "digest": digest, "splits": splits,
    }  # fmt: skip


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Remove the notes of finished shards, and shards of a set that was replaced."""
    for note in folder.glob(".*.tar.json"):
        note.unlink()
    for tar in folder.glob("*-of-*.tar"):
        if tar.name not in names:
            tar.unlink()
