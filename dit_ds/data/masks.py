"""Masks as compressed COCO RLE: from annotations to RLE, from RLE to run lengths and to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_ds.errors import UserError

_MAX_CORNER_DISTANCE = 10  # of a polygon's corner from the origin, in multiples of the image's longer side
_FRACTION = 1.01  # a coordinate that is a share of the picture's side, rounded


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
    numbers, _ = rle_numbers(rle["counts"])
    runs = numbers.astype(np.int64)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its mask's runs don't fill {height}x{width}")
    return runs


def group_lengths(first: np.ndarray, length: int) -> np.ndarray:
    """(n,): lengths of consecutive groups, of which `first` (n,) are the first positions, in a sequence of `length`."""
    lengths = np.empty_like(first)  # `np.diff` with `append` takes several times as long
    lengths[:-1], lengths[-1:] = first[1:] - first[:-1], length - first[-1:]
    return lengths


def rle_numbers(counts: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that compressed RLEs are written in.

    Args:
        counts: of one RLE, or of several, one after another.
    Returns:
        (n,), int32 or int64, whichever holds the sum of their magnitudes; and the positions of the characters that don't
        end a number.
    Raises:
        ValueError: it is none.
    """
    digits = np.frombuffer(counts.encode(), np.uint8) - np.uint8(48)
    ends = digits < 32
    if not len(ends) or not ends[-1] or digits.max() > 63:
        raise ValueError("its mask is no compressed RLE")
    numbers = (digits[ends] ^ 16).astype(np.int8) - np.int8(16)  # of the last characters alone, with their signs
    others = np.flatnonzero(~ends)
    number = others - np.arange(len(others))  # which each belongs to
    begins = np.ones(len(others), bool)
    begins[1:] = number[1:] != number[:-1]
    first = np.flatnonzero(begins)
    characters = group_lengths(first, len(others))  # before a number's last one
    if characters.max(initial=0) > 7:  # more bits than any image has pixels
        raise ValueError("its mask is no compressed RLE")
    place = np.arange(len(others)) - np.repeat(first, characters)
    low = np.add.reduceat((digits[others] & 31).astype(np.int64) << (5 * place), first)
    longer = number[first]
    long = (numbers[longer].astype(np.int64) << (5 * characters)) + low
    numbers = numbers.astype(np.int32 if 16 * len(numbers) + np.abs(long).sum() < 1 << 31 else np.int64)
    numbers[longer] = long
    return numbers, others


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


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """An (H, W) mask of bool or of 0 and 1 as compressed COCO RLE, `{"size": [H, W], "counts": str}`."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


class UnusableRecord(UserError):
    """One ref or image that can't be used; `dit-ds data shard --skip-bad` drops it and counts it."""


