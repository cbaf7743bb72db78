"""Checks of one shard: the tar against the manifest's entry, and each sample's consistency."""

from __future__ import annotations

import collections
import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from dit_ds.data.exif import exif_orientation
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.masks import decode_rle, run_lengths
from dit_ds.data.picture import picture_kind, picture_size
from dit_ds.data.shards.manifest import picture_kind_of

REPLACE = "remove that shard and shard again"
_MAX_NAMED = 5  # keys that one line names
Id = tuple[str, Any]  # dataset and id: in a combined dataset ids are unique within each dataset only


@dataclass
class ShardReport:
    """The findings of one shard.

    Attributes:
        split: of the shard.
        errors: a line each.
        refs, sentences: each id with the key of its sample.
        counts: `samples`, `annotations`, `no_target`, `several_targets`.
        areas: of each mask whose area is not its annotation's the relative difference, and a text that names it.
    """

    split: str
    errors: list[str] = field(default_factory=list)
    refs: list[tuple[Id, str]] = field(default_factory=list)
    sentences: list[tuple[Id, str]] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    areas: list[tuple[float, str]] = field(default_factory=list)


def check_shard(folder: Path, manifest: dict[str, Any], job: tuple[str, dict[str, Any]]) -> ShardReport:
    """Check one shard; errors go in the report, whatever the file contains.

    Args:
        job: the shard's split and its entry in the manifest.
    """
    split, entry = job
    report, path = ShardReport(split), folder / entry["name"]
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            _check_tar(tar, path, manifest, entry, report)
    except (OSError, ValueError) as e:  # mapping an empty file is a ValueError
        report.errors.append(f"{path} can't be read ({e}): {REPLACE}")
    return report


def _check_tar(
    tar: mmap.mmap, path: Path, manifest: dict[str, Any], entry: dict[str, Any], report: ShardReport
) -> None:
    """Check a mapped tar against its entry in the manifest, then its samples."""
    expected = _expected_members(entry)
    damaged = [name for name, (at, size, crc) in expected.items() if crc32(tar[at : at + size]) != crc]
    if hashlib.sha256(tar).hexdigest() != entry["sha256"]:
        where = f"damaged: {_some(damaged)}" if damaged else "outside its samples' bytes"
        report.errors.append(f"{path} does not have the manifest's SHA-256 ({where}): {REPLACE}")
        return
    if damaged:
        report.errors.append(f"{path}: {_some(damaged)} have other CRC-32 than the manifest says: {REPLACE}")
        return
    report.errors += [f"{path}: {what}: {REPLACE}" for what in _member_errors(tar, expected)]
    if report.errors:
        return
    found: dict[str, list[str]] = {}
    for sample in entry["samples"]:
        key = f"{sample[0]:012d}"
        (at, size, _), (meta, length, _) = expected[f"{key}.{picture_kind_of(sample)}"], expected[f"{key}.json"]
        members = tar[at : at + size], tar[meta : meta + length]
        for what in _check_sample(members, sample, manifest, report):
            found.setdefault(what, []).append(key)
    report.errors += [f"{path}: {_some(keys)}: {what}" for what, keys in found.items()]


