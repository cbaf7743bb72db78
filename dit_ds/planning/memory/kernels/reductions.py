"""What CUDA's reductions allocate while they run: scratch that no fake tensor shows, since it never is a tensor's.

Sums, means, norms, maxima and their like share one kernel (ATen/native/cuda/Reduce.cuh). Where a few outputs have many
inputs each, it lets several blocks work on one output and keeps what each of them found in global memory, with a
counter (semaphore) for each group of outputs. Some operators run such a sum within themselves, as the backward passes
of convolutions and of layer norm do for biases and weights. Softmax, scans, sorting and the forward passes of
normalizations have kernels of their own. The rules are those of PyTorch 2.13 on NVIDIA GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dit_ds.planning.gpus import GpuLimits

_MOST_INDEX = 2**31 - 1  # bytes and elements that a kernel addresses; larger tensors are reduced piece by piece
_SHORT = (torch.float16, torch.bfloat16)


def scratch(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, gpu: GpuLimits
) -> tuple[int, ...]:
    """What an operator allocates on CUDA beside its outputs, and frees before it returns.

    Only shapes, strides, storage offsets and types of the tensors are read, so they may be fake. Whether they lie on
    the GPU is for the caller to know.

    Args:
        func: the operator, with its arguments as a dispatch mode gets them.
        out: what it returned.
    Returns:
        Bytes of each allocation, not rounded, in the order in which they are made and after the outputs': a copy of the
        input in another type, an accumulation buffer, the blocks' partial results, the semaphores. All of them are held
        at once. A tensor beyond 2 GiB is reduced in pieces, one after the other; of these the largest is given. Empty
        for an operator that is no reduction, and where one block is enough for an output.
    """
    operator = _OPERATORS.get(func)
    return () if operator is None else operator(_Call(func, args, kwargs, out, gpu))


def knows(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is a reduction, or has one within."""
    return func in _OPERATORS


@dataclass(frozen=True)
class _Call:
    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    gpu: GpuLimits

    def argument(self, name: str) -> Any:
        """An argument by its name in the operator's schema; None if it has none, or it was not given."""
        at = _positions(self.func).get(name)
        if at is not None and at < len(self.args):
            return self.args[at]
        return self.kwargs.get(name)

    @property
    def results(self) -> tuple[Tensor | None, ...]:
        return (self.out,) if isinstance(self.out, Tensor) else tuple(self.out)


@cache
def _positions(func: torch._ops.OpOverload) -> dict[str, int]:
    return {a.name: i for i, a in enumerate(func._schema.arguments)}


# --- the loops that the kernel runs


@dataclass(frozen=True)
class _Dim:
    """A dimension: its size, and the bytes from one index to the next in each output and, last, in the input."""

    size: int
    steps: tuple[int, ...]

    @property
    def reduced(self) -> bool:
        return self.steps[0] == 0


def _ordered(dims: list[_Dim]) -> list[_Dim]:
    """Dimensions as TensorIterator sorts them: reduced ones first, of each kind those with small steps first.

    The comparison leaves some pairs undecided, so the result depends on the sort: by insertion, from the last dimension
    of the tensor to the first.
    """
    found = dims[::-1]
    for last in range(1, len(found)):
        at = last
        for i in reversed(range(last)):
            order = _compare(found[i], found[at])
            if order < 0:
                break
            if order > 0:  # past pairs that are undecided: what lies between the two stays where it is
                found[i], found[at], at = found[at], found[i], i
    return found


def _compare(a: _Dim, b: _Dim) -> int:
    """1 if `a` belongs behind `b`, -1 if before, 0 if undecided."""
    for operand, (step_a, step_b) in enumerate(zip(a.steps, b.steps)):
        is_output = operand < len(a.steps) - 1
        if is_output and (step_a == 0) != (step_b == 0):
            return 1 if step_b == 0 else -1
        if step_a and step_b:  # one that is broadcast decides nothing
            if step_a != step_b:
                return 1 if step_a > step_b else -1
            if a.size > b.size:
                return 1
    return 0


