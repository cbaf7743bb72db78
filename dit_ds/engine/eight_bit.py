"""Moments in 8 bits, as bitsandbytes stores them: of each block of 256 elements a scale, and of each element a code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements, fixed in bitsandbytes' kernels
_ROWS = 1 << 12  # blocks at once
_ULPS = (0, 1, -1, 2, -2)


def dequantize(codes: Tensor, scales: Tensor, table: Tensor | None, start: int, numel: int) -> Tensor:
    """(numel,) fp32: the elements from `start` on.

    Args:
        codes: (N,) uint8.
        scales: (N / 256, rounded up) fp32.
        table: (256,) fp32, ascending: the codes' values.
    """
    assert table is not None
    blocks = torch.arange(start, start + numel, device=codes.device) // BLOCK
    return table[codes[start : start + numel].int()] * scales[blocks]


def quantize(values: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None) -> None:
    """Set codes and scales to the nearest to the values. Where each block of values was read by `dequantize`, reading them
    again gives the same bits.

    Args:
        values: (N,) fp32.
        codes, scales, table: as of `dequantize`; the first two are written.
    """
    assert table is not None
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    for at in range(0, len(blocks), _ROWS):
        block = blocks[at : at + _ROWS]
        found, scale = _nearest(block, table)
        part = codes[at * BLOCK : (at + _ROWS) * BLOCK]
        part.copy_(found.view(-1)[: part.numel()])
        scales[at : at + _ROWS] = scale


def _nearest(block: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 256) uint8 codes and (n,) scales of (n, 256) values."""
    largest = block.abs().amax(1)
    middles = (table[1:] + table[:-1]) / 2
    codes, scales = _encode(block, largest, middles), largest
    exact = _same(block, codes, scales, table)
    # a block whose largest element is negative was divided by more: the table's least value is above -1
    for ulps in _ULPS:
        scale = ((largest / table[0].abs()).view(torch.int32) + ulps).clamp(min=0).view(torch.float32)
        other = _encode(block, scale, middles)
        better = ~exact & _same(block, other, scale, table)
        codes, scales = torch.where(better[:, None], other, codes), torch.where(better, scale, scales)
        exact |= better
    return codes, scales


def _encode(block: Tensor, scale: Tensor, middles: Tensor) -> Tensor:
    return torch.bucketize(block / scale.clamp(min=1e-38)[:, None], middles).to(torch.uint8)


def _same(block: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    return (table[codes.int()] * scales[:, None] == block).all(1)
