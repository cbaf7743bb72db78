"""What torch's attention kernels for CUDA allocate besides their outputs.

torch's fake implementations (torch/_meta_registrations.py) give the outputs as CUDA does: the log-sum-exp padded to 32
rows by the memory-efficient kernel, the gradient of a bias padded to 16 columns. Missing are the buffers below. xformers'
cutlass kernels are torch's: they call `_efficient_attention_forward` and `_efficient_attention_backward`.

Sources, below aten/src/ATen/native/transformers/cuda of torch 2.13: attention.cu, attention_backward.cu,
mem_eff_attention/{kernel_forward,kernel_backward}.h, mem_eff_attention/kernels/cutlassB.h, flash_attn/flash_api.cpp.

Shapes: B samples, M queries, N keys, `heads` heads; q and k are K wide, v is Kv wide.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dit_ds.planning.gpus import GpuLimits
from dit_ds.planning.memory.kernels.sizes import (
    FLOAT,
    Arguments,
    Sizes,
    ceil_div,
    contiguous_copy,
    largest,
    round_up,
)

_TRANSPOSED = (0, 2, 1, 3)  # (B, heads, M, K), as SDPA's operators take it, to (B, M, heads, K), as kernels do


# ---- memory-efficient


def efficient_forward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """The output in fp32, for 16-bit types and heads wider than 128; narrower ones are summed in registers.

    kernel_forward.h: kNeedsOutputAccumulatorBuffer; the kernel for any width holds 128 columns at once.
    """
    q, v = a["query"], a["value"]
    if q.element_size() != 2 or max(q.shape[-1], v.shape[-1]) <= 128:
        return ()
    return (FLOAT * math.prod(q.shape[:-1]) * v.shape[-1],)


class _Block(NamedTuple):
    """How many queries and keys a thread block of the backward kernel holds, and whether the gradients of k and v stay in
    registers until they are complete (kOutputInRF)."""

    queries: int
    keys: int
    in_registers: bool


def _block(width: int, half: bool, dropout: bool, gpu: GpuLimits) -> _Block:
    """The first kernel in cutlassB.h's list for this width (the larger of K and Kv) whose shared memory the GPU has.

    Blocks of 128 x 128, and of 128 x 64 in fp32, take 105 to 145 KiB: compute capability 8.0, 8.7, 9 to 11 have 163 and
    more, others at most 99. All else fits everywhere. `half`: a 16-bit type.
    """
    cc = gpu.architecture
    roomy = cc in (80, 87) or 90 <= cc < 120
    if width <= 64:
        return _Block(64, 64, in_registers=half)
    if not half:
        return _Block(128 if roomy else 64, 64, in_registers=False)
    if cc < 70:
        return _Block(64, 64, in_registers=False)
    if cc < 80 or width > 128:
        return _Block(128, 64, in_registers=width <= 128)
    if width <= 96 and cc in (86, 89) and not dropout:
        return _Block(128, 64, in_registers=True)
    return _Block(128, 128, in_registers=True) if roomy else _Block(64, 64, in_registers=False)


def _workspace(block: _Block, lengths: tuple[int, int, int], a: Arguments, gpu: GpuLimits) -> int:
    """Bytes of kernel_backward.h's workspace: partial gradients of q, and where they leave the registers of k and v.

    Args:
        lengths: samples times heads, M, N.
    """
    maps, m, n = lengths
    q, v = a["query"], a["value"]
    partial_kv = q.element_size() == 2 and not block.in_registers  # kNeedsAccumGradK: fp32 is summed in the gradient
    splits, wanted = ceil_div(n, block.keys), a.get("num_splits_key")
    if wanted is not None:
        splits = min(splits, wanted)
    else:
        if maps >= 256 and n <= 2 * block.keys:
            splits = 1
        if partial_kv:
            splits = min(splits, 200 // maps)
    splits = max(1, splits if gpu.architecture >= 70 else 1)
    floats = 0
    if partial_kv:
        floats += splits * block.keys * sum(round_up(x.shape[-1], block.queries) for x in (q, v))
    if gpu.architecture >= 70 or q.element_size() == 2:  # tiles with a lock, a counter and padding to 16 bytes
        tiles = ceil_div(m, block.queries) * ceil_div(q.shape[-1], block.keys)
        floats += tiles * (4 + block.queries * block.keys)
    return FLOAT * maps * round_up(floats, 4)


def _efficient_backward(a: Arguments, lengths: tuple[int, int, int], copy: Sizes, gpu: GpuLimits) -> Sizes:
    """The output gradient's copy, delta = (output * its gradient).sum(-1) in fp32, and the workspace."""
    q, v = a["query"], a["value"]
    half, rows = q.element_size() == 2, math.prod(q.shape[:-1])  # B * M * heads
    if q.element_size() > 4 or not rows:
        return ()  # torch refuses fp64
    block = _block(max(q.shape[-1], v.shape[-1]), half, a["dropout_p"] > 0, gpu)
    delta, workspace = FLOAT * rows, _workspace(block, lengths, a, gpu)
    if half and (block.in_registers or not 70 <= gpu.architecture < 75):
        return (*copy, delta, workspace)
    # the kernel does not compute delta: the product in fp32, its sum and the sum transposed, before the workspace
    product = FLOAT * rows * v.shape[-1]
    casts = (product, product) if half else ()
    return (*copy, *largest((*casts, product, delta, delta), (delta, workspace)))


