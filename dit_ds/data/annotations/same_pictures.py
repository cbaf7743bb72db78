"""Which image files are copies of others, whatever their names."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from dit_ds.data.annotations.image_files import candidates


def same_pictures(folder: Path, names: Iterable[str], others: Iterable[str]) -> set[str]:
    """Those of `names` whose file has the bytes of one of `others`, as their length and CRC-32 tell.

    Only files as long as one of the other side are read. A file that is missing or can't be read is like none: that it
    is, is said where it is needed.

    Args:
        folder: that holds the files.
    """
    sizes = [{name: size for name in side if (size := _size(folder, name)) is not None} for side in (names, others)]
    lengths = set(sizes[0].values()) & set(sizes[1].values())
    found, wanted = ({name: _crc(folder, name) for name, n in side.items() if n in lengths} for side in sizes)
    evaluated = {(sizes[1][name], crc) for name, crc in wanted.items() if crc is not None}
    return {name for name, crc in found.items() if (sizes[0][name], crc) in evaluated}


def _size(folder: Path, name: str) -> int | None:
    for path in candidates(folder, name):
        try:
            return path.stat().st_size
        except OSError:
            continue
    return None


def _crc(folder: Path, name: str) -> int | None:
    for path in candidates(folder, name):
        try:
            return zlib.crc32(path.read_bytes())
        except OSError:
            continue
    return None
