"""Writing a part's file to a node's own disk, past the system's page cache, and the record beside it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_ds.checkpointing.parts import PAGE, Checksum
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, write_json


class PartWriter:
    """Writes a part's file; where it can't, it goes on without, as other nodes wait for what this rank sends."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.checksum, self.size, self.error = Checksum(), 0, ""
        self._hidden = folder / f".{name}.tmp"
        self._file: int | None = None  # its descriptor
        with self._noting_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_direct(self._hidden)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            with full_disk_is_user_error(self.path):
                yield
        except (UserError, OSError) as e:
            self.fail(str(e))

    def write(self, data: memoryview) -> None:
        """Append `CHUNK` bytes, or the last ones."""
        self.checksum.add(data)
        self.size += len(data)
        if self._file is None:
            return
        with self._noting_errors():
            pages = len(data) // PAGE * PAGE
            _write_all(self._file, data[:pages])
            if pages < len(data):  # at the end
                _set_direct(self._file, False)
                _write_all(self._file, data[pages:])

    def fail(self, error: str) -> None:
        """Note the first error, and leave nothing of the file."""
        self.error = self.error or error
        self.abandon()

    def abandon(self) -> None:
        """Leave nothing of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for path in (self._hidden, self.path):
            with contextlib.suppress(OSError):
                path.unlink()

    def finish(self, record: dict[str, Any], checked: bool = False) -> bool:
        """Give the file its name, and write its record; whether both are there.

        Args:
            checked: compare with the record that the sender made.
        """
        if checked and (record["bytes"], record["checksum"]) != (self.size, self.checksum.value):
            self.fail(f"{self.path} did not arrive as it was sent")
        if self._file is None:
            return False
        with self._noting_errors():
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
            self._hidden.replace(self.path)
            write_json(self.path.with_suffix(".json"), record)
        return not self.error


def _write_all(file: int, data: memoryview) -> None:
    """Write to a descriptor, directly if it is set so and the file system can."""
    while data:
        try:
            data = data[os.write(file, data) :]
        except OSError as e:
            if e.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(file, False)


def _open_direct(path: Path) -> int:
    """A descriptor past the system's page cache: filling that takes more processor time than all else."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with contextlib.suppress(OSError):  # tmpfs has no other way
        _set_direct(file, True)
    return file


def _set_direct(file: int, on: bool) -> None:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
