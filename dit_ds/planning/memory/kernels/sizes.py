"""Sizes of what a CUDA operator allocates for itself: what the rules of `workspaces` and `attention_workspaces` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Arguments = dict[str, Any]  # an operator's, by the names of its schema, with defaults
Sizes = tuple[int, ...]  # bytes of allocations that are alive at once, in the order in which they are made

FLOAT, LONG = 4, 8  # bytes


def ceil_div(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def round_up(n: int, to: int) -> int:
    """The least multiple of `to` that is not below n."""
    return ceil_div(n, to) * to


def nbytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, were it contiguous."""
    return math.prod(x.shape) * x.element_size()


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie one after another, the last dimension fastest."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1:
            if stride != expected:
                return math.prod(shape) == 0
            expected *= size
    return True


def contiguous_copy(x: Tensor | None, order: Sizes | None = None) -> Sizes:
    """What `x.contiguous()` allocates, after a permutation of its dimensions by `order`; nothing if it is contiguous."""
    if x is None:
        return ()
    shape, strides = tuple(x.shape), x.stride()
    if order is not None:
        shape, strides = tuple(shape[i] for i in order), tuple(strides[i] for i in order)
    return () if is_dense(shape, strides) else (nbytes(x),)


def largest(*moments: Sizes) -> Sizes:
    """Of an operator's moments, each the allocations alive then, the one that takes most."""
    return max(moments, key=sum)
