"""Large pictures in overlapping tiles: where they lie, and how their probabilities become one map without seams."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tile(NamedTuple):
    """A part of a picture: rows `top` to `bottom`, columns `left` to `right`, in pixels."""

    top: int
    bottom: int
    left: int
    right: int


class Tiling:
    """A picture's tiles, row by row; one that is no larger than a tile is a tile itself.

    Args:
        height, width: of the picture.
        side: of a tile; None takes every picture whole.
        overlap: of two tiles beside each other, at least; up to half a tile.
    """

    def __init__(self, height: int, width: int, side: int | None, overlap: int):
        self.height, self.width = height, width
        rows, columns = _spans(height, side or height, overlap), _spans(width, side or width, overlap)
        self.tiles = [Tile(*row, *column) for row in rows for column in columns]
        self._rows, self._columns = _weights(rows, height), _weights(columns, width)

    def blend(self, into: Tensor, i: int, probabilities: Tensor) -> None:
        """Add a tile's share to the picture's probabilities; the shares of a pixel add up to 1.

        Args:
            into: (H, W), which all tiles are added to, zeros at first.
            i: which tile.
            probabilities: (h, w) of the tile.
        """
        tile, columns = self.tiles[i], len(self._columns)
        share = torch.from_numpy(np.outer(self._rows[i // columns], self._columns[i % columns]).astype(np.float32))
        into[tile.top : tile.bottom, tile.left : tile.right] += share.to(into.device) * probabilities


def _spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of as few spans of `side` as overlap by `overlap` or more, evenly over the length."""
    if length <= side:
        return [(0, length)]
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    return [(start, start + side) for start in starts]


def _weights(spans: list[tuple[int, int]], length: int) -> list[np.ndarray]:
    """Each span's weights: a ramp over every overlap; those of a pixel add up to 1."""
    position, raw = np.arange(length) + 0.5, []
    for k, (start, end) in enumerate(spans):
        weight = ((position > start) & (position < end)).astype(float)
        if k:
            weight *= np.clip((position - start) / max(1, spans[k - 1][1] - start), 0, 1)
        if k + 1 < len(spans):
            weight *= np.clip((end - position) / max(1, end - spans[k + 1][0]), 0, 1)
        raw.append(weight)
    total = np.sum(raw, axis=0)
    return [(weight / total)[start:end] for weight, (start, end) in zip(raw, spans)]
