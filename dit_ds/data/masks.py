"""Masks as compressed COCO RLE: from annotations to RLE, from RLE to run lengths and to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_ds.errors import UserError

_MAX_CORNER_DISTANCE = 10  # of a polygon's corner from the origin, in multiples of the image's longer side


def run_lengths(rle: dict[str, Any]) -> np.ndarray:
    """(runs,) int64: lengths of the runs in column-major order, zeros and ones in turn; the runs of ones are [1::2].

    Source: pycocotools' `rleFrString`. A run is written as characters of six bits, lowest bits first: bits 0 to 4 are
    data, bit 5 says that another character follows, and bit 4 of the last one is the sign. From the fourth run on the
    value is the difference to the run two before it.

    Args:
        rle: `{"size": [H, W], "counts": str}`.
    Raises:
        ValueError: it is no compressed RLE, or its runs don't add up to H x W pixels; pycocotools would read or write
            out of bounds.
    """
    height, width = rle["size"]
    if not isinstance(rle["counts"], str) or not rle["counts"].isascii():
        raise ValueError("its mask is no compressed RLE")
    digits = np.frombuffer(rle["counts"].encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)
    if not len(last) or last[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("its mask is no compressed RLE")
    first = np.concatenate([[0], last[:-1] + 1])
    position = np.arange(len(digits)) - np.repeat(first, last - first + 1)  # of a digit in its number
    if position.max() > 7:  # more bits than any image has pixels
        raise ValueError("its mask is no compressed RLE")
    runs = np.add.reduceat((digits & 31) << (5 * position), first)
    runs -= np.where(digits[last] & 16, np.int64(1) << (5 * (position[last] + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its mask's runs don't fill {height}x{width}")
    return runs


def holds_square(runs: np.ndarray, height: int, side: int) -> bool:
    """Whether a mask holds a square of `side` x `side` ones; False may be wrong where a column has two runs as long.

    Args:
        runs: of `run_lengths`.
        height: of the mask.
    """
    ends = np.cumsum(runs)
    start = ends[:-1:2]  # of each run of ones, in column-major order
    column, top = start // height, start % height
    bottom = np.minimum(top + runs[1::2], height)  # of the run's part in its first column
    last = (start + runs[1::2] - 1) // height
    if (last - column > side).any():  # columns that are full
        return height >= side
    long = bottom - top >= side
    column, top, bottom = column[long], top[long], bottom[long]
    longest = np.lexsort((top - bottom, column))
    column, first = np.unique(column[longest], return_index=True)
    if len(column) < side:
        return False
    top, bottom = top[longest][first], bottom[longest][first]
    window = np.lib.stride_tricks.sliding_window_view
    shared = window(bottom, side).min(1) - window(top, side).max(1)
    adjacent = column[side - 1 :] - column[: len(column) - side + 1] == side - 1
    return bool((adjacent & (shared >= side)).any())


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1 in column-major memory, as pycocotools decodes it.

    Args:
        rle: `{"size": [H, W], "counts": str}`.
    Raises:
        ValueError: as of `run_lengths`.
    """
    height, width = rle["size"]
    pixels, ends = np.zeros(height * width, np.uint8), np.cumsum(run_lengths(rle)).tolist()
    for start, end in zip(ends[::2], ends[1::2]):
        pixels[start:end] = 1
    return pixels.reshape(width, height).T


class UnusableRecord(UserError):
    """One ref or image that can't be used; `dit-ds data shard --skip-bad` drops it and counts it."""


def annotation_rle(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, the union of its parts."""
    return merge_parts(annotation, height, width)[0]


def merge_parts(
    annotation: dict[str, Any], height: int, width: int, legacy_overlap: bool = False
) -> tuple[dict[str, Any], bool]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, and whether its parts overlap.

    Reads the three encodings of COCO and REFER: polygons, a list of RLE dicts (refclef), one RLE dict (crowd). The mask
    is the union of its parts: where polygons overlap the pixel counts once.

    Args:
        annotation: COCO's.
        height, width: of its image, in pixels.
        legacy_overlap: pixels that several parts cover become background, as in LAVT's and LISA's code, which sums the
            parts' masks and selects the value 1.
    Raises:
        UnusableRecord: its mask is empty, of another size than the image, or can't be read.
    """
    from pycocotools import mask as coco

    parts = _parts(annotation, height, width)
    merged = coco.merge(parts) if parts else None
    if merged is None or int(coco.area(merged)) == 0:
        raise UnusableRecord(f"annotation {annotation.get('id')} has no polygon that encloses anything")
    if list(merged["size"]) != [height, width]:
        raise UnusableRecord(
            f"annotation {annotation.get('id')}: its mask is {merged['size']}, its image {[height, width]}"
        )
    overlapping = int(coco.area(parts).sum()) > int(coco.area(merged))
    if overlapping and legacy_overlap:
        once = coco.decode(parts).sum(2) == 1
        if not once.any():
            raise UnusableRecord(f"annotation {annotation.get('id')}: its polygons overlap everywhere")
        merged = coco.encode(np.asfortranarray(once, np.uint8))
    return {"size": [height, width], "counts": merged["counts"].decode()}, overlapping


def _parts(annotation: dict[str, Any], height: int, width: int) -> list[dict[str, Any]]:
    """Each part of an annotation's mask as compressed RLE.

    Raises:
        UnusableRecord: pycocotools can't read it.
    """
    from pycocotools import mask as coco

    segmentation = annotation.get("segmentation")
    parts: list[Any] = segmentation if isinstance(segmentation, list) else [segmentation]
    # fewer than three corners enclose no area, and pycocotools reads four numbers as a box
    parts = [p for p in parts if isinstance(p, dict) or (isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0)]
    try:
        rles = [_compressed(p, height, width) for p in parts]
        coco.area(rles)  # raises where pycocotools can't read one
        return rles
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as e:
        raise UnusableRecord(f"annotation {annotation.get('id')}: its segmentation can't be read ({e})") from None


def _compressed(part: list[float] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """One polygon or RLE as compressed RLE.

    Raises:
        ValueError: pycocotools would crash on it, or give a mask that is not height x width.
    """
    from pycocotools import mask as coco

    if isinstance(part, list):
        # pycocotools takes time and memory in proportion to the outline's length
        if not (np.abs(np.array(part, float)) <= _MAX_CORNER_DISTANCE * max(height, width)).all():
            raise ValueError("a corner is far outside the picture")
        return coco.frPyObjects([part], height, width)[0]
    rle = coco.frPyObjects([part], height, width)[0] if isinstance(part["counts"], list) else part
    counts = rle["counts"]
    run_lengths({"size": rle["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts})
    return rle
