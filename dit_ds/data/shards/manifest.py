"""`manifest.json`: every shard and sample of a sharded dataset, with offsets and checksums. Schema: `data_shards/README.md`."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from dit_ds.data.shards.storage import file_of, read_file
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, check_name, is_url

NAME = "manifest.json"
SCHEMA = 2
KINDS = ("jpg", "png", "webp", "tif", "bmp")  # of a picture: its member's extension, as of `picture_kind`
COUNTS = ("images", "refs", "sentences")
_NO_CHECKSUM = "0" * 64
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest atomically, with `checksum`: the SHA-256 of its text in which `checksum` is zeros."""
    text = json.dumps(manifest | {"checksum": _NO_CHECKSUM}, sort_keys=True) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    with atomic_write(path) as f:
        f.write(text.replace(_NO_CHECKSUM, checksum, 1).encode())


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a sharded dataset's manifest.

    Args:
        folder: as returned by `storage.locate`.
    Raises:
        UserError: there is none (sharding was never finished), or it is damaged, edited or of another schema.
    """
    return parse_manifest(manifest_bytes(folder), folder)


def manifest_bytes(folder: str | Path) -> bytes:
    """The manifest's bytes.

    Raises:
        UserError: there is no manifest, or it can't be reached.
    """
    if not is_url(folder) and not (Path(folder) / NAME).exists():
        raise UserError(
            f"no {NAME} in {folder}: shard the dataset there with 'dit-ds data shard' (again, to finish it)"
        )
    return read_file(folder, NAME)


def parse_manifest(data: bytes, folder: str | Path) -> dict[str, Any]:
    """Parse and check a manifest's bytes.

    Args:
        folder: for error messages.
    Raises:
        UserError: as of `load_manifest`.
    """
    path = file_of(folder, NAME)
    try:
        manifest = json.loads(data)
    except ValueError as e:
        raise UserError(f"the manifest {path} is not valid JSON ({e})") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of shard schema {SCHEMA}: remove it and shard the dataset again")
    checksum = str(manifest.get("checksum")).encode()
    if hashlib.sha256(data.replace(checksum, _NO_CHECKSUM.encode(), 1)).hexdigest().encode() != checksum:
        raise UserError(f"{path} was changed after it was written: remove it and shard the dataset again")
    try:
        _require_fields(manifest)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        what = f"it has no {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{path} can't be used ({what}): remove it and shard the dataset again") from None
    return manifest


def _require_fields(manifest: dict[str, Any]) -> None:
    """Raise early what reading these fields would raise later."""
    for key in ("dataset", "split_by", "description", "image_set", "digest"):
        _require(isinstance(manifest[key], str), key)
    _require(all(s["shards"] for s in manifest["splits"].values()) and bool(manifest["splits"]), "splits")
    for name, split in manifest["splits"].items():
        check_name(name, NAME)
        _require(all(type(split[k]) is int for k in COUNTS), "counts")
        _require(all(type(n) is int for n in split.get("dropped", {}).values()), "dropped")
        notes = split.get("pictures", {})
        _require(type(notes) is dict and all(type(x) is dict for x in notes.values()), "pictures")
        for entry in split["shards"]:
            _require(all(type(entry[k]) is int for k in ("bytes", *COUNTS)), "counts of a shard")
            _require(all(type(entry[k]) is str for k in ("name", "sha256")), "names of a shard")
            check_name(entry["name"], NAME)
            members = np.array([s[:7] for s in entry["samples"]])
            # with --skip-bad a shard may have no samples
            _require(not len(members) or (members.shape[1:] == (7,) and members.dtype.kind == "i"), "samples")
            lengths = [n for s in entry["samples"] for n in s[7]]
            _require(all(type(n) is int for n in lengths), "sentences of a sample")
            _require(all(picture_kind_of(s) in KINDS for s in entry["samples"]), "kind of a picture")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"its {what} can't be read")


def manifest_errors(folder: Path | str, manifest: dict[str, Any]) -> list[str]:
    """Contradictions within a manifest, a line each: shard names, sums, ids, and members that don't fill their tar.

    A tar is its members' headers and bytes one after another, so the members' sizes determine every offset and the end
    of the tar: an entry that was lost or moved leaves a gap.
    """
    errors = []
    for name, split in manifest["splits"].items():
        entries, ids = split["shards"], []
        for k, entry in enumerate(entries):
            due = f"{name}-{k:05d}-of-{len(entries):05d}.tar"
            if entry["name"] != due:
                errors.append(f"the manifest has {entry['name']} where {due} is due")
            lengths = [n for s in entry["samples"] for n in s[7]]
            found = {"images": len(entry["samples"]), "refs": len(lengths), "sentences": sum(lengths)}
            errors += _differing(found, entry, f"{file_of(folder, entry['name'])}: its samples")
            if any(not s[7] for s in entry["samples"]) or min(lengths, default=1) < 1:
                errors.append(f"{file_of(folder, entry['name'])}: the manifest has a sample without refs or sentences")
            if not _fills_the_tar(entry):
                errors.append(
                    f"{file_of(folder, entry['name'])}: the manifest's members leave gaps or overlap in the tar"
                )
            ids += [s[0] for s in entry["samples"]]
        sums = {k: sum(e[k] for e in entries) for k in COUNTS}
        errors += _differing(sums, split, f"split {name}: its shards")
        kinds = collections.Counter(
            kind for e in entries for s in e["samples"] if (kind := picture_kind_of(s)) != KINDS[0]
        )
        if kinds != split.get("pictures", {}).get("kinds", {}):
            errors.append(f"split {name}: its pictures are of other kinds than the manifest says")
        twice = [i for i, n in collections.Counter(ids).items() if n > 1]
        if twice:
            errors.append(f"split {name}: image {twice[0]:012d} is in the manifest more than once")
    return errors


def _differing(found: dict[str, int], expected: dict[str, int], subject: str) -> list[str]:
    """A line for each count that is not the manifest's."""
    return [
        f"{subject} have {found[k]} {k}, the manifest says {expected[k]}" for k in COUNTS if found[k] != expected[k]
    ]


