"""Masks as runs of ones: of many compressed RLEs at once, which takes a tenth of the time of one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_ds.data.masks import rle_numbers


class MaskRuns:
    """The runs of ones of masks of any sizes.

    Args:
        rles: `{"size": [H, W], "counts": str}` of each, as of `masks.run_lengths`, which has the format; at least one.
    Raises:
        ValueError: as of `masks.run_lengths`.
    """

    def __init__(self, rles: Sequence[dict[str, Any]]):
        self._sizes = np.array([r["size"] for r in rles], np.int64)
        numbers, last = rle_numbers("".join(r["counts"] for r in rles))
        ends = np.cumsum([len(r["counts"]) for r in rles])  # in characters
        until = np.searchsorted(last, ends - 1) + 1  # in numbers
        counts = np.diff(until, prepend=0)
        if (counts < 1).any() or (last[until - 1] != ends - 1).any():
            raise ValueError("its mask is no compressed RLE")
        # in pairs of a run of zeros and one of ones, where need be with an empty one of ones at a mask's end
        self._pairs, pairs = counts // 2, (counts + 1) // 2
        self._first = np.cumsum(pairs) - pairs  # a mask's first pair
        runs = np.zeros((pairs.sum(), 2), np.int64)
        runs.ravel()[np.arange(len(numbers)) + np.repeat(2 * self._first - until + counts, counts)] = numbers
        # from the fourth on a number is the difference to the one two before it
        zeros, runs[self._first, 0] = runs[self._first, 0], 0
        sums = runs.cumsum(0)
        sums -= np.repeat(sums[self._first] - runs[self._first], pairs, axis=0)
        sums[self._first, 0] = zeros
        sums[(self._first + pairs - 1)[counts % 2 == 1], 1] = 0
        # (pairs, 2): where each run of ones starts and ends, if all masks are one after another
        self._bounds = sums.ravel().cumsum().reshape(-1, 2)
        self._start = np.cumsum(self._sizes.prod(1)) - self._sizes.prod(1)
        if (sums < 0).any() or (self._bounds[self._first + pairs - 1, 1] - self._start != self._sizes.prod(1)).any():
            raise ValueError("its mask's runs don't fill it")

    def __getitem__(self, i: int) -> np.ndarray:
        """(n, 2) int32: where each run of ones of mask i starts and ends, in column-major order."""
        first = self._first[i]
        return (self._bounds[first : first + self._pairs[i]] - self._start[i]).astype(np.int32)

    def empty(self) -> np.ndarray:
        """(masks,) bool: which have no ones."""
        return np.add.reduceat(self._bounds[:, 1] - self._bounds[:, 0], self._first) == 0

    def fill_block(self) -> np.ndarray:
        """(masks,) bool: which fill 3 x 3 pixels around the middle of their longest run or of their middle one.

        False says nothing of their other pixels.
        """
        starts, ends = self._bounds.T
        lengths, (height, width) = (ends - starts), self._sizes.T[..., None]
        pairs = np.diff(self._first, append=len(lengths))
        found = np.flatnonzero(lengths == np.repeat(np.maximum.reduceat(lengths, self._first), pairs))
        longest = np.empty_like(self._first)
        longest[np.searchsorted(self._first, found, "right") - 1] = found
        chosen = np.stack([longest, self._first + pairs // 2], 1)  # (masks, 2)
        first = self._start[:, None]
        middle = (starts[chosen] + ends[chosen]) // 2 - first
        column, row = np.clip(middle // height, 1, width - 2), np.clip(middle % height, 1, height - 2)
        tops = (first + column * height + row - 1)[..., None] + height[..., None] * [-1, 0, 1]
        run = np.searchsorted(starts, tops, "right") - 1
        filled = (run >= self._first[:, None, None]) & (ends[run] >= tops + 3)
        return filled.all(2).any(1) & (self._sizes.min(1) >= 3)


def encode_ones(mask: np.ndarray) -> np.ndarray:
    """(n, 2) int32: where each run of ones of an (H, W) mask of 0 and 1 starts and ends, in column-major order."""
    columns = np.zeros(mask.size + 2, np.uint8)
    columns[1:-1].reshape(mask.T.shape)[:] = mask.T
    return np.flatnonzero(columns[1:] != columns[:-1]).astype(np.int32).reshape(-1, 2)
