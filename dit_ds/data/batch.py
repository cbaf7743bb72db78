"""A micro-batch, written once, where the training process will read it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Batch:
    """Rows of a batch, put in one by one.

    Pictures are written pixel by pixel, as decoders give them, and handed out with the channels in front without being
    transposed: what comes after reads either. Padding is the zeros that a fresh tensor consists of.

    Args:
        rows: samples in the batch.
        side: of the padded square, in pixels.
        mask_type: of the masks.
    """

    def __init__(self, rows: int, side: int, mask_type: torch.dtype = torch.uint8):
        self._image = _zeros((rows, side, side, 3), torch.uint8)
        self._mask = _zeros((rows, side, side), mask_type)
        self._in_numpy = self._image.numpy(), self._mask.numpy()
        self._rows: list[dict[str, Any]] = [{} for _ in range(rows)]

    def put(self, row: int, image: np.ndarray, mask: np.ndarray, **values: Any) -> None:
        """One sample.

        Args:
            image: (h, w, 3) uint8.
            mask: (h, w).
            values: what else there is, the same names in each row; `original` and what is no array stays a list.
        """
        h, w = mask.shape
        for array, part in zip(self._in_numpy, (image, mask)):
            array[row, :h, :w] = part
        self._rows[row] = {"size": np.array([h, w])} | values

    def collated(self) -> dict[str, Any]:
        """`image` (B, 3, S, S) uint8, channels last in memory, `mask` (B, S, S), `size` (B, 2): h and w before padding,
        and the values stacked, (B, ...), or as lists."""
        batch: dict[str, Any] = {"image": self._image.permute(0, 3, 1, 2), "mask": self._mask}
        for key in self._rows[0]:
            values = [r[key] for r in self._rows]
            stacks = isinstance(values[0], (np.ndarray, np.generic)) and key != "original"
            batch[key] = torch.from_numpy(np.stack(values)) if stacks else values
        return batch


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In a worker shared memory, as torch's own collate takes, so that the queue hands it over without copying."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=dtype)
    shared = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # new pages are zeros
    return torch.empty(0, dtype=dtype).set_(shared, 0, shape)