def _merged(dims: list[_Dim]) -> list[_Dim]:
    """Neighbours joined wherever all operands run through both as through one."""
    found: list[_Dim] = []
    for dim in dims:
        last = found[-1] if found else None
        if last is None:
            found.append(dim)
        elif last.size == 1:
            found[-1] = dim
        elif dim.size == 1 or all(last.size * a == b for a, b in zip(last.steps, dim.steps)):
            found[-1] = _Dim(last.size * dim.size, last.steps)
        else:
            found.append(dim)
    return found


def _pieces(dims: list[_Dim], start: int) -> Iterator[tuple[list[_Dim], int]]:
    """The loops that are small enough for 32-bit indices, each with the input's first byte."""
    todo = [(dims, start)]
    while todo:
        dims, start = todo.pop()
        if _fits(dims):
            yield dims, start
            continue
        at = max(range(len(dims)), key=lambda i: ((dims[i].size - 1) * max(dims[i].steps), i))
        dim, lower = dims[at], dims[at].size // 2
        for size, first in ((dim.size - lower, start + lower * dim.steps[-1]), (lower, start)):
            todo.append(([*dims[:at], _Dim(size, dim.steps), *dims[at + 1 :]], first))


def _fits(dims: list[_Dim]) -> bool:
    extents = (
        1 + sum((dim.size - 1) * step for dim, step in zip(dims, steps)) for steps in zip(*(d.steps for d in dims))
    )
    return math.prod(dim.size for dim in dims) <= _MOST_INDEX and all(extent <= _MOST_INDEX for extent in extents)


# --- how many blocks


@dataclass(frozen=True)
class _Kernel:
    """Bytes of an accumulator and of an input's element, and the most threads of a block."""

    accumulator: int
    element: int
    threads: int


