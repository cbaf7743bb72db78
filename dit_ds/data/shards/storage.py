"""Paths and URLs of a sharded dataset: a local folder, an object store, or a command that prints a file."""

from __future__ import annotations

import re
from pathlib import Path

from dit_ds.errors import UserError
from dit_ds.files import check_name, is_url

# of names that become a part of a URL or of a shell's command: nothing that a shell or a URL interprets
_PLAIN = re.compile(r"[A-Za-z0-9._+,=@-]+")


def local(folder: str | Path) -> Path:
    """The folder as a local path.

    Raises:
        UserError: it is a URL.
    """
    if is_url(folder):
        raise UserError(f"{folder} is read as a stream, and this needs local shards: run it where they lie")
    return Path(folder)


def locate(root: str | Path, *parts: str) -> Path | str:
    """A file or folder under a root.

    Args:
        root: a folder; https://.., s3://.. (read with the aws command), or another URL that `webdataset.gopen` opens;
            or `pipe:COMMAND`, where {} in the command is replaced by the file's path; without {} it is appended.
        parts: names of folders below it.
    Raises:
        UserError: a part is a path, or below a URL has characters that a shell or a URL would interpret.
    """
    for part in parts:
        _check(part, root)
    if not is_url(root):
        return Path(root, *parts)
    path, root = "/".join(parts), str(root)
    return root.replace("{}", path + "/{}") if "{}" in root else f"{root.rstrip('/')}/{path}"


def _check(name: str, folder: str | Path) -> None:
    check_name(name, folder)
    if is_url(folder) and not _PLAIN.fullmatch(name):
        raise UserError(f"{folder}: the name {name!r} below it may have letters, digits and ._+,=@- only")


def file_of(folder: Path | str, name: str) -> Path | str:
    """A file in a folder that `locate` returned: a local path, or a URL for `webdataset.gopen`.

    Raises:
        UserError: as of `locate`.
    """
    _check(name, folder)
    if not is_url(folder):
        return Path(folder, name)
    url = str(folder).replace("{}", name) if "{}" in str(folder) else f"{folder}/{name}"
    return f"pipe:aws s3 cp --quiet {url} -" if url.startswith("s3://") else url


def read_file(folder: Path | str, name: str) -> bytes:
    """The bytes of a file in a folder that `locate` returned.

    Raises:
        UserError: it is missing or can't be reached.
    """
    file = file_of(folder, name)
    try:
        if isinstance(file, Path):  # `gopen` would take a folder called "pipe:.." for a command
            return file.read_bytes()
        import webdataset

        with webdataset.gopen(file) as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file} ({' '.join(str(e).split()) or type(e).__name__})") from None