def efficient_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Of `_scaled_dot_product_efficient_attention_backward`: arguments are (B, heads, M or N, K or Kv)."""
    b, heads, m, _ = a["query"].shape
    copy = contiguous_copy(a["grad_out_"], _TRANSPOSED)
    return _efficient_backward(a, (b * heads, m, a["key"].shape[2]), copy, gpu)


def efficient_backward_by_rows(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Of `_efficient_attention_backward`: arguments are (B, M or N, heads, K or Kv), or B sequences one after another."""
    b, m, heads, _ = a["query"].shape
    n = a["key"].shape[1]
    if a["cu_seqlens_q"] is not None:
        b, m, n = a["cu_seqlens_q"].shape[0] - 1, a["max_seqlen_q"], a["max_seqlen_k"]
    return _efficient_backward(a, (b * heads, m, n), contiguous_copy(a["grad_out_"]), gpu)


# ---- flash


def _flash_width(width: int) -> int:
    return round_up(width, 32 if width <= 128 else 64)


def _splits(tiles: int, slots: int, blocks: int) -> int:
    """Into how many parts the keys are divided, so that `tiles` of queries fill a GPU's `slots` (num_splits_heuristic).

    The smallest division whose last wave of thread blocks is nearly as full as that of the best.
    """
    if tiles >= 0.8 * slots:
        return 1
    filled = {}
    for n in range(1, min(128, slots, blocks) + 1):
        if n == 1 or ceil_div(blocks, n) != ceil_div(blocks, n - 1):
            waves = tiles * n / slots
            filled[n] = waves / math.ceil(waves)
    return next(n for n, share in filled.items() if share >= 0.85 * max(filled.values()))


def flash_forward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Log-sum-exp and output of each part of the keys, in fp32, where there are too few queries to fill the GPU."""
    b, heads, m, width = a["query"].shape
    n = a["key"].shape[2]
    if a["dropout_p"] > 0 or not b * m * n:
        return ()
    keys = 256 if width <= 64 else 128 if width <= 128 else 64
    # two thread blocks a multiprocessor, each with 64 queries
    splits = _splits(b * heads * ceil_div(m, 64), 2 * gpu.multiprocessors, ceil_div(n, keys))
    if splits == 1:
        return ()
    rows = FLOAT * splits * b * heads * m
    return (rows, rows * _flash_width(width))


def flash_backward(a: Arguments, out: Any, gpu: GpuLimits) -> Sizes:
    """Copies of the output and its gradient, delta and q's gradient in fp32; k's and v's for each head that shares them."""
    q, k = a["query"], a["key"]
    b, heads, m, width = q.shape
    copies = (*contiguous_copy(a["grad_out"], _TRANSPOSED), *contiguous_copy(a["out"], _TRANSPOSED))
    rows = FLOAT * b * heads * round_up(m, 128)
    shared = q.element_size() * b * k.shape[2] * heads * width
    return (*copies, rows, rows * _flash_width(width), *(() if k.shape[1] == heads else (shared, shared)))
