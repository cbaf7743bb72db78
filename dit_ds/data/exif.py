"""EXIF orientation: read from the bytes of a picture's file, set to "not turned" there, and applied to pixels.

The tag (0x0112, 1 to 8) says how viewers turn the stored pixels before they show them. Orientations in other metadata
(XMP, a text chunk) are not followed, as by most viewers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ORIENTATION = 0x0112
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of a TIFF entry's value: BYTE, SHORT, LONG, LONG8
TRANSPOSED = (5, 6, 7, 8)  # orientations in which height and width change places


class _Value(NamedTuple):
    """A number in a TIFF directory: where it is in the file, its `struct` format, and what it is."""

    at: int
    format: str
    value: int


def exif_orientation(data: bytes) -> int:
    """The orientation of a JPEG, PNG, WebP or TIFF file, from 1 to 8; 1, not turned, where it has none.

    Args:
        data: the file; whatever is wrong with its metadata, it then has no orientation.
    """
    return max((v.value for v in _orientations(data)), default=1)


def without_orientation(data: bytes) -> bytes:
    """The file with the same pixels and an orientation of 1; the same bytes if it has none other."""
    out = bytearray(data)
    for found in _orientations(data):
        struct.pack_into(found.format, out, found.at, 1)
    if data.startswith(b"\x89PNG"):
        for kind, start, end in png_chunks(data):
            if kind == b"eXIf":
                struct.pack_into(">I", out, end, zlib.crc32(kind + out[start:end]))
    return bytes(out)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) stored pixels as viewers show them: (H, W, 3), or (W, H, 3) for the orientations in `TRANSPOSED`."""
    if orientation in TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def _orientations(data: bytes) -> list[_Value]:
    """The valid orientations other than 1 of the file's first EXIF block."""
    block = _exif_block(data)
    if block is None:
        return []
    first: dict[int, list[_Value]] = next(tiff_directories(data, *block), {})
    return [v for v in first.get(_ORIENTATION, [])[:1] if 1 < v.value <= 8]


def _exif_block(data: bytes) -> tuple[int, int] | None:
    """Start and end of the TIFF structure that holds the file's EXIF data."""
    if data.startswith(b"\xff\xd8"):
        blocks = _jpeg_exif(data)
    elif data.startswith(b"\x89PNG"):
        blocks = ((start, end) for kind, start, end in png_chunks(data) if kind == b"eXIf")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        blocks = ((start, end) for kind, start, end in _riff_chunks(data) if kind == b"EXIF")
    elif data[:2] in (b"II", b"MM"):
        return 0, len(data)
    else:
        return None
    for start, end in blocks:
        return (start + 6 if data[start : start + 6] == b"Exif\0\0" else start), end
    return None


def _jpeg_exif(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each EXIF segment before the pixels."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill bytes before a marker
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # pixels, or the end
            return
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            yield at + 4, at + 2 + length
        at += 2 + length


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end (of its data, before the CRC) of each whole chunk of a PNG file."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, min(end, len(data))
        at = end + end % 2


def tiff_directories(data: bytes, start: int = 0, end: int | None = None) -> Iterator[dict[int, list[_Value]]]:
    """The directories of a TIFF structure (classic or BigTIFF), each as its whole numbers by tag.

    Tags whose values are not numbers or lie outside the structure are left out; at what is damaged it ends.

    Args:
        data: the file.
        start, end: of the structure within the file.
    """
    block = memoryview(data)[start:end]
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]), "")
    try:
        magic = struct.unpack_from(order + "H", block, 2)[0] if order else 0
        if magic not in (42, 43):
            return
        # of an offset, of the number of entries; where the first offset is
        offset, count, first = (order + "I", order + "H", 4) if magic == 42 else (order + "Q", order + "Q", 8)
        (at,) = struct.unpack_from(offset, block, first)
        seen: set[int] = set()
        while at and at not in seen:
            seen.add(at)
            (entries,) = struct.unpack_from(count, block, at)
            at += struct.calcsize(count)
            size = 4 + 2 * struct.calcsize(offset)  # of an entry: tag, type, number of values, value or its offset
            yield {
                tag: [v._replace(at=start + v.at) for v in values]
                for entry in range(at, min(at + entries * size, len(block) - size + 1), size)
                for tag, values in _entry(block, entry, order, offset)
            }
            (at,) = struct.unpack_from(offset, block, at + entries * size)
    except struct.error:  # beyond the end
        return


def _entry(block: memoryview, at: int, order: str, offset: str) -> Iterator[tuple[int, list[_Value]]]:
    """Tag and values of the directory entry at an offset, if they are whole numbers."""
    tag, kind = struct.unpack_from(order + "HH", block, at)
    (n,) = struct.unpack_from(offset, block, at + 4)
    if kind not in _TYPES:
        return
    width = struct.calcsize(offset)
    code, where = order + _TYPES[kind], at + 4 + width
    length = struct.calcsize(code)
    if n * length > width:
        (where,) = struct.unpack_from(offset, block, where)
    if n and where + n * length <= len(block):
        yield (
            tag,
            [_Value(p, code, struct.unpack_from(code, block, p)[0]) for p in range(where, where + n * length, length)],
        )
