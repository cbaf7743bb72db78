"""Compressed COCO RLE without its pixels: run lengths, and from them whether it is whole and how large the mask is."""

from __future__ import annotations

from typing import Any

import numpy as np


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