def _fills_the_tar(entry: dict[str, Any]) -> bool:
    """Whether members of these sizes, in this order, have these offsets, and the tar ends behind the last one."""
    rows = np.array([s[:7] for s in entry["samples"]], np.int64).reshape(-1, 7)
    sizes = rows[:, [2, 5]].ravel()
    ends = np.cumsum(_BLOCK + -(-sizes // _BLOCK) * _BLOCK)  # a header, then the bytes, padded to a multiple of a block
    starts = np.concatenate([[0], ends[:-1]]) + _BLOCK
    end = int(ends[-1]) + 2 * _BLOCK if len(ends) else 2 * _BLOCK
    return bool(
        (sizes >= 0).all()
        and (starts == rows[:, [1, 4]].ravel()).all()
        and -(-end // _RECORD) * _RECORD == entry["bytes"]
    )


def read_members(path: Path) -> list[list[Any]]:
    """The manifest's entry for each sample, in the tar's order.

    Returns:
        `[image_id, jpg offset, jpg bytes, jpg CRC-32, json offset, json bytes, json CRC-32, [sentences of each ref]]`,
        and the picture's kind behind it, if that is not jpg.
    """
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            file = tar.extractfile(member)
            data = file.read() if file is not None else b""
            sample = samples.setdefault(key, {})
            place = [member.offset_data, member.size, crc32(data)]
            if extension == "json":
                sample |= {"json": place, "lengths": [len(r["sentences"]) for r in json.loads(data)["refs"]]}
            else:
                sample |= {"picture": place, "kind": [] if extension == KINDS[0] else [extension]}
    return [[int(k), *s["picture"], *s["json"], s["lengths"], *s["kind"]] for k, s in samples.items()]


def picture_kind_of(sample: list[Any]) -> str:
    """The extension of a sample's picture, from its entry in the manifest."""
    return KINDS[0] if len(sample) < 9 else sample[8]


def size_errors(folder: Path | str, manifest: dict[str, Any]) -> list[str]:
    """Local shards that are missing or of another size, a line each; cheap enough for every start of a run."""
    errors: list[str] = []
    if is_url(folder):
        return errors
    folder = Path(folder)
    for entry in (e for s in manifest["splits"].values() for e in s["shards"]):
        try:
            size = os.stat(folder / entry["name"]).st_size
        except FileNotFoundError:
            errors.append(f"{file_of(folder, entry['name'])} is missing")
            continue
        if size != entry["bytes"]:
            errors.append(f"{file_of(folder, entry['name'])} has {size} bytes, the manifest says {entry['bytes']}")
    return errors
