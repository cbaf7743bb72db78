"""A folder of results, written line by line: stopped at any time, even by SIGKILL, it is gone on with.

request.json    what was asked for, with which weights: another request in the same folder is refused
results.jsonl   a line an expression, in order
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dit_ds.errors import UserError
from dit_ds.files import atomic_write, full_disk_is_user_error, parse_json, read_json, write_json


class ResultsFolder:
    """The folder, held by this process until it ends or `close` is called.

    Args:
        path: of the folder, made if it isn't there.
        request: what is asked for, of JSON's types.

    Attributes:
        path: of the folder.
        done: lines that were written before.

    Raises:
        UserError: the folder holds something else, or is of another request, or another process writes to it.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]):
        self.path = Path(path)
        with full_disk_is_user_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._check(request)
            self._lines: BinaryIO = open(self.path / "results.jsonl", "a+b")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lines.close()
            raise UserError(f"another process writes to {self.path}: wait for it, or choose another folder") from None
        self.done = self._whole_lines()

    def _check(self, request: dict[str, Any]) -> None:
        known = self.path / "request.json"
        if not known.exists():
            names = (p.name for p in self.path.iterdir())  # what a kill left of a request is not in the way
            if held := sorted(n for n in names if not n.startswith(f".{known.name}.")):
                raise UserError(f"{self.path} holds {held[0]!r}, and no results of predict: choose another folder")
            write_json(known, request)
            return
        former = read_json(known, "request")
        former = former if isinstance(former, dict) else {}
        differ = sorted(k for k in request.keys() | former.keys() if request.get(k) != former.get(k))
        if differ:
            raise UserError(
                f"{self.path} has results of another request, its {', '.join(differ)} differ: choose another folder"
            )

    def _whole_lines(self) -> int:
        """Their number; what a process that was killed left of a line is cut off."""
        self._lines.seek(0)
        count = end = 0
        for line in self._lines:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        self._lines.truncate(end)
        return count

    def append(self, records: list[dict[str, Any]]) -> int:
        """Write a line each, all or, if the process is killed, the first ones; returns their number.

        Raises:
            UserError: the disk is full.
        """
        with full_disk_is_user_error(self.path):
            self._lines.write(b"".join(json.dumps(r).encode() + b"\n" for r in records))
            self._lines.flush()
            os.fsync(self._lines.fileno())
        return len(records)

    def records(self) -> Iterator[dict[str, Any]]:
        """All that were written.

        Raises:
            UserError: a line was damaged.
        """
        with open(self.path / "results.jsonl", "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    yield parse_json(line)
                except ValueError as e:
                    raise UserError(
                        f"line {n} of {f.name} is damaged ({e}): remove {self.path}, and run it again"
                    ) from None

    def close(self) -> None:
        """Let go of the folder."""
        self._lines.close()

    def write_list(self, name: str, records: Iterator[dict[str, Any]]) -> Path:
        """Write records as one JSON list, whole or not at all; returns the file's path."""
        path, separator = self.path / name, b"[\n"
        with atomic_write(path) as f:
            for record in records:
                f.write(separator + json.dumps(record).encode())
                separator = b",\n"
            f.write((b"[" if separator == b"[\n" else b"\n") + b"]\n")
        return path
