"""Masks as runs of ones: of many compressed RLEs at once, which takes a tenth of the time of one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_ds.data.masks import group_lengths, rle_numbers


class MaskRuns:
    """The runs of ones of masks of any sizes.

    Args:
        rles: `{"size": [H, W], "counts": str}` of each, as of `masks.run_lengths`, which has the format; at least one.
    Raises:
        ValueError: as of `masks.run_lengths`.
    """

    def __init__(self, rles: Sequence[dict[str, Any]]):
        self._sizes = np.array([r["size"] for r in rles], np.int64)
        numbers, others = rle_numbers("".join(r["counts"] for r in rles))
        characters = np.array([len(r["counts"]) for r in rles])
        end = np.cumsum(characters)
        unfinished = np.searchsorted(others, np.stack([end - characters, end - 1, end]))
        counts = characters - (unfinished[2] - unfinished[0])  # of numbers
        if (counts < 1).any() or (unfinished[1] != unfinished[2]).any():
            raise ValueError("its mask is no compressed RLE")
        until = end - unfinished[2]
        # in pairs of a run of zeros and one of ones, where need be with an empty one of ones at a mask's end
        self._pairs, pairs, odd = counts // 2, (counts + 1) // 2, counts % 2 == 1  # those with ones; all
        last = np.cumsum(pairs) - 1
        self._first = last + 1 - pairs  # a mask's first pair
        runs = np.zeros((last[-1] + 1, 2), numbers.dtype)
        for start, stop, count in zip((2 * self._first).tolist(), until.tolist(), counts.tolist()):
            runs.ravel()[start : start + count] = numbers[stop - count : stop]
        # from the fourth on a number is the difference to the one two before it
        zeros, runs[self._first, 0] = runs[self._first, 0], 0
        sums = runs.cumsum(0, dtype=runs.dtype)
        sums -= np.repeat(sums[self._first] - runs[self._first], pairs, axis=0)
        sums[self._first, 0] = zeros
        sums[last[odd], 1] = 0
        # (pairs, 2): where each run of ones starts and ends, if all masks are one after another
        self._bounds = sums.ravel().cumsum(dtype=np.int64).reshape(-1, 2)
        pixels = self._sizes.prod(1)
        self._start = np.cumsum(pixels) - pixels
        if (sums < 0).any() or (self._bounds[last, 1] - self._start != pixels).any():
            raise ValueError("its mask's runs don't fill it")
        self._ones = (self._bounds - np.repeat(self._start, pairs)[:, None]).astype(np.int32)

    def __getitem__(self, i: int) -> np.ndarray:
        """(n, 2) int32: where each run of ones of mask i starts and ends, in column-major order."""
        return self._ones[self._first[i] : self._first[i] + self._pairs[i]]

    def empty(self) -> np.ndarray:
        """(masks,) bool: which have no ones."""
        return np.add.reduceat(self._bounds[:, 1] - self._bounds[:, 0], self._first) == 0

    def fill_block(self) -> np.ndarray:
        """(masks,) bool: which fill 3 x 3 pixels around the middle of their longest run or of their middle one.

        False says nothing of their other pixels.
        """
        starts, ends = self._bounds.T
        lengths, (height, width) = (ends - starts), self._sizes.T[..., None]
        pairs = group_lengths(self._first, len(lengths))
        found = np.flatnonzero(lengths == np.repeat(np.maximum.reduceat(lengths, self._first), pairs))
        longest = np.empty_like(self._first)
        longest[np.searchsorted(self._first, found, "right") - 1] = found
        chosen = np.stack([longest, self._first + pairs // 2], 1)  # (masks, 2)
        first = self._start[:, None]
        middle = (starts[chosen] + ends[chosen]) // 2 - first
        column, row = (
            np.minimum(np.maximum(x, 1), y - 2) for x, y in ((middle // height, width), (middle % height, height))
        )
        tops = (first + column * height + row - 1)[..., None] + height[..., None] * [-1, 0, 1]
        run = np.searchsorted(starts, tops, "right") - 1
        filled = (run >= self._first[:, None, None]) & (ends[run] >= tops + 3)
        return filled.all(2).any(1) & (self._sizes.min(1) >= 3)


def encode_ones(mask: np.ndarray) -> np.ndarray:
    """(n, 2) int32: where each run of ones of an (H, W) mask of 0 and 1 starts and ends, in column-major order."""
    columns = np.zeros(mask.size + 2, np.uint8)
    columns[1:-1].reshape(mask.T.shape)[:] = mask.T
    return np.flatnonzero(columns[1:] != columns[:-1]).astype(np.int32).reshape(-1, 2)
