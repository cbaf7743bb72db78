"""A micro-batch, written once, in the memory that the training process reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_ds.data.loading.packed_layout import shift_layouts
from dit_ds.data.loading.shared_memory import batch_memory
from dit_ds.errors import UserError


class PackedMasks:
    """(H, W) uint8 masks of 0 and 1 of different sizes, as `masks[i]`.

    Packed to bits, and a mask of several expressions once, so that little goes through the workers' queue.
    """

    def __init__(self, masks: Sequence[np.ndarray]):
        distinct = {id(m): m for m in masks}
        position = {key: i for i, key in enumerate(distinct)}
        self._positions = [position[id(m)] for m in masks]
        self._packed = [(m.shape, np.packbits(m.T)) for m in distinct.values()]  # column-major, as in memory

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i: int) -> np.ndarray:
        (height, width), bits = self._packed[self._positions[i]]
        return np.unpackbits(bits, count=height * width).reshape(width, height).T


class BatchBuilder:
    """A batch that is filled row by row.

    Images are stored as decoders write them, (B, S, S, 3), and returned as a (B, 3, S, S) view in channels-last memory
    format, without a copy. Rows that aren't filled have undefined contents.

    Args:
        rows: samples in the batch.
        side: S, of the padded square, in pixels.
        mask_type: of the masks.
    """

    def __init__(self, rows: int, side: int, mask_type: torch.dtype = torch.uint8):
        image_bytes = rows * side * side * 3
        mask_bytes = rows * side * side * mask_type.itemsize
        start = -(-image_bytes // 64) * 64  # of the masks, aligned for any type
        storage, self._zeroed = batch_memory(start + mask_bytes)
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._image = memory[:image_bytes].view(rows, side, side, 3)
        self._mask = memory[start : start + mask_bytes].view(mask_type).view(rows, side, side)
        self._arrays = self._image.numpy(), self._mask.numpy()
        self._rows: list[dict[str, Any]] = [{} for _ in range(rows)]

    def put(self, row: int, write_image: Callable[[np.ndarray], None], mask: np.ndarray, **values: Any) -> None:
        """Fill one row.

        Args:
            write_image: fills the (h, w, 3) uint8 array that it is given.
            mask: (h, w).
            values: the sample's other values, with the same keys in each row.
        """
        h, w = mask.shape
        image, masks = (array[row, :h, :w] for array in self._arrays)
        write_image(image)
        masks[:] = mask
        for array in self._arrays:
            if not self._zeroed:
                array[row, h:] = array[row, :h, w:] = 0
        self._rows[row] = {"size": np.array([h, w])} | values

    def collated(self) -> dict[str, Any]:
        """The batch.

        Returns:
            `image` (B, 3, S, S) uint8 in channels-last memory format, `mask` (B, S, S), `size` (B, 2): h and w before
            padding; and the rows' values: arrays stacked to (B, ...), `original` as `PackedMasks`, others as lists.
        """
        return {"image": self._image.permute(0, 3, 1, 2), "mask": self._mask} | stack_rows(self._rows)


def stack_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values of a batch's rows, which have the same keys, as `BatchBuilder.collated` describes them."""
    stacked: dict[str, Any] = {}
    for key in rows[0]:
        values = [r[key] for r in rows]
        if key == "original":
            stacked[key] = PackedMasks(values)
        elif isinstance(values[0], (np.ndarray, np.generic)):
            stacked[key] = torch.from_numpy(np.stack(values))
        else:
            stacked[key] = values
    return stacked


def join_slices(slices: Sequence[dict[str, Any] | UserError]) -> dict[str, Any] | UserError | None:
    """One micro-batch from its slices: slice i of n has rows i, i + n, i + 2n, ...

    Returns:
        The batch; the first error among the slices; None without slices.
    """
    batches: list[dict[str, Any]] = []
    for item in slices:
        if isinstance(item, UserError):
            return item
        batches.append(item)
    if len(batches) < 2:
        return batches[0] if batches else None
    if "packed" in batches[0]:
        batches = shift_layouts(batches)
    return {key: _join_values(key, [b[key] for b in batches]) for key in batches[0]}


def _join_values(key: str, parts: list[Any]) -> Any:
    if key == "bad":
        return sum(parts, [])
    if key == "packed":
        return torch.cat(parts)
    rows, first = sum(map(len, parts)), parts[0]
    joined: Any = [None] * rows
    if isinstance(first, Tensor):
        # images stay in channels-last memory format
        layout = torch.channels_last if first.dim() == 4 else torch.contiguous_format
        joined = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, memory_format=layout)
    for i, part in enumerate(parts):
        joined[i :: len(parts)] = part
    return joined
