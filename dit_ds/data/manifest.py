"""`manifest.json`: what a sharded set consists of, to the byte. Schema: `data_shards/README.md`."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

from dit_ds.data.storage import file_of, is_url, read_file
from dit_ds.errors import UserError
from dit_ds.files import atomic_write

NAME = "manifest.json"
SCHEMA = 2
_NO_CHECKSUM = "0" * 64


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write it, atomically, with the SHA-256 of its own text in it."""
    text = json.dumps(manifest | {"checksum": _NO_CHECKSUM}, sort_keys=True) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    with atomic_write(path) as f:
        f.write(text.replace(_NO_CHECKSUM, checksum, 1).encode())


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a set's manifest.

    Args:
        folder: as `storage.locate` gives it.
    Raises:
        UserError: there is none (the set was never finished), or it is damaged, edited or of another schema.
    """
    return parse_manifest(manifest_bytes(folder), folder)


def manifest_bytes(folder: str | Path) -> bytes:
    """The manifest as it is."""
    if not is_url(folder) and not (Path(folder) / NAME).exists():
        raise UserError(
            f"no {NAME} in {folder}: shard the dataset there with 'dit-ds data shard' (again, to finish it)"
        )
    return read_file(folder, NAME)


def parse_manifest(data: bytes, folder: str | Path) -> dict[str, Any]:
    """The manifest that these bytes are, see `load_manifest`."""
    path = file_of(folder, NAME)
    try:
        manifest = json.loads(data)
    except ValueError as e:
        raise UserError(f"the manifest {path} is not valid JSON ({e})") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of shard schema {SCHEMA}: shard the dataset again")
    checksum = str(manifest.get("checksum")).encode()
    if hashlib.sha256(data.replace(checksum, _NO_CHECKSUM.encode(), 1)).hexdigest().encode() != checksum:
        raise UserError(f"{path} was changed after it was written: shard the dataset again, which keeps whole shards")
    return manifest


def read_members(path: Path) -> list[list[Any]]:
    """Per sample `[image_id, jpg offset, jpg bytes, jpg CRC-32, json offset, json bytes, json CRC-32, [sentences of each
    ref]]`, as the tar has them."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            data = tar.extractfile(member).read()
            sample = samples.setdefault(key, {})
            sample[extension] = [member.offset_data, member.size, zlib.crc32(data)]
            if extension == "json":
                sample["lengths"] = [len(r["sentences"]) for r in json.loads(data)["refs"]]
    return [[int(k), *s["jpg"], *s["json"], s["lengths"]] for k, s in samples.items()]


def size_errors(folder: Path | str, manifest: dict[str, Any]) -> list[str]:
    """Local shards that are missing or not of the manifest's size: cheap enough to look at before every run."""
    errors: list[str] = []
    if is_url(folder):
        return errors
    folder = Path(folder)
    for entry in (e for s in manifest["splits"].values() for e in s["shards"]):
        try:
            size = os.stat(folder / entry["name"]).st_size
        except FileNotFoundError:
            errors.append(f"{folder / entry['name']} is missing")
            continue
        if size != entry["bytes"]:
            errors.append(f"{folder / entry['name']} has {size} bytes, the manifest says {entry['bytes']}")
    return errors
