"""Memory that CUDA operators take from PyTorch's caching allocator besides their outputs, by the shapes they work on.

A fake tensor's operator allocates its outputs only. On a GPU there are, too:

    cuBLAS' workspace: one for each thread (forward, backward) and stream, from its first matrix product on, never freed
    scratch: accumulators, sort buffers, copies of arguments, freed before the operator returns
    cuDNN's workspaces, which depend on the algorithm that it chooses: an assumption, see `assumed_cudnn_workspace`

The rules are those of torch 2.13's sources; files named here lie below aten/src/ATen. Not here: what reductions take
(native/cuda/Reduce.cuh), attention by cuDNN, and scratch that stays below a mebibyte in this project's models.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_ds.planning.gpus import GpuLimits
from dit_ds.planning.memory.kernels.attention_workspaces import (
    efficient_backward,
    efficient_backward_by_rows,
    efficient_forward,
    flash_backward,
    flash_forward,
)
from dit_ds.planning.memory.kernels.sizes import (
    FLOAT,
    LONG,
    Arguments,
    Sizes,
    ceil_div,
    contiguous_copy,
    is_dense,
    nbytes,
)

_aten = torch.ops.aten
_KIB, _MIB = 1 << 10, 1 << 20


# ---- cuBLAS


def cublas_workspace(capability: tuple[int, int], environ: Mapping[str, str]) -> int:
    """Bytes of the workspace that each thread's cuBLAS handle has on each stream (cuda/CublasHandlePool.cpp).

    CUBLAS_WORKSPACE_CONFIG lists pools as :KiB:count. Other text in it is skipped, and where there is no pool the default
    holds: torch warns and goes on. cuBLASLt's products (those with a bias) use the same workspace, see
    `cublaslt_workspace`.

    Args:
        capability: the GPU's compute capability.
        environ: the environment's variables.
    """
    pools = re.findall(r":([0-9]+):([0-9]+)", environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pools:
        return sum(_KIB * int(size) * int(count) for size, count in pools)
    return 32 * _MIB if capability[0] in (9, 10, 12) else 2 * 4096 * _KIB + 8 * 16 * _KIB


def cublaslt_workspace(environ: Mapping[str, str]) -> int:
    """Bytes of a workspace that each handle has on each stream for cuBLASLt alone: 0 by default, since it is cuBLAS' own.

    TORCH_CUBLASLT_UNIFIED_WORKSPACE=0 separates them; then CUBLASLT_WORKSPACE_SIZE is its KiB, 1024 where that does not
    begin with a number. It is allocated with the first `addmm` whose bias is a vector.
    """
    if environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") != "0":
        return 0
    number = re.match(r"\s*\+?([0-9]+)", environ.get("CUBLASLT_WORKSPACE_SIZE", ""))
    return _KIB * (int(number[1]) if number else 1024)


_PRODUCTS = frozenset(
    getattr(packet, overload)
    for packet in (
        _aten.mm, _aten.bmm, _aten.addmm, _aten.addmm_, _aten.baddbmm, _aten.baddbmm_, _aten.addbmm, _aten.addbmm_,
        _aten.mv, _aten.addmv, _aten.addmv_, _aten.dot, _aten.vdot, _aten._addmm_activation, _aten._scaled_mm,
        _aten.linear, _aten.matmul, _aten.einsum, _aten.bilinear, _aten._trilinear, _aten.tensordot,
    )
    for overload in packet.overloads()
)  # fmt: skip


def uses_cublas(func: torch._ops.OpOverload) -> bool:
    """Whether an operator takes a cuBLAS handle, and with it the workspace.

    Below autograd these are mm, bmm, addmm, baddbmm and the like; in inference mode also linear, matmul and einsum, which
    arrive whole.
    """
    return func in _PRODUCTS


def _product(*names: str) -> Callable[[Arguments, Any, GpuLimits], Sizes]:
    """Copies of the arguments of a matrix product that cuBLAS can't read (native/cuda/Blas.cpp, cuBlasCommonArgs.h)."""

    def rule(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
        return tuple(nbytes(a[x]) for x in names if not _is_blas_matrix(a[x]))

    return rule


def _is_blas_matrix(x: Tensor) -> bool:
    """Whether rows or columns are contiguous, and do not overlap."""
    (rows, columns), (down, right) = x.shape[-2:], x.stride()[-2:]
    if x.dim() == 2 and (is_dense(x.shape, x.stride()) or is_dense((columns, rows), (right, down))):
        return True
    if (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)):
        return True
    return x.dim() == 3 and is_dense(x.shape, x.stride()) and down != 0 and right != 0


