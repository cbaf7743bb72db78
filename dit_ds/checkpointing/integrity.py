"""Whether a checkpoint's files are what was written, by its manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from dit_ds.errors import UserError
from dit_ds.files import check_name, read_json, sha256_of


class _Entry(BaseModel):
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _Entry]


def manifest_files(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a checkpoint's files, by name.

    Raises:
        UserError: there is no manifest, it is damaged, or a name leads out of the checkpoint's folder.
    """
    file = path / "manifest.json"
    files = checked(path, _Manifest, read_json(file, "manifest"), file.name)["files"]
    return {check_name(name, file): entry for name, entry in files.items()}


def checked(path: Path, schema: type[BaseModel], value: Any, where: str) -> Any:
    """The value, of the file `where` of a checkpoint, if the schema allows it.

    Raises:
        UserError: it does not.
    """
    try:
        schema.model_validate(value, strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"]))
        raise damaged(path, f"{where}: {key + ': ' if key else ''}{error['msg']}") from None
    return value


def require_readable(path: Path) -> None:
    """Check that this user may read a checkpoint's files, and that they are files, whose reading ends.

    Raises:
        UserError: names one that may not be read, or is a pipe or a device.
    """
    folders = [path] if path.is_dir() else []
    if wrong := [f for f in folders if not os.access(f, os.R_OK | os.X_OK)]:
        raise UserError(f"cannot read the folder {wrong[0]} (permission denied): ask its owner for chmod a+rx")
    files = sorted(path.iterdir()) if folders else [path]
    if wrong := [f for f in files if f.exists() and not os.access(f, os.R_OK)]:
        raise UserError(f"cannot read {wrong[0]} (permission denied): ask its owner for chmod a+r")
    if wrong := [f for f in files if f.exists() and not (f.is_file() or f.is_dir())]:
        raise UserError(f"{wrong[0]} is a pipe or a device, not a file: do not use it")


def damaged(path: Path, why: object) -> UserError:
    """The error that a checkpoint is damaged."""
    return UserError(f"checkpoint {path} is damaged ({why}): use another of the run's")


@contextlib.contextmanager
def damage_is_user_error(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into one line: it is damaged, or may not be read.

    Args:
        path: the checkpoint's folder, or an exported file.
    """
    try:
        yield
    except (SafetensorError, OSError) as e:
        require_readable(path)  # safetensors reports a file that may not be read as missing
        raise damaged(path, e) from None


def damages(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, by size and SHA-256; each of `parts` callers reads its share.

    Returns:
        A text for each file, which begins with its name.
    Raises:
        UserError: a file may not be read by this user, which says nothing of what is in it.
    """
    require_readable(path)
    wrong = []
    try:
        for i, (name, entry) in enumerate(sorted(manifest_files(path).items())):
            file = path / name
            if not file.exists():
                wrong.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                wrong.append(f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            elif i % parts == part and sha256_of(file) != entry["sha256"]:
                wrong.append(f"{name} has another SHA-256")
    except (UserError, KeyError, TypeError, AttributeError, OSError) as e:  # a disk that can't be read, too
        wrong.append(str(e))
    return wrong
