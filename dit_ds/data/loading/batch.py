"""A micro-batch, written once, where the training process will read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_ds.data.loading.shared_memory import batch_memory
from dit_ds.errors import UserError


class PackedMasks:
    """(H, W) uint8 masks of 0 and 1 whose sizes differ, `masks[i]`; kept as bits, and of one that several expressions
    share once, so that a worker's queue has little to carry."""

    def __init__(self, masks: Sequence[np.ndarray]):
        distinct = {id(m): m for m in masks}
        place = {key: i for i, key in enumerate(distinct)}
        self._which = [place[id(m)] for m in masks]
        self._packed = [(m.shape, np.packbits(m.T)) for m in distinct.values()]  # column by column, as they lie

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, i: int) -> np.ndarray:
        (height, width), bits = self._packed[self._which[i]]
        return np.unpackbits(bits, count=height * width).reshape(width, height).T


class BatchBuilder:
    """Rows of a batch, put in one by one.

    Pictures are written pixel by pixel, as decoders give them, and handed out with the channels in front without being
    transposed: what comes after reads either. Rows that nothing was put in hold anything.

    Args:
        rows: samples in the batch.
        side: of the padded square, in pixels.
        mask_type: of the masks.
    """

    def __init__(self, rows: int, side: int, mask_type: torch.dtype = torch.uint8):
        image, mask = (rows, side, side, 3), (rows, side, side)
        start = -(-math.prod(image) // 64) * 64  # the mask's, behind the image, where any type may begin
        storage, self._clean = batch_memory(start + math.prod(mask) * mask_type.itemsize)
        self._image = torch.empty(0, dtype=torch.uint8).set_(storage, 0, image)
        self._mask = torch.empty(0, dtype=mask_type).set_(storage, start // mask_type.itemsize, mask)
        self._in_numpy = self._image.numpy(), self._mask.numpy()
        self._rows: list[dict[str, Any]] = [{} for _ in range(rows)]

    def put(self, row: int, write_image: Callable[[np.ndarray], None], mask: np.ndarray, **values: Any) -> None:
        """One sample.

        Args:
            write_image: is given the (h, w, 3) uint8 to fill.
            mask: (h, w).
            values: what else there is, the same names in each row.
        """
        h, w = mask.shape
        image, masks = (array[row, :h, :w] for array in self._in_numpy)
        write_image(image)
        masks[:] = mask
        for array in self._in_numpy:
            if not self._clean:
                array[row, h:] = array[row, :h, w:] = 0
        self._rows[row] = {"size": np.array([h, w])} | values

    def collated(self) -> dict[str, Any]:
        """`image` (B, 3, S, S) uint8, channels last in memory, `mask` (B, S, S), `size` (B, 2): h and w before padding,
        and the values: arrays stacked, (B, ...), `original` as `PackedMasks`, others as lists."""
        batch: dict[str, Any] = {"image": self._image.permute(0, 3, 1, 2), "mask": self._mask}
        for key in self._rows[0]:
            values = [r[key] for r in self._rows]
            if key == "original":
                batch[key] = PackedMasks(values)
            elif isinstance(values[0], (np.ndarray, np.generic)):
                batch[key] = torch.from_numpy(np.stack(values))
            else:
                batch[key] = values
        return batch


def join(shares: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError | None:
    """One micro-batch of which each worker read every so manieth sample; of one alone it is as it is, of none None."""
    errors = [s for s in shares if isinstance(s, UserError)]
    if errors or len(shares) < 2:
        return (errors or shares or [None])[0]
    batch: dict[str, Any] = {}
    for key, first in shares[0].items():
        parts = [s[key] for s in shares]
        if key == "bad":
            batch[key] = sum(parts, [])
            continue
        n = sum(map(len, parts))
        # pictures stay channels last in memory
        form = torch.channels_last if isinstance(first, Tensor) and first.dim() == 4 else torch.contiguous_format
        joined: Any = [None] * n
        if isinstance(first, Tensor):
            joined = torch.empty((n, *first.shape[1:]), dtype=first.dtype, memory_format=form)
        for worker, part in enumerate(parts):
            joined[worker :: len(parts)] = part
        batch[key] = joined
    return batch
