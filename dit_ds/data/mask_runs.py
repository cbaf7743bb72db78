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
        if (last[until - 1] != ends - 1).any() or (np.diff(until, prepend=0) < 1).any():
            raise ValueError("its mask is no compressed RLE")
        counts = np.diff(until, prepend=0)
        row = np.repeat(np.arange(len(rles)), counts)
        column = np.arange(len(numbers)) - np.repeat(until - counts, counts)
        table = np.zeros((len(rles), -(-counts.max() // 2) * 2), np.int64)  # a mask's run lengths in each row
        table[row, column] = numbers
        for first in (1, 2):  # from the fourth on a number is the difference to the one two before it
            np.cumsum(table[:, first::2], axis=1, out=table[:, first::2])
        table[np.arange(table.shape[1]) >= counts[:, None]] = 0
        if (table < 0).any() or (table.sum(1) != self._sizes.prod(1)).any():
            raise ValueError("its mask's runs don't fill it")
        # (masks, pairs, 2): where each run of ones starts and ends; behind the last one both are the mask's end
        self._bounds = table.cumsum(1).reshape(len(rles), -1, 2)
        self._pairs = counts // 2

    def __getitem__(self, i: int) -> np.ndarray:
        """(n, 2) int32: where each run of ones of mask i starts and ends, in column-major order."""
        return self._bounds[i, : self._pairs[i]].astype(np.int32)

    def empty(self) -> np.ndarray:
        """(masks,) bool: which have no ones."""
        return (self._bounds[..., 0] == self._bounds[..., 1]).all(1)

    def fill_block(self) -> np.ndarray:
        """(masks,) bool: which fill 3 x 3 pixels in the middle of their longest run; False says nothing of other pixels."""
        starts, ends = self._bounds[..., 0], self._bounds[..., 1]
        masks, (height, width) = np.arange(len(starts)), self._sizes.T
        longest = (ends - starts).argmax(1)
        column, row = np.divmod((starts[masks, longest] + ends[masks, longest]) // 2, height)
        column, row = np.clip(column, 1, width - 2), np.clip(row, 1, height - 2)
        tops = ((column[:, None] + [-1, 0, 1]) * height[:, None]) + row[:, None] - 1
        # one search for all: a mask's pixels are numbered behind the former ones'
        shift = (masks * (self._sizes.prod(1).max() + 1))[:, None]
        found = np.searchsorted((starts + shift).ravel(), tops + shift, "right") - 1
        here = found >= (masks * starts.shape[1])[:, None]
        filled = (here & (ends.ravel()[found] >= tops + 3)).all(1)
        return filled & (self._sizes.min(1) >= 3)


def encode_ones(mask: np.ndarray) -> np.ndarray:
    """(n, 2) int32: where each run of ones of an (H, W) mask of 0 and 1 starts and ends, in column-major order."""
    columns = np.zeros(mask.size + 2, np.uint8)
    columns[1:-1].reshape(mask.T.shape)[:] = mask.T
    return np.flatnonzero(columns[1:] != columns[:-1]).astype(np.int32).reshape(-1, 2)
