"""Files that a run appends to: lines and TensorBoard's scalars, on disks that may be full or out of reach for a while."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dit_ds.errors import UserError
from dit_ds.files import is_away

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST = 10_000  # lines that wait for room; the oldest are dropped beyond, and counted
_log = logging.getLogger("dit_ds")


class LineFile:
    """Appends whole lines to a file.

    While the disk is full or can't be reached, lines wait in memory. They are written as soon as that is possible, in
    their order.

    Args:
        go_on: warn once when the disk is full; else that is an error. One that can't be reached never is.
    """

    def __init__(self, path: Path, go_on: bool):
        self.path, self.go_on = path, go_on
        self._file: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=_MOST)
        self._waits = False
        self._whole: int | None = None  # bytes of whole lines, while one is being written

    def write(self, line: str) -> None:
        """Append a line.

        Raises:
            UserError: the disk is full, and the run shall not go on without the line.
        """
        if len(self._waiting) == _MOST:
            self._waiting[1] = b'{"kind": "lost", "reason": "the disk was full or out of reach"}\n'
        self._waiting.append(line.encode() + b"\n")
        try:
            self.flush()
        except OSError as e:
            away = is_away(e, self.path.parent)
            if not away and e.errno not in _FULL:
                raise
            if not away and not self.go_on:
                self._waiting.clear()
                raise UserError(f"no space left while writing {self.path}: free some, and go on with --resume") from e
            if not self._waits:
                self._waits = True  # before the warning, which may be a line of this very file
                wrong = (
                    f"{self.path} can't be reached ({e.strerror})"
                    if away
                    else f"no space left while writing {self.path}"
                )
                _log.warning(f"warning: {wrong}: going on, its lines wait until that is over")
        else:
            self._waits = False

    def flush(self) -> None:
        """Write the lines that wait.

        Raises:
            OSError: it can't be written; the file then ends with a whole line.
        """
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                if self._whole is not None:  # what it was cut off in
                    os.ftruncate(self._file, self._whole)
            self._write_waiting(self._file)
        except OSError as e:
            if is_away(e, self.path.parent) and self._file is not None:
                with contextlib.suppress(OSError):
                    os.close(self._file)
                self._file = None
            raise

    def _write_waiting(self, file: int) -> None:
        while self._waiting:
            self._whole, line = os.fstat(file).st_size, self._waiting[0]
            try:
                written = os.write(file, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, self._whole)
                raise
            self._waiting.popleft()
        self._whole = None

    def close(self) -> None:
        """Write what waits, if there is room now, and close."""
        try:
            if self._waiting:
                self.flush()
        except OSError as e:
            _log.warning(f"warning: {len(self._waiting)} lines of {self.path} are lost ({e.strerror})")
        if self._file is not None:
            os.close(self._file)
            self._file = None


class LineFileHandler(logging.Handler):
    """Logging to a `LineFile`, each line with the local time before it."""

    def __init__(self, path: Path, go_on: bool):
        super().__init__()
        self.file = LineFile(path, go_on)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record's message."""
        self.file.write(self.format(record))

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


class ScalarBoard:
    """TensorBoard's scalars of a run.

    While the disk is full or can't be reached they are left out; a new file of events is begun afterwards.

    Args:
        folder: for the files of events.
        purge_step: events of this step and later ones, of files before, are void.
        go_on: as of `LineFile`.
    """

    def __init__(self, folder: Path, purge_step: int, go_on: bool):
        self.folder, self.go_on = folder, go_on
        self._full = False
        self._writer: SummaryWriter | None = None
        self._open(purge_step)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    def add(self, kind: str, values: Mapping[str, object], step: int) -> None:
        """Add each number of `values` as `KIND/NAME`.

        Raises:
            UserError: the disk is full, and the run shall not go on without.
        """
        try:
            if self._writer is None:
                os.stat(self.folder.parent)  # TensorBoard would make it
                self._open(None)
            assert self._writer is not None
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()
        except OSError as e:
            self._failed(e)
        else:
            self._full = False

    def _failed(self, e: OSError) -> None:
        self._writer = None  # its thread has ended with the error
        away = is_away(e, self.folder.parent)
        if not away and e.errno not in _FULL:
            raise e
        if not away and not self.go_on:
            raise UserError(f"no space left while writing {self.folder}: free some, and go on with --resume") from e
        if not self._full:
            self._full = True
            wrong = (
                f"{self.folder} can't be reached ({e.strerror})"
                if away
                else f"no space left while writing {self.folder}"
            )
            _log.warning(f"warning: {wrong}: going on without TensorBoard until that is over")

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as e:
                self._failed(e)