def annotation_rle(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, the union of its parts."""
    return merge_parts(annotation, height, width)[0]


def merge_parts(
    annotation: dict[str, Any],
    height: int,
    width: int,
    legacy_overlap: bool = False,
    *,
    with_visibility: bool = False,
    published: bool = False,
) -> tuple[dict[str, Any], bool]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`, and whether its parts overlap.

    Reads the three encodings of COCO and REFER: polygons, a list of RLE dicts (refclef), one RLE dict (crowd). The mask
    is the union of its parts: where polygons overlap the pixel counts once. A polygon is `[x, y, x, y, ..]` or
    `[[x, y], [x, y], ..]`. A part that can't be read makes the whole annotation unusable.

    Args:
        annotation: COCO's.
        height, width: of its image, in pixels.
        legacy_overlap: pixels that several parts cover become background, as in LAVT's and LISA's code, which sums the
            parts' masks and selects the value 1.
        with_visibility: a polygon's corners are (x, y, v), v COCO's visibility of keypoints.
        published: leave out parts that are no polygon, as published code does, and take every other as it is.
    Raises:
        UnusableRecord: its mask is empty, of another size than the image, or can't be read.
    """
    from pycocotools import mask as coco

    parts = _parts(annotation, height, width, with_visibility, published)
    if not parts:
        raise UnusableRecord(f"annotation {annotation.get('id')} has no polygon with three corners, and no RLE")
    merged = coco.merge(parts)
    if int(coco.area(merged)) == 0:
        raise UnusableRecord(
            f"annotation {annotation.get('id')}: its mask covers no pixel of the {width}x{height} image"
        )
    overlapping = int(coco.area(parts).sum()) > int(coco.area(merged))
    if overlapping and legacy_overlap:
        once = coco.decode(parts).sum(2) == 1
        if not once.any():
            raise UnusableRecord(f"annotation {annotation.get('id')}: its polygons overlap everywhere")
        merged = coco.encode(np.asfortranarray(once, np.uint8))
    return {"size": [height, width], "counts": merged["counts"].decode()}, overlapping


def is_polygon_or_rle(part: Any) -> bool:
    """Whether published code reads a part of a segmentation: a polygon of three corners or more, or an RLE."""
    return isinstance(part, dict) or (isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0)


def _parts(
    annotation: dict[str, Any], height: int, width: int, with_visibility: bool, published: bool
) -> list[dict[str, Any]]:
    """Each part of an annotation's mask as compressed RLE.

    Raises:
        UnusableRecord: one can't be read, or is of another size than the image.
    """
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        return []
    parts: list[Any] = segmentation if isinstance(segmentation, list) else [segmentation]
    if published:
        parts = [p for p in parts if is_polygon_or_rle(p)]
    elif _is_one_polygon(parts, 3 if with_visibility else 2):
        parts = [parts]
    rles = []
    for n, part in enumerate(parts, 1):
        try:
            rle = _read_part(part, height, width, with_visibility, published)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as e:
            where = f"part {n} of {len(parts)}: " if len(parts) > 1 else ""
            raise UnusableRecord(
                f"annotation {annotation.get('id')}: its segmentation can't be read ({where}{e})"
            ) from None
        if list(rle["size"]) != [height, width]:
            raise UnusableRecord(
                f"annotation {annotation.get('id')}: its mask is {rle['size']}, its image {[height, width]}"
            )
        rles.append(rle)
    return rles


def _read_part(part: Any, height: int, width: int, with_visibility: bool, published: bool) -> dict[str, Any]:
    """A polygon or RLE as compressed RLE.

    Raises:
        ValueError: it is neither, or what it encloses would be lost.
    """
    from pycocotools import mask as coco

    if isinstance(part, dict):
        rle = compressed_rle(part, height, width)
    else:
        corners = _corners(part, with_visibility)
        if not published:
            _require_pixels(corners, height, width)
        rle = _rasterized(corners, height, width)
    coco.area([rle])  # raises where pycocotools can't read it
    return rle


def _is_one_polygon(parts: list[Any], length: int) -> bool:
    """Whether a segmentation is one polygon without the list around it: numbers, or corners."""
    corners = all(isinstance(p, list) and len(p) == length and all(type(x) in (int, float) for x in p) for p in parts)
    return bool(parts) and (all(type(p) in (int, float) for p in parts) or corners)


def _corners(part: Any, with_visibility: bool) -> np.ndarray:
    """(n, 2) float64: a polygon's corners, x and y in pixels.

    Raises:
        ValueError: it is no polygon.
    """
    length, form = (3, "x, y, v, x, y, v, ..") if with_visibility else (2, "x, y, x, y, ..")
    if not isinstance(part, list):
        raise ValueError(f"{str(part)[:40]!r} is neither a polygon nor an RLE")
    flat: list[Any] = part
    if any(isinstance(c, list) for c in part):
        if not all(isinstance(c, list) and len(c) == length for c in part):
            hint = "; --corners xyv reads (x, y, v)" if {len(c) for c in part if isinstance(c, list)} == {3} else ""
            raise ValueError(f"its corners are not all of {length} numbers{hint}")
        flat = [x for c in part for x in c]
    if not all(type(x) in (int, float) for x in flat):
        raise ValueError("a corner is no number")
    if len(flat) % length or len(flat) < 3 * length:
        box = ", as a box" if len(flat) == 4 else ""
        raise ValueError(f"it has {len(flat)} numbers{box}; a polygon is {form} of three corners or more")
    corners = np.array(flat, float).reshape(-1, length)
    if not np.isfinite(corners).all():
        raise ValueError("a corner is no number")
    if with_visibility and not np.isin(corners[:, 2], (1, 2)).all():
        raise ValueError("a corner's visibility is neither 1 nor 2: it was not labelled")
    return corners[:, :2]


def _require_pixels(corners: np.ndarray, height: int, width: int) -> None:
    """Raise unless a polygon lies in the picture, in pixels: what is drawn elsewhere would be lost from its mask.

    Raises:
        ValueError: it doesn't.
    """
    least, most = corners.min(0), corners.max(0)
    if min(height, width) > 1 and np.abs(corners).max() <= _FRACTION:
        raise ValueError("all its corners are from 0 to 1: give them in pixels, times width and height")
    if (most < 0).any() or (least > (width, height)).any():
        raise ValueError(f"it lies outside the picture of {width}x{height}")


def _rasterized(corners: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """A polygon as compressed RLE.

    Raises:
        ValueError: pycocotools would crash on it.
    """
    from pycocotools import mask as coco

    # pycocotools takes time and memory in proportion to the outline's length
    if not (np.abs(corners) <= _MAX_CORNER_DISTANCE * max(height, width)).all():
        raise ValueError("a corner is far outside the picture")
    return coco.frPyObjects([corners.ravel().tolist()], height, width)[0]


def compressed_rle(part: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """An RLE, compressed or a list of run lengths, as compressed RLE.

    Raises:
        ValueError: pycocotools would crash on it, or give a mask that is not of its own size.
    """
    from pycocotools import mask as coco

    if "counts" not in part or "size" not in part:
        raise ValueError(f"it has no '{'size' if 'counts' in part else 'counts'}'")
    counts = part["counts"]
    if isinstance(counts, list) and not all(type(c) is int and c >= 0 for c in counts):
        raise ValueError("its run lengths are not whole numbers from 0 on")
    rle = coco.frPyObjects([part], height, width)[0] if isinstance(counts, list) else part
    compressed = {"size": rle["size"], "counts": rle["counts"]}
    if isinstance(compressed["counts"], bytes):
        compressed["counts"] = compressed["counts"].decode()
    run_lengths(compressed)
    return compressed