def _expected_members(entry: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Offset, bytes and CRC-32 of each member by its name, from the manifest's entry."""
    members = {}
    for sample in entry["samples"]:
        key = f"{sample[0]:012d}"
        members[f"{key}.{picture_kind_of(sample)}"], members[f"{key}.json"] = tuple(sample[1:4]), tuple(sample[4:7])
    return members


def _member_errors(tar: mmap.mmap, expected: dict[str, tuple[int, int, int]]) -> Iterator[str]:
    """Members that are missing, unexpected, repeated or at another offset, and a wrong end of the tar."""
    try:
        with tarfile.open(fileobj=tar, mode="r:") as opened:
            members = opened.getmembers()
    except (tarfile.TarError, ValueError, OSError, EOFError) as e:
        yield f"is no tar ({e})"
        return
    names = collections.Counter(m.name for m in members)
    for what, some in (
        ("lacks", [n for n in expected if n not in names]),
        ("has besides its samples", [n for n in names if n not in expected]),
        ("has more than once", [n for n, k in names.items() if k > 1]),
        ("has as other than a file", [m.name for m in members if not m.isreg()]),
        ("has at another place", [m.name for m in members if _elsewhere(m, expected)]),
    ):
        if some:
            yield f"{what} {_some(some)}"
    end = max((m.offset_data + -(-m.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for m in members), default=0)
    if len(tar) - end < 2 * tarfile.BLOCKSIZE or tar[end:].strip(b"\0"):
        yield "does not end in empty blocks"


def _elsewhere(member: tarfile.TarInfo, expected: dict[str, tuple[int, int, int]]) -> bool:
    return member.name in expected and (member.offset_data, member.size) != expected[member.name][:2]


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _check_sample(
    members: tuple[bytes, bytes], sample: list[Any], manifest: dict[str, Any], report: ShardReport
) -> list[str]:
    """Errors of one sample, a line each.

    Args:
        members: its picture and JSON, whose checksums are right.
        sample: its entry in the manifest.
        report: gets its ids, counts and areas.
    """
    (picture, text), key = members, f"{sample[0]:012d}"
    try:
        meta = json.loads(text)
        expected = {k: manifest[k] for k in ("schema", "dataset", "split_by")}
        expected |= {"split": report.split, "image_id": sample[0]}
        wrong = [f"{k} is {meta.get(k)!r}, not {v!r} as where it lies" for k, v in expected.items() if meta.get(k) != v]
        if [len(r["sentences"]) for r in meta["refs"]] != sample[7]:
            wrong.append("its refs and sentences are not as many as the manifest says")
        wrong += _image_errors(picture, picture_kind_of(sample), meta)
        wrong += _annotation_errors(meta, key, report)
        wrong += _ref_errors(meta, key, report)
        report.counts["samples"] += 1
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        wrong = [f"its JSON is not of the schema ({type(e).__name__}: {e})"]
    return [f"{what}: remove its manifest and shard the dataset again" for what in wrong]


def _image_errors(picture: bytes, kind: str, meta: dict[str, Any]) -> Iterator[str]:
    """A picture of another kind than its name says, of another size than its JSON says, or with an EXIF orientation.

    Only the header is read: `data shard` decoded all of it, and the checksum says that its bytes haven't changed.
    """
    if (found := picture_kind(picture)) not in ("", kind):
        yield f"its picture is no {kind}, but {found}"
        return
    if (orientation := exif_orientation(picture)) != 1:
        yield f"its picture has the EXIF orientation {orientation}, which some readers follow and others don't"
    try:
        size = picture_size(picture)
    except ValueError as e:
        yield f"its picture can't be read ({e})"
        return
    if size != (meta["height"], meta["width"]):
        yield f"its picture is {size[1]}x{size[0]}, its JSON says {meta['width']}x{meta['height']}"


def _annotation_errors(meta: dict[str, Any], key: str, report: ShardReport) -> Iterator[str]:
    """Errors of a sample's masks; masks whose area differs go in the report."""
    for ann_id, annotation in meta["anns"].items():
        report.counts["annotations"] += 1
        rle = annotation["rle"]
        if list(rle["size"]) != [meta["height"], meta["width"]]:
            yield f"annotation {ann_id}'s mask is {rle['size']}, its picture {[meta['height'], meta['width']]}"
            continue
        try:
            runs = run_lengths(rle)
        except ValueError as e:
            yield f"annotation {ann_id}: {e}"
            continue
        pixels, area = int(runs[1::2].sum()), annotation.get("area")
        if not pixels:
            yield f"annotation {ann_id}'s mask is empty"
        elif isinstance(area, (int, float)) and _area_differs(rle, runs, area):
            line = f"{key} annotation {ann_id} ({pixels} pixels, area {area:.0f})"
            report.areas.append((abs(pixels - area) / max(pixels, area), line))


def _area_differs(rle: dict[str, Any], runs: np.ndarray, area: float) -> bool:
    """Whether the mask's area differs from the annotation's by more than rasterization explains.

    COCO's area is that of the polygons. In the mask each pixel on the outline is inside or outside as a whole, so the
    two can differ by the number of pixels along the outline at most.

    Args:
        runs: `run_lengths(rle)`.
        area: the annotation's, in pixels.
    """
    off = abs(int(runs[1::2].sum()) - area)
    if off <= len(runs) // 2:  # each run of ones has a pixel on the outline: no need to decode
        return False
    mask = np.pad(decode_rle(rle), 1).astype(bool)
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return bool(off > mask.sum() - inner.sum())


def _ref_errors(meta: dict[str, Any], key: str, report: ShardReport) -> Iterator[str]:
    """Errors of a sample's refs and sentences; their ids and counts go in the report."""
    if not meta["refs"]:
        yield "it has no refs"
    for ref in meta["refs"]:
        dataset, ref_id, ann_ids = ref.get("dataset", meta["dataset"]), ref["ref_id"], ref["ann_ids"]
        report.refs.append(_id_and_key(dataset, ref_id, key))
        missing = [a for a in ann_ids if str(a) not in meta["anns"]]
        if missing:
            yield f"ref {ref_id}'s annotation {missing[0]} is not among its annotations"
        if ref["no_target"] and ann_ids:
            yield f"ref {ref_id} has no target, yet annotation {ann_ids[0]}"
        if not ref["no_target"] and not ann_ids:
            yield f"ref {ref_id} has no annotation, and is not marked as without target"
        report.counts["no_target"] += bool(ref["no_target"])
        report.counts["several_targets"] += len(ann_ids) > 1
        if not ref["sentences"]:
            yield f"ref {ref_id} has no sentence"
        for sentence in ref["sentences"]:
            report.sentences.append(_id_and_key(dataset, sentence["sent_id"], key))
            if not normalise_expression(sentence["sent"]):
                yield f"ref {ref_id}: sentence {sentence['sent_id']} is empty"


def _id_and_key(dataset: str, number: Any, key: str) -> tuple[Id, str]:
    if not isinstance(number, (int, str)):
        raise TypeError(f"an id is {number!r}")
    return (str(dataset), number), key