# ---- normalisation and softmax


def _layer_norm(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    return contiguous_copy(a["input"])


def _layer_norm_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Copies, and for many short rows partial sums of the gradients of weight and bias (native/cuda/layer_norm_kernel.cu).

    A block of threads sums 32 rows and more of 32 columns; there are at most 32768 blocks.
    """
    x, weight, bias = a["input"], a["weight"], a["bias"]
    copies = (*contiguous_copy(x), *contiguous_copy(a["grad_out"]))
    columns = math.prod(a["normalized_shape"])
    rows = math.prod(x.shape) // columns if columns else 0
    if rows <= 1 << 16 or columns // 32 >= gpu.multiprocessors // 2:
        return copies
    parts = min(32768 // ceil_div(columns, 32), ceil_div(rows, 32))
    needed = (y for y, need in zip((weight, bias), a["output_mask"][1:]) if need and y is not None)
    return (*copies, *(parts * columns * y.element_size() for y in needed))


def _softmax(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """A copy of what is not contiguous (native/cuda/SoftMax.cu)."""
    return contiguous_copy(a["self"])


def _log_softmax_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    return (*contiguous_copy(a["grad_output"]), *contiguous_copy(a["output"]))


def _softmax_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """The output times its gradient, as large as the map, and copies (native/cuda/SoftMax.cu).

    The product has the gradient's order of dimensions: if that is not the usual one, it is copied.
    """
    grad, output = a["grad_output"], a["output"]
    product = math.prod(output.shape) * max(grad.element_size(), output.element_size())
    strides = [stride for size, stride in zip(grad.shape, grad.stride()) if size > 1 and stride]
    usual = all(x >= y for x, y in itertools.pairwise(strides))
    return (product, *(() if usual else (product,)), *contiguous_copy(output))


# ---- indices


def _embedding_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Sorted indices and partial sums of rows, in fp32 (native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu).

    Up to 3072 indices are added up without.
    """
    grad, indices, weights = a["grad_output"], a["indices"], a["num_weights"]
    copies = (*contiguous_copy(indices), *contiguous_copy(grad))
    n, size = math.prod(indices.shape), indices.element_size()
    if n <= 3072 and not a["scale_grad_by_freq"]:
        return copies
    segments = min(n, weights)  # runs of equal indices, at most
    parts = n // 10 + segments  # ten rows are added up at once
    offsets = (n * size, segments * size, segments * size, parts * size)
    counts = (n * size,) if a["scale_grad_by_freq"] else ()
    sums = parts * grad.shape[-1] * max(FLOAT, grad.element_size())
    return (*copies, n * size, n * size, *counts, *offsets, sums)


_SORTED_BY_ONE_BLOCK = 256 * 9  # threads, and 8-byte keys of each, of cub's DeviceRadixSort


def _index_put(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Where values are added up: positions, sorted, with their order, and the sort's buffers (native/cuda/Indexing.cu).

    cub's radix sort takes as much again as its keys and values where they are more than a thread block holds, and the
    positions have more than 8 bits; the some per cent that it takes besides are left out, and so are boolean indices,
    whose number is not known.
    """
    x, values, indices = a["self"], a["values"], a["indices"]
    given = {dim: i for dim, i in enumerate(indices) if i is not None}
    if not a["accumulate"] or not given or any(i.dtype in (torch.bool, torch.uint8) for i in given.values()):
        return ()
    n = math.prod(torch.broadcast_shapes(*(i.shape for i in given.values())))
    elements = n * math.prod(size for dim, size in enumerate(x.shape) if dim not in given)
    as_they_are = math.prod(values.shape) == elements and is_dense(values.shape, values.stride())
    copy = () if as_they_are else (elements * values.element_size(),)
    buffers = (2 * n * LONG,) if n > _SORTED_BY_ONE_BLOCK and math.prod(x.shape[: max(given) + 1]) > 1 << 8 else ()
    return (*contiguous_copy(x), n * LONG, *copy, *[n * LONG] * 3, *buffers)


# ---- images and losses


def _roll(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """One dimension is rolled after the other (native/cuda/TensorTransformations.cu)."""
    x = a["self"]
    before = max(len(a["dims"]) - 1, len(contiguous_copy(x)))
    return (nbytes(x),) * before


def _bilinear_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """The gradient's copy unless it is contiguous, channels first or last (native/cuda/UpSampleBilinear2d.cu)."""
    grad = a["grad_output"]
    channels_last = not contiguous_copy(grad, (0, 2, 3, 1))
    return () if channels_last or list(grad.shape) == list(a["input_size"]) else contiguous_copy(grad)


def _bce(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """log(sigmoid(x)), and the loss of each element before it is reduced (native/Loss.cpp)."""
    size = nbytes(a["self"])
    return (size,) if a["reduction"] == 0 else (size, size)


# ---- all of them


_CONVOLUTIONS = frozenset((_aten.convolution.default, _aten.convolution_backward.default))
_RULES: dict[torch._ops.OpOverload, Callable[[Arguments, Any, GpuLimits], Sizes]] = {
    _aten._scaled_dot_product_efficient_attention.default: efficient_forward,
    _aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    _aten._efficient_attention_forward.default: efficient_forward,
    _aten._efficient_attention_backward.default: efficient_backward_by_rows,
    _aten._scaled_dot_product_flash_attention.default: flash_forward,
    _aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    _aten.mm.default: _product("self", "mat2"),
    _aten.addmm.default: _product("mat1", "mat2"),
    _aten.addmm_.default: _product("self", "mat1", "mat2"),
    _aten.bmm.default: _product("self", "mat2"),
    _aten.baddbmm.default: _product("batch1", "batch2"),
    _aten.baddbmm_.default: _product("self", "batch1", "batch2"),
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten._softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _log_softmax_backward,
    _aten.embedding_dense_backward.default: _embedding_backward,
    _aten.index_put.default: _index_put,
    _aten.index_put_.default: _index_put,
    _aten._index_put_impl_.default: _index_put,
    _aten._unsafe_index_put.default: _index_put,
    _aten.roll.default: _roll,
    _aten.upsample_bilinear2d_backward.default: _bilinear_backward,
    _aten.binary_cross_entropy_with_logits.default: _bce,
}


def knows(func: torch._ops.OpOverload) -> bool:
    """Whether an operator may have a workspace of any kind."""
    return func in _RULES or func in _CONVOLUTIONS or uses_cublas(func)


@functools.cache
def _parameters(func: torch._ops.OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an operator's arguments, and the defaults of those that have one."""
    arguments = func._schema.arguments
    return tuple(x.name for x in arguments), {x.name: x.default_value for x in arguments if x.has_default_value()}


def workspace(
    func: torch._ops.OpOverload,
    args: tuple,
    kwargs: dict[str, Any],
    out: Any,
    gpu: GpuLimits,
) -> tuple[int, ...]:
    """Bytes of each allocation that an operator makes on CUDA besides its outputs and frees before it returns.

    Args:
        func, args, kwargs, out: an operator as a dispatch mode sees it, and what it returned. Only shapes, strides and
            dtypes of tensors are read.
        gpu: which GPU.
    Returns:
        In the order in which they are made, those that are alive at once when they take most; not rounded to the
        allocator's blocks. () for operators that have none or are not known.
    """
    rule = _RULES.get(func)
    if rule is None:
        return ()
    names, defaults = _parameters(func)
    sizes = rule({**defaults, **dict(zip(names, args)), **kwargs}, out, gpu)
    return tuple(size for size in sizes if size)


# ---- cuDNN


def assumed_cudnn_workspace(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes assumed for the workspace of a convolution, forward or backward; 0 for other operators.

    That of a conversion of all that it works on, input, weight and output, from channels first to channels last, which
    tensor cores take. cuDNN may choose an algorithm with no workspace or a larger one: an assumption, not a rule.
    """
    if func not in _CONVOLUTIONS:
        return 0
    a = {**dict(zip(_parameters(func)[0], args)), **kwargs}
    result = out if func is _aten.convolution.default else a["grad_output"]
    return nbytes(a["input"]) + nbytes(a["weight"]) + nbytes(result)
