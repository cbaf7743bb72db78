"""What is asked of a running training from outside: `touch RUN/save`, `RUN/stop` or `RUN/evaluate`.

For clusters where a user may not signal the processes of a job, but can write to the run's folder.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

REQUESTS = ("save", "stop", "evaluate")
_EVERY = 1.0  # seconds between two looks: a shared file system is asked once for each file
_log = logging.getLogger("dit_ds")


class Requests:
    """Looks for the files. On rank 0 alone.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._looked = float("-inf")
        self._refused: set[str] = set()

    def take(self) -> set[str]:
        """What was asked for since the last look; its files are removed. At most one look a second."""
        now = time.monotonic()
        if now - self._looked < _EVERY:
            return set()
        self._looked = now
        return {name for name in REQUESTS if name not in self._refused and self._took(self.folder / name)}

    def _took(self, path: Path) -> bool:
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as e:  # a folder, or not ours to remove: it would be there again at each step
            _log.warning(f"warning: {path} can't be removed ({e.strerror}), so it is passed over in this run")
            self._refused.add(path.name)
            return False
        _log.info(f"{path} was asked for")
        return True
