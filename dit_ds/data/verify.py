"""The checks of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_ds.data.manifest import load_manifest, read_members, size_errors
from dit_ds.files import sha256_of


def verify_shards(folder: str | Path) -> dict[str, Any]:
    """Check sizes, SHA-256 and members of every shard against the manifest.

    Returns:
        `ok`, `errors` (a line for each thing that is wrong) and `counts` by split.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    errors = size_errors(folder, manifest)
    wrong_size = {e.split(" ", 1)[0] for e in errors}
    for entry in (e for s in manifest["splits"].values() for e in s["shards"]):
        path = folder / entry["name"]
        if str(path) in wrong_size:
            continue
        if sha256_of(path) != entry["sha256"]:
            errors.append(f"{path} does not have the manifest's SHA-256")
        elif read_members(path) != entry["samples"]:
            errors.append(f"{path}: its members are not those of the manifest")
    counts = {name: {k: s[k] for k in ("images", "refs", "sentences")} for name, s in manifest["splits"].items()}
    return {"ok": not errors, "errors": errors, "counts": counts}
