"""Compressed COCO RLE to pixels: what pycocotools decodes byte by byte, run by run."""

from __future__ import annotations

from typing import Any

import numpy as np


def run_ends(counts: str | bytes) -> np.ndarray:
    """(runs,) int64: where each run ends, column by column; the first is of zeros and may be empty.

    The text is COCO's: numbers of five bits a character, the lowest first, and from the fourth on differences to the
    number before the last.
    """
    code = np.frombuffer(counts if isinstance(counts, bytes) else counts.encode(), np.uint8) - np.uint8(48)
    last = np.flatnonzero(code & 0x20 == 0)  # of each number's characters
    length = np.diff(last, prepend=-1)
    first = last - length + 1
    place = np.arange(len(code)) - np.repeat(first, length)
    numbers = np.add.reduceat((code & 0x1F).astype(np.int64) << (5 * place), first)
    numbers -= (code[last] & 0x10 != 0) * (np.int64(1) << (5 * length))  # negative ones
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return np.cumsum(numbers)


def decode_runs(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1, column by column in memory, as pycocotools decodes it."""
    height, width = rle["size"]
    flat, ends = np.zeros(height * width, np.uint8), run_ends(rle["counts"]).tolist()
    for start, end in zip(ends[::2], ends[1::2]):
        flat[start:end] = 1
    return flat.reshape(width, height).T
