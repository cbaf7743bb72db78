"""SAM's position tables, absolute and relative: parameters of the length that they were trained at, whatever the image's
size. The forward pass interpolates them to its grid, so that gradients reach the rows of the table itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def absolute_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """`pos_embed` (1, h, w, D) to (1, H, W, D) of a grid, bicubic as in the paper's released code."""
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    planes = rearrange(_at_least_fp32(table), "1 h w d -> 1 d h w")
    planes = F.interpolate(planes, tuple(grid), mode="bicubic", align_corners=False)
    return rearrange(planes, "1 d h w -> 1 h w d").to(table.dtype)


def relative_positions(table: Tensor, length: int) -> Tensor:
    """`rel_pos_h` or `rel_pos_w` (L, d) to (length, d), linear as SAM's `get_rel_pos`."""
    if table.shape[0] == length:
        return table
    rows = F.interpolate(rearrange(_at_least_fp32(table), "n d -> 1 d n"), size=length, mode="linear")
    return rearrange(rows, "1 d n -> n d").to(table.dtype)


def _at_least_fp32(table: Tensor) -> Tensor:
    return table.to(torch.promote_types(table.dtype, torch.float32))


def is_other_length(name: str, value: Tensor, target: Tensor) -> bool:
    """Whether a tensor is a position table of the target's width and another length."""
    if value.shape == target.shape or value.numel() == 0 or value.shape[-1:] != target.shape[-1:]:
        return False
    if name.rpartition(".")[2] == "pos_embed":
        return value.ndim == target.ndim == 4 and value.shape[0] == 1
    return name.endswith((".rel_pos_h", ".rel_pos_w")) and value.ndim == target.ndim == 2


def take_lengths(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: a module's position tables get the lengths of the state's, of whatever image size.

    To be called before an optimizer or DeepSpeed has the parameters.
    """
    for name, p in module.named_parameters():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and is_other_length(name, value, p):
            p.data = p.data.new_zeros(value.shape)
            p.grad = None
