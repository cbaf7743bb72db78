"""Progress bars and lines on stderr that do not run into each other: on a terminal, and in a log that is searched later."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

# tqdm is imported where a bar is made: `--help` needs none
_SECONDS = 30  # between lines of a bar that is no terminal's


def progress_bar(iterable: Iterable[Any] | None = None, desc: str = "", **options: Any) -> Any:
    """A `tqdm.tqdm` on stderr. Where stderr is no terminal, each state is a line of its own, at most one in 30 seconds.

    Args:
        iterable, desc, options: as of `tqdm.tqdm`.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": _SECONDS, "ncols": 0}
    return tqdm(iterable, desc, **options)


def write_line(text: str) -> None:
    """Write a line to stderr, at the start of a line: a bar on a terminal is drawn again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and sys.stderr.isatty():
        tqdm.tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


class LineHandler(logging.Handler):
    """Logging by `write_line`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's message."""
        try:
            write_line(self.format(record))
        except Exception:  # as logging's own handlers do: what can't be said ends no run
            self.handleError(record)


class _Lines:
    """A file for tqdm: what would be written over itself becomes lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()  # tqdm goes up a line from a bar within a bar
        if text:
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()
