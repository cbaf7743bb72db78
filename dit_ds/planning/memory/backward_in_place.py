"""What autograd does in place on a GPU, and out of place where a dispatch mode watches it.

Under a `TorchDispatchMode` autograd takes every tensor for one of a subclass, whose operators in place may be missing: it
then adds the gradients of a tensor that is used several times to a new tensor each, and so it scatters into zeros. These
functions say when it would not have done so.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
import torch.autograd.graph
from torch import Tensor

_aten = torch.ops.aten
ZEROS = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)
# What the backward formulas of indexing do to zeros that they have just made
_INTO_ZEROS = {
    _aten.index_add.default: _aten.index_add_.default,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
    _aten.scatter_add.default: _aten.scatter_add_.default,
}
# How often an operator's argument is in use within `__torch_dispatch__` if only autograd holds it: the tensor, its storage,
# and, beside an object in a tuple that nobody else has, the tensor's Python object
_USES, _STORAGE_USES, _OBJECT_USES = 4, 2, 1
# Modules whose frames lie between `__torch_dispatch__` and what called the operator
_BETWEEN = ("torch._compile", "torch._dynamo.eval_frame", "dit_ds.planning.memory")


def in_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


def in_place(func: Any, args: tuple, kwargs: dict[str, Any], zeros: int) -> tuple[Any, tuple] | None:
    """The operator in place, and its arguments, that autograd would have called on a GPU instead of this one.

    To be called by `__torch_dispatch__` with its own arguments, within a backward pass.

    Args:
        zeros: the address of the storage that was allocated last, if it was by one of ZEROS.
    Returns:
        None if it would have called the same operator, or if it isn't autograd that calls it.
    """
    if func is _aten.add.Tensor and not kwargs and not torch.is_grad_enabled() and _summands(*args):
        if _dense(args[0]) and _autograd_alone_holds(args) and _called_by_autograd():  # the sum so far is the first
            return _aten.add_.Tensor, args
    elif func in _INTO_ZEROS and not kwargs and zeros and args[0].untyped_storage()._cdata == zeros:
        if _references(args) <= _NOT_IN_PYTHON and _called_by_autograd():
            return _INTO_ZEROS[func], args
    return None


def _summands(x: Any, y: Any) -> bool:
    """Whether they may be gradients of one tensor: two of the same shape and kind."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    kinds = {(z.shape, z.dtype, z.device, z.layout) for z in (x, y)}
    return len(kinds) == 1 and x.layout == torch.strided


def _dense(x: Tensor) -> bool:
    """Whether its elements lie in memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _autograd_alone_holds(args: tuple) -> bool:
    """Whether nobody else holds the first argument."""
    storage_uses = torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)
    return _references(args) <= _NOT_IN_PYTHON and args[0]._use_count() <= _USES and storage_uses <= _STORAGE_USES


def _references(args: tuple) -> int:
    """References to the first argument's Python object, counted in the same way wherever they are counted."""
    return sys.getrefcount(args[0])


_NOT_IN_PYTHON = _references((object(),)) + _OBJECT_USES


def _called_by_autograd() -> bool:
    """Whether no code in Python lies between the backward pass and the operator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    return frame is None or frame.f_globals.get("__name__") == torch.autograd.graph.__name__
