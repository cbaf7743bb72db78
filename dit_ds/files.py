"""Atomic writes, JSON files and digests, with errors of one line; and units of memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dit_ds.errors import UserError

GIB = 2**30  # bytes
PATIENCE = 300.0  # seconds for which a shared file system that is away is waited for
# what a file system says that can't be reached for now
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO)
T = TypeVar("T")
_log = logging.getLogger("dit_ds")


@contextlib.contextmanager
def atomic_write(path: str | Path, make_folder: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success sync it and rename it to `path`, on failure remove it.

    Args:
        make_folder: make the file's folder where it is missing.
    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    refuse_device(path)
    with full_disk_is_user_error(path):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replace_on_success(path) as temporary, open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())


def refuse_device(path: Path) -> None:
    """See that no device would be replaced by a file.

    Raises:
        UserError: `path` is one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a device, not a file: choose another name")


@contextlib.contextmanager
def replace_on_success(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`, renamed to `path` on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def full_disk_is_user_error(path: str | Path) -> Iterator[None]:
    """Turn an operating system's error while writing `path` (disk full, no permission, no folder) into a `UserError`.

    Raises:
        UserError: names `path` and the reason. Other errors pass unchanged.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left while writing {path}: free some, or choose another folder") from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT):
            raise UserError(f"cannot write {path} ({e.strerror}): choose another folder") from e
        raise


def is_away(error: Exception, folder: str | Path) -> bool:
    """Whether reading or writing failed as the file system can't be reached for now.

    Args:
        error: of the operating system, or the `UserError` that was made of it.
        folder: was there before.
    """
    cause = error.__cause__ if isinstance(error, UserError) else error
    if not isinstance(cause, OSError):
        return False
    return cause.errno in _AWAY or cause.errno == errno.ENOENT and not os.path.isdir(folder)


def patiently(action: Callable[[], T], folder: str | Path, seconds: float = PATIENCE) -> T:
    """Call `action`, and again while the file system with `folder` is away.

    Args:
        action: can be called anew after it failed, and does not make `folder`.
        seconds: after which its error is raised; as other errors are at once.
    """
    end, said, missing = time.monotonic() + seconds, False, 0
    while True:
        try:
            return action()
        except (OSError, UserError) as e:
            cause = e.__cause__ if isinstance(e, UserError) else e
            missing += isinstance(cause, OSError) and cause.errno == errno.ENOENT
            back = missing == 1  # it may have come back before `is_away` looked
            if time.monotonic() > end or not (is_away(e, folder) or back):
                raise
            if not said and is_away(e, folder):
                said = True
                _log.warning(f"warning: {folder} can't be reached ({e}): trying again for up to {seconds:.0f} s")
        time.sleep(1)


def refuse_overwriting(out: str | Path, *inputs: str | Path) -> None:
    """See that an output is none of the files to be read, under whatever name, is in no checkpoint's folder, and no device.

    Raises:
        UserError: it is.
    """
    out = Path(out)
    refuse_device(out)
    for path in map(Path, inputs):
        if out.exists() and path.exists() and out.samefile(path):
            raise UserError(f"--out {out} is {path} itself, which is read: choose another name")
    if all((out.resolve().parent / name).exists() for name in ("manifest.json", "meta.json")):
        raise UserError(f"--out {out} is in a checkpoint's folder: choose another")


def write_json(path: str | Path, value: Any, indent: int | None = 1, make_folder: bool = True) -> None:
    """Write `value` as JSON, atomically, with sorted keys (the same value gives the same bytes).

    Args:
        make_folder: as of `atomic_write`.
    Raises:
        UserError: as of `atomic_write`.
    """
    with atomic_write(path, make_folder) as f:
        f.write(json.dumps(value, indent=indent, sort_keys=True).encode() + b"\n")


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """As `json.loads`, with its hooks; a text nested too deeply for it raises `ValueError`, as all that is not JSON."""
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(
    path: str | Path,
    what: str,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    unique_keys: bool = False,
) -> Any:
    """Read a JSON file.

    Args:
        what: names the file's content in messages, as "manifest".
        object_hook: as for `json.load`.
        unique_keys: refuse an object with the same key twice, of which the last would count. Without `object_hook`.
    Raises:
        UserError: the file is missing, can't be read, or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return parse_json(text, object_hook=object_hook, object_pairs_hook=_unique if unique_keys else None)
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}") from None
    except OSError as e:
        raise UserError(f"cannot read the {what} {path} ({e.strerror}): see that it can be reached") from None
    except ValueError as e:
        raise UserError(f"the {what} {path} is not valid JSON ({e})") from None


def json_lines(path: str | Path, tail: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The objects in the end of a file of JSON lines; what a kill cut short is passed over, a missing file is empty.

    Args:
        tail: bytes of the end that are read.
    """
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, 2) - tail))
            text = f.read().decode(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(k for k in keys if keys.count(k) > 1)}' stands twice")
    return found


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_url(root: str | Path) -> bool:
    """Whether `root` is a URL or a `pipe:` command, whose files can be read as streams only."""
    return "://" in str(root) or str(root)[:5].lower() == "pipe:"  # webdataset, too, takes either case


def check_name(name: object, source: object) -> str:
    """A name of a file or folder that a file from elsewhere gives, which must not lead out of its folder.

    Args:
        source: the file that gives the name, for the message.
    Raises:
        UserError: it is no text, is empty, is a path, or has a character that file systems do not store.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{source} names a file {name!r}, which is not a name within its folder: do not use it")
    return name
