"""Paths and URLs of a sharded dataset: a local folder, an object store, or a command that prints a file."""

from __future__ import annotations

from pathlib import Path

from dit_ds.errors import UserError
from dit_ds.files import is_url


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
    """
    if not is_url(root):
        return Path(root, *parts)
    path, root = "/".join(parts), str(root)
    return root.replace("{}", path + "/{}") if "{}" in root else f"{root.rstrip('/')}/{path}"


def file_of(folder: Path | str, name: str) -> Path | str:
    """A file in a folder that `locate` returned: a local path, or a URL for `webdataset.gopen`."""
    if not is_url(folder):
        return Path(folder, name)
    url = str(folder).replace("{}", name) if "{}" in str(folder) else f"{folder}/{name}"
    return f"pipe:aws s3 cp --quiet {url} -" if url.startswith("s3://") else url


def read_file(folder: Path | str, name: str) -> bytes:
    """The bytes of a file in a folder that `locate` returned.

    Raises:
        UserError: it is missing or can't be reached.
    """
    import webdataset

    url = str(file_of(folder, name))
    try:
        with webdataset.gopen(url) as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {url} ({' '.join(str(e).split()) or type(e).__name__})") from None