def _partials(dims: list[_Dim], start: int, kernel: _Kernel, gpu: GpuLimits) -> tuple[int, ...]:
    """Bytes of the blocks' partial results and of the semaphores; empty if one block is enough for an output.

    Where the reduced dimension is the fast one, the kernel may load several inputs at once. That narrows a block only
    if its threads have fewer than 16 values each, far below the 256 from which on several blocks share an output: so it
    does not matter here.
    """
    if not dims:
        return ()
    outputs = math.prod(dim.size for dim in dims if not dim.reduced)
    inputs = math.prod(dim.size for dim in dims if dim.reduced)
    reduced = sum(dim.reduced for dim in dims)
    along = reduced == len(dims) or dims[0].steps[-1] < dims[reduced].steps[-1]
    vector = 1  # outputs of a thread, beside each other
    if along:
        width, height = _block(inputs, outputs, kernel.threads, gpu.warp_size)
    else:
        if dims[reduced].steps[-1] == kernel.element:
            vector = _output_vector(dims, reduced, start, kernel.element)
        width, height = _block(outputs // vector, inputs, kernel.threads // vector, gpu.warp_size)
    values = -(-inputs // (height * width if along else height))  # of each thread, if a block had an output for itself
    columns = -(-(outputs // vector) // (1 if along else width))  # blocks side by side
    target = gpu.multiprocessors * (gpu.threads_per_multiprocessor // (width * height))
    if values < 256 or columns > target:
        return ()
    blocks = max(min(-(-target // columns), -(-values // 16)), -(-values // 256))  # for each output
    if blocks == 1:
        return ()
    return kernel.accumulator * outputs * blocks * (1 if along else width * vector), 4 * columns


def _block(fast: int, slow: int, most: int, warp: int) -> tuple[int, int]:
    """Width and height of a block of at most `most` threads, for so many values along the fast dimension and across."""
    fast, slow = (1 << (min(n, most).bit_length() - 1) for n in (fast, slow))  # the powers of two below
    height = min(slow, most // min(fast, warp))
    return min(fast, most // height), height


def _output_vector(dims: list[_Dim], at: int, start: int, element: int) -> int:
    """How many neighbouring outputs (dimension `at`) a thread computes: what all loads are aligned to, at most 4."""
    steps = (dim.steps[-1] // element for i, dim in enumerate(dims) if i != at)
    return math.gcd(4, start // element, dims[at].size, *steps)


# --- operators


@dataclass(frozen=True)
class _Rule:
    """How an operator uses the kernel.

    Attributes:
        accumulator: bytes of an accumulator, from the type that is read and the result's.
        buffer: whether an input in pieces needs a buffer of accumulators, where these are larger than a result.
        cast: whether the input is copied if it has another type than the result.
        whole: whether without dimensions the input is first made contiguous.
    """

    accumulator: Callable[[torch.dtype, torch.dtype], int]
    buffer: bool = False
    cast: bool = False
    whole: bool = False


def _reduction(rule: _Rule, call: _Call) -> tuple[int, ...]:
    x, wanted = call.args[0], call.argument("dim")
    results = tuple(_Layout.of(r) for r in call.results if r is not None)
    if wanted is None and rule.whole and not x.is_contiguous():
        return x.numel() * x.itemsize, *_reduced(rule, _Layout.of(x, whole=True), results, None, call.gpu)
    return _reduced(rule, _Layout.of(x), results, [wanted] if isinstance(wanted, int) else wanted, call.gpu)


@dataclass(frozen=True)
class _Layout:
    """Of a tensor: strides in elements, its first byte counted from an aligned address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, whole: bool = False) -> _Layout:
        """Of a tensor, or of a contiguous copy."""
        if whole:
            return cls(tuple(x.shape), _contiguous(tuple(x.shape)), 0, x.dtype)
        return cls(tuple(x.shape), x.stride(), int(x.storage_offset()) * x.itemsize, x.dtype)

    def cast(self, dtype: torch.dtype) -> _Layout:
        """Of a copy in another type: the same strides if these leave no gaps, else contiguous."""
        inner_first = sorted(range(len(self.shape)), key=lambda i: (self.strides[i], -i))
        sizes = [self.shape[i] for i in inner_first]
        dense = all(
            size == 1 or self.strides[i] == math.prod(sizes[:n]) for n, (i, size) in enumerate(zip(inner_first, sizes))
        )
        return _Layout(self.shape, self.strides if dense else _contiguous(self.shape), 0, dtype)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _reduced(
    rule: _Rule, x: _Layout, results: tuple[_Layout, ...], wanted: list[int] | None, gpu: GpuLimits
) -> tuple[int, ...]:
    """Bytes of what a reduction of the dimensions `wanted` (none or all: every one) allocates."""
    if 0 in x.shape:
        return ()
    made: tuple[int, ...] = ()
    result = results[0].dtype
    # from 16 bits to 32 the kernel casts as it reads
    if rule.cast and x.dtype != result and not (x.dtype in _SHORT and result == torch.float32):
        x = x.cast(result)
        made = (math.prod(x.shape) * result.itemsize,)
    steps = [*(_output_steps(x.shape, r, wanted) for r in results), [n * x.dtype.itemsize for n in x.strides]]
    dims = _merged(_ordered([_Dim(size, of) for size, of in zip(x.shape, zip(*steps))]))
    kernel = _Kernel(rule.accumulator(x.dtype, result), x.dtype.itemsize, 256 if x.dtype == torch.complex128 else 512)
    if rule.buffer and kernel.accumulator > result.itemsize and not _fits(dims):
        elements = max(1, *(dim.size * dim.steps[0] // result.itemsize for dim in dims))
        made = (*made, elements * kernel.accumulator)
    return *made, *max((_partials(of, start, kernel, gpu) for of, start in _pieces(dims, x.start)), key=sum)


def _output_steps(shape: tuple[int, ...], result: _Layout, wanted: list[int] | None) -> list[int]:
    """Bytes from one index to the next of a result, in each of the input's dimensions: 0 in those that are reduced."""
    strides = [n * result.dtype.itemsize for n in result.strides]
    if len(strides) == len(shape):
        return [0 if now == 1 != before else n for now, before, n in zip(result.shape, shape, strides)]
    masked = {d % len(shape) for d in wanted or range(len(shape))}
    left = iter(strides)
    return [0 if i in masked else next(left) for i in range(len(shape))]


def _bias_gradient(call: _Call) -> tuple[int, ...]:
    """A convolution's backward pass sums the output's gradient for the bias, over all dimensions but the channels'."""
    gradient, (_, _, bias) = call.args[0], call.results
    if bias is None:
        return ()
    summed = [i for i in range(gradient.dim()) if i != 1]
    return _reduced(_SUM, _Layout.of(gradient), (_Layout.of(bias),), summed, call.gpu)


def _norm_gradients(call: _Call) -> tuple[int, ...]:
    """Layer norm's backward pass, where rows are many: partial sums of the weight's and the bias' gradients, summed up.

    The first gradient's sum runs while both hold their partial sums.
    """
    rows_of_warp, most_blocks, many_rows = 32, 2**15, 2**16
    gradients = [g for g in call.results[1:] if g is not None]
    columns = math.prod(call.argument("normalized_shape"))
    rows = call.args[0].numel() // max(1, columns)
    wide = -(-columns // call.gpu.warp_size)
    if not gradients or rows <= many_rows or columns // call.gpu.warp_size >= call.gpu.multiprocessors // 2:
        return ()
    blocks = min(most_blocks // wide, -(-rows // rows_of_warp))
    dtype = gradients[0].dtype
    partial_sums = _Layout((blocks, columns), (columns, 1), 0, dtype)
    of_sum = _reduced(_SUM, partial_sums, (_Layout((columns,), (1,), 0, dtype),), [0], call.gpu)
    size = columns * dtype.itemsize
    return *[blocks * size] * len(gradients), size, *of_sum


def _wide(read: torch.dtype, result: torch.dtype) -> int:
    """Sums of 16-bit numbers are kept in 32 bits."""
    return 4 if result in _SHORT else result.itemsize


def _plain(read: torch.dtype, result: torch.dtype) -> int:
    return read.itemsize


def _with_index(read: torch.dtype, result: torch.dtype) -> int:
    """A value and a 64-bit index, aligned to 8 bytes."""
    return 16


def _two(read: torch.dtype, result: torch.dtype) -> int:
    return 2 * read.itemsize


def _moments(read: torch.dtype, result: torch.dtype) -> int:
    """Welford's: mean, sum of squares, and the count as a 32-bit integer and in the accumulators' type."""
    return 32 if read == torch.float64 else 16


_SUM = _Rule(_wide, buffer=True, cast=True)
_NAMES: dict[_Rule, tuple[str, ...]] = {
    _SUM: (
        "sum.default", "sum.dim_IntList", "sum.IntList_out", "sum.out", "mean.default", "mean.dim", "mean.out",
        "nansum.default", "nansum.out", "norm.Scalar", "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim",
        "norm.ScalarOpt_dim_dtype", "norm.out", "norm.dtype_out", "linalg_vector_norm.default", "linalg_vector_norm.out",
    ),
    _Rule(_wide, cast=True): ("prod.default", "prod.dim_int", "prod.int_out", "prod.out"),
    _Rule(_plain): (
        "amax.default", "amax.out", "amin.default", "amin.out", "any.default", "any.dim", "any.dims", "any.out",
        "any.dims_out", "any.all_out", "all.default", "all.dim", "all.dims", "all.out", "all.dims_out", "all.all_out",
    ),
    _Rule(_plain, whole=True): ("max.default", "max.unary_out", "min.default", "min.unary_out"),
    _Rule(_with_index, buffer=True): ("max.dim", "max.dim_max", "min.dim", "min.dim_min"),
    _Rule(_with_index, buffer=True, whole=True): ("argmax.default", "argmax.out", "argmin.default", "argmin.out"),
    _Rule(_two, buffer=True, whole=True): ("aminmax.default", "aminmax.out"),
    _Rule(_moments, buffer=True, cast=True): (
        "std.default", "std.dim", "std.correction", "std.out", "std.correction_out", "var.default", "var.dim",
        "var.correction", "var.out", "var.correction_out", "std_mean.default", "std_mean.dim", "std_mean.correction",
        "var_mean.default", "var_mean.dim", "var_mean.correction",
    ),
}  # fmt: skip


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


_OPERATORS: dict[torch._ops.OpOverload, Callable[[_Call], tuple[int, ...]]] = {
    **{_overload(name): partial(_reduction, rule) for rule, names in _NAMES.items() for name in names},
    torch.ops.aten.convolution_backward.default: _bias_gradient,
    torch.ops.aten.native_layer_norm_backward.default: _norm_gradients,
}
