"""The bytes of the storages that operators allocate, from allocation to release, real or fake.

Sizes are rounded as CUDA's caching allocator rounds them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_ds.models import attention
from dit_ds.planning.memory.backward_in_place import ZEROS, in_backward, in_place

# our operators, whose temporaries count: their implementation runs under the mode in their place
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.dit_ds.attention.default: attention.attention_forward,
    torch.ops.dit_ds.attention_backward.default: attention.attention_backward,
}
ROUND = 512  # bytes, as CUDA's caching allocator


class LiveTensors(TorchDispatchMode):
    """A dispatch mode that counts the bytes of the storages allocated under it and not yet freed, real or fake.

    Attributes:
        now: bytes allocated now.
        peak: the most bytes allocated at once since `peak` was last set.
        stream: on which operators run now, by its number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.stream = 0
        self._alive: dict[int, tuple[weakref.ref, Any]] = {}
        # autograd's thread still drops tensors of a backward pass while the main thread goes on
        self._lock = threading.RLock()
        self._transients: dict[Any, int] = {}
        self._zeros = 0  # address of the storage that was allocated last, if it holds new zeros

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _IMPLEMENTATIONS:
            return self._run_implementation(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.synchronize()
            return _placeholder(args[0].dtype)
        if _composite(func):  # in inference mode it arrives whole, with temporaries of its own
            with self:
                return func.decompose(*args, **kwargs)
        instead = in_place(func, args, kwargs, self._zeros) if in_backward() else None
        if instead is not None:
            func, args = instead
        out = func(*args, **kwargs)
        if not _aliases(func):
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.device.type != "meta":
                    self._add(x)
            if func in ZEROS:
                self._zeros = out.untyped_storage()._cdata
        self._operator_ran(func, args, kwargs, out)
        return out

    def _operator_ran(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Called after an operator, its outputs counted."""

    def synchronize(self) -> None:
        """Called where the host waits for the device."""

    def empty_cache(self) -> None:
        """Called where unused segments are given back."""

    def use_on(self, x: Tensor, stream: int) -> None:
        """Called where a tensor is used on a stream (`record_stream`)."""

    def _run_implementation(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run one of our operators by its implementation, so that its temporaries are counted.

        On fake tensors only at the first call with such arguments: how much it takes is remembered.
        """
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(x, FakeTensor) for x in leaves)
        key = (func, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if fake and key in self._transients:
            out = func(*args, **kwargs)
            self._add_transient(self._transients[key] - self._add_outputs(key, out))
            return out
        before, peak, self.peak = self.now, self.peak, self.now
        began = self._began()
        with self:
            out = _IMPLEMENTATIONS[func](*args, **kwargs)
        self._transients[key] = self.peak - before
        self._remember(key, began, out)
        self.peak = max(peak, self.peak)
        return out

    def _began(self) -> int:
        """Called before one of our operators runs for the first time with such arguments."""
        return 0

    def _remember(self, key: Any, began: int, out: Iterable[Tensor]) -> None:
        """Called after it."""

    def _add_outputs(self, key: Any, out: Iterable[Tensor]) -> int:
        """Count the outputs of one that ran before; return the bytes added."""
        return sum(self._add(x) for x in out)

    def _add_transient(self, size: int) -> None:
        """Count bytes that are allocated and freed at once."""
        self.peak = max(self.peak, self.now + size)

    def _add(self, x: Tensor) -> int:
        """Count a tensor's storage, unless it is counted already; return the bytes added."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return 0
        size = -(-storage.nbytes() // ROUND) * ROUND
        self._zeros = 0
        with self._lock:
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key)), self._allocated(size, x)
        return size

    def _release(self, key: int) -> None:
        with self._lock:
            self._freed(self._alive.pop(key)[1])

    def _blocks(self) -> list[Any]:
        """What `_allocated` returned for each storage that is alive."""
        return [block for _, block in list(self._alive.values())]  # a copy, as others may be freed meanwhile

    def _allocated(self, size: int, x: Tensor) -> Any:
        self.now += size
        self.peak = max(self.peak, self.now)
        return size

    def _freed(self, size: Any) -> None:
        self.now -= size


@functools.cache
def _composite(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is made of others, by which alone autograd and devices know it."""
    if func.namespace == "prim":  # which the dispatcher has no kernels for
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _aliases(func: torch._ops.OpOverload) -> bool:
    """Whether an operator returns only its arguments or views of them, and so allocates nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None for r in returns)


def _placeholder(dtype: torch.dtype) -> bool | float | int:
    """The value of `.item()` on a fake tensor: a norm of 1, no overflow, a count of 0."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0
