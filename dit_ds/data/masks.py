"""Compressed COCO RLE without its pixels: run lengths, and from them whether it is whole and how large the mask is."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_ds.errors import UserError


def run_lengths(rle: dict[str, Any]) -> np.ndarray:
    """(runs,) int64: lengths of the runs down the columns, of zeros and of ones in turn; ones are at [1::2].

    Source: pycocotools' `rleFrString`. Five bits a character from the lowest on, bit 5 says that more follow, the sign
    is in the last one's bit 4; from the fourth run on it is the difference to the run before the last.

    Raises:
        ValueError: it is no compressed RLE, or its runs don't fill its size; pycocotools would read or write past its
            end.
    """
    height, width = rle["size"]
    if not isinstance(rle["counts"], str) or not rle["counts"].isascii():
        raise ValueError("its mask is no compressed RLE")
    digits = np.frombuffer(rle["counts"].encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)
    if not len(last) or last[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("its mask is no compressed RLE")
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 7:  # more bits than any image has pixels
        raise ValueError("its mask is no compressed RLE")
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    runs -= np.where(digits[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its mask's runs don't fill {height}x{width}")
    return runs


def decode_runs(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1, column by column in memory, as pycocotools decodes it."""
    height, width = rle["size"]
    flat, ends = np.zeros(height * width, np.uint8), np.cumsum(run_lengths(rle)).tolist()
    for start, end in zip(ends[::2], ends[1::2]):
        flat[start:end] = 1
    return flat.reshape(width, height).T


_FARTHEST = 10  # times the picture's longer side, a corner may lie from its origin


class UnusableRecord(UserError):
    """One ref or image that can't be used; `dit-ds data shard --skip-bad` drops it and counts it."""


def annotation_rle(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, the union of its parts."""
    return unite(annotation, height, width)[0]


def unite(
    annotation: dict[str, Any], height: int, width: int, legacy_overlap: bool = False
) -> tuple[dict[str, Any], bool]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, and whether its parts overlap.

    Takes the three encodings found in the wild: polygons, a list of RLE dicts (refclef), one dict (crowd). Parts are
    united: where polygons overlap the pixel counts once.

    Args:
        legacy_overlap: pixels that several parts cover become background, as for LAVT and LISA, which sum the parts'
            masks and take the ones.
    Raises:
        UnusableRecord: there is no polygon or run in it that encloses anything.
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
    """Each part of an annotation's mask as compressed RLE."""
    from pycocotools import mask as coco

    segmentation = annotation.get("segmentation")
    parts: list[Any] = segmentation if isinstance(segmentation, list) else [segmentation]
    # fewer than three corners enclose nothing, and pycocotools takes four numbers for a box
    parts = [p for p in parts if isinstance(p, dict) or (isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0)]
    try:
        rles = [_compressed(p, height, width) for p in parts]
        coco.area(rles)  # reads each
        return rles
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as e:
        raise UnusableRecord(f"annotation {annotation.get('id')}: its segmentation can't be read ({e})") from None


def _compressed(part: list[float] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """One polygon or RLE as compressed RLE.

    Raises:
        ValueError: what pycocotools would die of, or give a mask for that fills no picture.
    """
    from pycocotools import mask as coco

    if isinstance(part, list):
        # it walks along the whole outline
        if not (np.abs(np.array(part, float)) <= _FARTHEST * max(height, width)).all():
            raise ValueError("a corner is far outside the picture")
        return coco.frPyObjects([part], height, width)[0]
    rle = coco.frPyObjects([part], height, width)[0] if isinstance(part["counts"], list) else part
    counts = rle["counts"]
    run_lengths({"size": rle["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts})
    return rle


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1 from compressed COCO RLE."""
    from pycocotools import mask as coco

    return coco.decode(rle)
