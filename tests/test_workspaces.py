"""What CUDA operators allocate besides their outputs: cases computed by hand from the rules of torch's sources."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_ds.planning.gpus import GpuLimits
from dit_ds.planning.memory.kernels.workspaces import (
    assumed_cudnn_workspace,
    cublas_workspace,
    cublaslt_workspace,
    uses_cublas,
    workspace,
)

aten = torch.ops.aten
MIB = 1 << 20
T4, V100, A100, RTX_3090, RTX_4090, H100, RTX_5090 = (7, 5), (7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scratch(func, *args, gpu=H100, out=None, multiprocessors=132, **kwargs) -> tuple[int, ...]:
    return workspace(func, args, kwargs, out, GpuLimits(multiprocessors, 2048, gpu))


# ---- cuBLAS


@pytest.mark.parametrize(("gpu", "size"), [
    (V100, 8519680), (T4, 8519680), (A100, 8519680), (RTX_4090, 8519680),  # 8.125 MiB
    (H100, 32 * MIB), ((10, 0), 32 * MIB), ((10, 3), 32 * MIB), (RTX_5090, 32 * MIB),
])  # fmt: skip
def test_cublas_workspace_by_compute_capability(gpu, size):
    assert cublas_workspace(gpu, {}) == size


@pytest.mark.parametrize(("text", "size"), [
    (":4096:8", 32 * MIB),
    (":16:8", 128 << 10),
    (":4096:2:16:8", 8 * MIB + (128 << 10)),  # two pools
    (":1024:0", 0),
    ("x:16:8, and :32:1 more", (128 + 32) << 10),  # what is no pool is skipped
    ("", None), ("4096:8", None), (":4096", None), (":4096:", None), (":4k:8", None), (":-1:8", None),  # torch warns
])  # fmt: skip
def test_cublas_workspace_config(text, size):
    for gpu, default in ((A100, 8519680), (H100, 32 * MIB)):
        assert cublas_workspace(gpu, {"CUBLAS_WORKSPACE_CONFIG": text}) == (default if size is None else size)


def test_cublaslt_uses_the_same_workspace_unless_told_otherwise():
    assert cublaslt_workspace({}) == cublaslt_workspace({"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "1"}) == 0
    assert cublaslt_workspace({"CUBLASLT_WORKSPACE_SIZE": "4096"}) == 0
    apart = {"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"}
    assert cublaslt_workspace(apart) == MIB
    assert cublaslt_workspace(apart | {"CUBLASLT_WORKSPACE_SIZE": "2048"}) == 2 * MIB
    assert cublaslt_workspace(apart | {"CUBLASLT_WORKSPACE_SIZE": " 16k"}) == 16 << 10  # as std::stoi reads it
    assert cublaslt_workspace(apart | {"CUBLASLT_WORKSPACE_SIZE": "much"}) == MIB


def test_matrix_products_are_known():
    names = "mm bmm addmm baddbmm mv addmv dot linear matmul einsum addmm_ baddbmm_ _addmm_activation"
    assert all(uses_cublas(getattr(aten, name).default) for name in names.split())
    assert uses_cublas(aten.mm.out)
    assert not any(
        uses_cublas(f) for f in (aten.add.Tensor, aten.convolution.default, aten.mul.Tensor, aten.view.default)
    )


def test_operands_that_cublas_cannot_read_are_copied():
    a, b = meta(64, 32), meta(32, 16)
    assert scratch(aten.mm.default, a, b) == scratch(aten.mm.default, meta(32, 64).t(), meta(16, 32).t()) == ()
    assert scratch(aten.mm.default, meta(64, 100)[:, :32], b) == ()  # rows of 32, 100 apart
    assert scratch(aten.mm.default, meta(64, 64)[:, ::2], b) == (64 * 32 * 4,)
    assert scratch(aten.addmm.default, meta(16), a, meta(32, 1).expand(32, 16)) == (32 * 16 * 4,)
    q = meta(8, 64, 3, 4, 16).unbind(2)[0].flatten(0, 1)  # rows of 16, 192 apart, heads 16 apart
    assert scratch(aten.bmm.default, q, q.transpose(1, 2)) == ()
    wide = meta(8, 64, 64)[..., ::2]
    assert scratch(aten.bmm.default, wide, meta(8, 32, 16)) == (8 * 64 * 32 * 4,)
    assert scratch(aten.baddbmm_.default, meta(8, 64, 32)[..., ::2], meta(8, 64, 32), meta(8, 32, 16)) == (
        8 * 64 * 16 * 4,
    )


# ---- memory-efficient attention: 2 samples, 16 heads, 1024 queries, 1044 keys; 32 maps, 32768 rows


def efficient(k: int, kv: int, dtype: torch.dtype, b: int = 2, m: int = 1024, n: int = 1044, heads: int = 16) -> tuple:
    """Arguments of SDPA's forward and backward operator."""
    q, key, v = (meta(b, rows, heads, width, dtype=dtype).transpose(1, 2) for rows, width in ((m, k), (n, k), (n, kv)))
    out = meta(b, m, heads, kv, dtype=dtype).transpose(1, 2)
    return q, key, v, out, meta(b, heads, -(-m // 32) * 32)


def backward(k: int, kv: int, dtype: torch.dtype, gpu=H100, dropout: float = 0.0, **sizes: int) -> tuple[int, ...]:
    q, key, v, out, lse = efficient(k, kv, dtype, **sizes)
    seed = meta(dtype=torch.long)
    given = (out, q, key, v, None, out, lse, seed, seed, dropout, [True, True, True, False], False)
    found = scratch(aten._scaled_dot_product_efficient_attention_backward.default, *given, gpu=gpu)
    # the operator that xformers calls
    q, key, v, out = (x.transpose(1, 2) for x in (q, key, v, out))
    given = (out, q, key, v, None, out, None, None, -1, -1, lse, dropout, seed, seed, 0, False)
    assert scratch(aten._efficient_attention_backward.default, *given, gpu=gpu) == found
    return found


@pytest.mark.parametrize(("k", "kv", "dtype", "expected"), [
    (64, 64, BF16, ()), (80, 80, BF16, ()), (128, 64, BF16, ()),  # up to 128 columns are summed in registers
    (144, 80, BF16, (4 * 32768 * 80,)), (136, 64, FP16, (4 * 32768 * 64,)), (64, 136, BF16, (4 * 32768 * 136,)),
    (64, 64, FP32, ()), (80, 80, FP32, ()), (144, 80, FP32, ()),  # summed in the output
])  # fmt: skip
def test_efficient_forward_sums_wide_heads_in_fp32(k, kv, dtype, expected):
    q, key, v, *_ = efficient(k, kv, dtype)
    for gpu in (V100, A100, H100):
        assert scratch(aten._scaled_dot_product_efficient_attention.default, q, key, v, None, True, gpu=gpu) == expected
    q, key, v = (x.transpose(1, 2) for x in (q, key, v))
    given = (q, key, v, None, None, None, None, None, 0.0, 0, True)
    assert scratch(aten._efficient_attention_forward.default, *given) == expected


DELTA = 4 * 32768  # fp32, one a row


@pytest.mark.parametrize(("k", "kv", "dtype", "gpu", "expected"), [
    # 64 x 64 blocks: 16 of queries, 1 of columns, each 16 bytes and 64 x 64 fp32; 32 maps
    (64, 64, BF16, H100, (DELTA, 32 * 16 * (16 + 4 * 64 * 64))),
    # as much, but delta's product (64 columns), sum and transposed sum take more: 8650752 against 131072 + 8396800
    (64, 64, FP32, H100, (4 * 32768 * 64, DELTA, DELTA)),
    # 128 x 128 blocks: 8 of queries, 1 of columns
    (80, 80, BF16, H100, (DELTA, 32 * 8 * (16 + 4 * 128 * 128))),
    # 128 x 64 blocks: 8 of queries, 2 of columns; more than the product of 80 columns, which is gone by then
    (80, 80, FP32, H100, (DELTA, 32 * 8 * 2 * (16 + 4 * 128 * 64))),
    # 128 x 64 blocks, 8 of queries, 3 of columns; keys in min(17 blocks, 200 // 32) = 6 parts of 64 rows, k's 144 columns
    # rounded up to 256, v's 80 to 128
    (144, 80, BF16, H100, (DELTA, 32 * (8 * 3 * (16 + 4 * 128 * 64) + 4 * 6 * 64 * (256 + 128)))),
    (144, 80, FP32, H100, (DELTA, 32 * 8 * 3 * (16 + 4 * 128 * 64))),  # k's and v's are summed in the gradients
    (144, 80, BF16, RTX_4090, (DELTA, 32 * (8 * 3 * (16 + 4 * 128 * 64) + 4 * 6 * 64 * (256 + 128)))),
    # less shared memory: a kernel for up to 96 columns, 128 x 64, then 64 x 64, out of registers and in 6 parts
    (80, 80, BF16, RTX_4090, (DELTA, 32 * 8 * 2 * (16 + 4 * 128 * 64))),
    (128, 128, BF16, RTX_3090, (DELTA, 32 * (16 * 2 * (16 + 4 * 64 * 64) + 4 * 6 * 64 * (128 + 128)))),
    (80, 80, BF16, RTX_5090, (DELTA, 32 * (16 * 2 * (16 + 4 * 64 * 64) + 4 * 6 * 64 * (128 + 128)))),
    (80, 80, FP32, RTX_4090, (DELTA, 32 * 16 * 2 * (16 + 4 * 64 * 64))),
    (80, 80, FP32, T4, (DELTA, 32 * 16 * 2 * (16 + 4 * 64 * 64))),
    (128, 128, FP16, T4, (DELTA, 32 * 8 * 2 * (16 + 4 * 128 * 64))),
    (128, 128, BF16, A100, (DELTA, 32 * 8 * 1 * (16 + 4 * 128 * 128))),
])  # fmt: skip
def test_efficient_backward(k, kv, dtype, gpu, expected):
    assert backward(k, kv, dtype, gpu) == expected


def test_efficient_backward_on_volta_computes_delta_outside_the_kernel():
    # gradient and output in fp32, their product: 3 x 4 x 32768 x 256 bytes = 96 MiB
    workspace_bytes = 32 * (8 * 4 * (16 + 4 * 128 * 64) + 4 * 6 * 64 * 2 * 256)  # 56.0 MiB
    wide = 4 * 32768 * 256
    assert DELTA + workspace_bytes < 3 * wide
    assert backward(256, 256, FP16, V100) == (wide, wide, wide, DELTA, DELTA)
    assert backward(256, 256, FP16, T4) == (DELTA, workspace_bytes)


def test_efficient_backward_with_dropout_has_no_kernel_for_96_columns():
    # 64 x 64 blocks, in 6 parts
    expected = 32 * (16 * 2 * (16 + 4 * 64 * 64) + 4 * 6 * 64 * (128 + 128))
    assert backward(80, 80, BF16, RTX_4090, dropout=0.1) == (DELTA, expected)
    assert backward(80, 80, BF16, H100, dropout=0.1) == backward(80, 80, BF16, H100)


def test_efficient_backward_of_many_windows():
    # Swin, 800 windows of 144 tokens, 4 heads of 32 columns: 3 blocks of queries, 3200 maps
    rows = 800 * 4 * 144
    assert backward(32, 32, FP32, b=800, heads=4, m=144, n=144) == (4 * rows, 3200 * 3 * (16 + 4 * 64 * 64))
    # more than 200 maps: keys in one part
    expected = 3200 * (2 * 3 * (16 + 4 * 128 * 64) + 4 * 64 * (256 + 256))
    assert backward(144, 144, BF16, b=800, heads=4, m=144, n=144) == (4 * rows, expected)
    assert backward(64, 64, BF16, b=0) == ()


def test_efficient_backward_copies_a_gradient_of_another_layout():
    q, key, v, out, lse = efficient(64, 64, BF16)
    seed, backward_of = meta(dtype=torch.long), aten._scaled_dot_product_efficient_attention_backward.default
    for grad in (out.contiguous(), meta(1, dtype=BF16).expand(out.shape)):
        found = scratch(backward_of, grad, q, key, v, None, out, lse, seed, seed, 0.0, [True] * 4)
        assert found == (2 * 32768 * 64, *backward(64, 64, BF16))


def test_efficient_backward_of_sequences_one_after_another():
    q, v = meta(1, 300, 4, 144, dtype=BF16), meta(1, 300, 4, 80, dtype=BF16)
    starts, seed = meta(4, dtype=torch.int32), meta(dtype=torch.long)  # three sequences of at most 128
    found = scratch(aten._efficient_attention_backward.default, v, q, q, v, None, v, starts, starts, 128, 128,
                    meta(3, 4, 128), 0.0, seed, seed, 0, False, num_splits_key=1)  # fmt: skip
    # 12 maps, 1 block of queries, 3 of columns; one part of the keys
    assert found == (4 * 300 * 4, 12 * (3 * (16 + 4 * 128 * 64) + 4 * 64 * (256 + 128)))


def test_what_torchs_fake_operators_give_already():
    """Outputs as CUDA allocates them: a change would mean that buffers are counted twice, or not at all."""
    q, key, v, *_ = efficient(144, 80, BF16, m=1000)
    bias = meta(2, 16, 1000, 1044, dtype=BF16)
    out, lse, *seeds = aten._scaled_dot_product_efficient_attention(q, key, v, bias, True)
    assert out.shape == (2, 16, 1000, 80) and out.transpose(1, 2).is_contiguous()
    assert (lse.shape, lse.dtype) == ((2, 16, 1024), FP32)  # rows rounded up to 32
    grads = aten._scaled_dot_product_efficient_attention_backward(
        out, q, key, v, bias, out, lse, *seeds, 0.0, [True] * 4
    )
    assert [g.untyped_storage().nbytes() // 2 for g in grads] == [
        2 * 16 * 1000 * 144, 2 * 16 * 1044 * 144, 2 * 16 * 1044 * 80, 2 * 16 * 1000 * 1056
    ]  # fmt: skip
    lse = aten._scaled_dot_product_flash_attention(q, q, q)[1]
    assert (lse.shape, lse.dtype) == ((2, 16, 1000), FP32)


# ---- flash attention


def test_flash_forward_divides_the_keys_where_queries_are_few():
    def forward(m: int, k: int, multiprocessors: int = 132, dropout: float = 0.0) -> tuple[int, ...]:
        q, key = meta(8, 16, m, k, dtype=BF16), meta(8, 16, 1044, k, dtype=BF16)
        flash = aten._scaled_dot_product_flash_attention.default
        return scratch(flash, q, key, key, dropout, multiprocessors=multiprocessors)

    assert forward(1024, 64) == ()
    # 8 x 16 x 1 tiles on 264 slots; the keys are 5 blocks of 256. Parts of 1, 2, 3, 5 fill 0.48, 0.97, 0.73, 0.81 of them
    assert forward(20, 64) == (4 * 2 * 8 * 16 * 20, 4 * 2 * 8 * 16 * 20 * 64)
    assert forward(20, 64, dropout=0.1) == ()
    # 9 blocks of 128, of a width rounded up to 96: 2 parts again
    assert forward(20, 80) == (4 * 2 * 8 * 16 * 20, 4 * 2 * 8 * 16 * 20 * 96)
    assert forward(20, 64, multiprocessors=80) == ()  # 128 of 160 slots are enough


def test_flash_backward():
    def flash(b: int, heads: int, m: int, k: int, key_heads: int | None = None) -> tuple[int, ...]:
        q = meta(b, m, heads, k, dtype=BF16).transpose(1, 2)
        key = meta(b, m, key_heads or heads, k, dtype=BF16).transpose(1, 2)
        seed = meta(dtype=torch.long)
        given = (q, q, key, key, q, meta(b, heads, m), None, None, m, m, 0.0, False, seed, seed)
        return scratch(aten._scaled_dot_product_flash_attention_backward.default, *given)

    rows = 4 * 2 * 16 * 1024
    assert flash(2, 16, 1024, 64) == (rows, rows * 64)
    assert flash(2, 16, 1000, 80) == (rows, rows * 96)  # rows rounded up to 128, columns to 32
    assert flash(2, 16, 1024, 144) == (rows, rows * 192)  # beyond 128 columns to 64
    each = 2 * 2 * 1024 * 16 * 64  # bf16
    assert flash(2, 16, 1024, 64, key_heads=4) == (rows, rows * 64, each, each)


# ---- others


def test_layer_norm_copies_and_partial_sums():
    x, w = meta(70, 1024, 1280), meta(1280)
    mean = meta(70, 1024, 1)
    norm, backward_of = aten.native_layer_norm.default, aten.native_layer_norm_backward.default

    def back(x, mask=(True, True, True), w=w, grad=None, **gpu):
        return scratch(backward_of, x if grad is None else grad, x, [x.shape[-1]], mean, mean, w, w, list(mask), **gpu)

    assert scratch(norm, x, [1280], w, w, 1e-6) == ()
    turned = meta(4, 768, 32, 32).permute(0, 2, 3, 1)
    assert scratch(norm, turned, [768], w, w, 1e-6) == (4 * 4 * 1024 * 768,)
    # 71680 rows, more than 65536; 40 blocks of columns, fewer than half of 132: min(32768 // 40, 2240) = 819 parts
    assert back(x) == (819 * 1280 * 4,) * 2
    assert back(x, mask=(True, True, False)) == (819 * 1280 * 4,)
    assert back(x, mask=(True, False, False)) == ()
    assert back(x.to(BF16), w=meta(1280, dtype=BF16)) == (819 * 1280 * 2,) * 2
    assert back(x, multiprocessors=80) == back(meta(64, 1024, 1280)) == ()
    assert back(meta(4, 32, 32, 768), grad=turned) == (4 * 4 * 1024 * 768,)


def test_softmax_backward_takes_a_map_more():
    y, turned = meta(16, 1044, 1044), meta(16, 1044, 1044).transpose(1, 2)
    softmax, log_softmax = aten._softmax_backward_data.default, aten._log_softmax_backward_data.default
    size = 4 * 16 * 1044 * 1044
    assert scratch(softmax, y, y, -1, FP32) == (size,)
    assert scratch(softmax, meta(1).expand(y.shape), y, -1, FP32) == (size,)
    assert scratch(softmax, meta(16, 1044, 2088)[..., :1044], y, -1, FP32) == (size,)  # in the same order
    assert scratch(softmax, turned, y, -1, FP32) == (size, size)
    assert scratch(softmax, y, turned, -1, FP32) == (size, size)
    assert scratch(log_softmax, y, y, 1, FP32) == ()
    assert scratch(log_softmax, turned, y, 1, FP32) == scratch(aten._softmax.default, turned, -1, False) == (size,)


def test_embedding_backward_sorts_many_indices():
    def back(n: int, weights: int = 30522, by_frequency: bool = False, dtype: torch.dtype = FP32) -> tuple[int, ...]:
        given = (meta(8, n // 8, 768, dtype=dtype), meta(8, n // 8, dtype=torch.long), weights, 0, by_frequency)
        return scratch(aten.embedding_dense_backward.default, *given)

    assert back(3072) == ()
    # sorted, order, runs; length and start of at most 6400 of them; 640 + 6400 starts and rows of partial sums
    assert back(6400) == (*[8 * 6400] * 5, 8 * 7040, 4 * 7040 * 768)
    assert back(6400, dtype=BF16) == back(6400)
    assert back(6400, weights=512) == (*[8 * 6400] * 3, *[8 * 512] * 2, 8 * 1152, 4 * 1152 * 768)
    assert len(back(800, by_frequency=True)) == 8


def test_index_put_sorts_what_it_adds_up():
    n = 144 * 144  # Swin's relative positions: pairs of a window's tokens, 529 rows of 32 heads
    table, index, values = meta(529, 32), meta(n, dtype=torch.long), meta(n, 32)
    positions = (8 * n, 8 * n, 8 * n, 8 * n, 2 * 8 * n)
    for put in (aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default):
        assert scratch(put, table, [index], values, True) == positions
        assert scratch(put, table, [index], values) == ()
    turned = meta(32, n).t()
    assert scratch(aten._index_put_impl_.default, table, [index], turned, True, True) == (
        8 * n, 4 * 32 * n, 8 * n, 8 * n, 8 * n, 2 * 8 * n
    )  # fmt: skip
    # 63 rows: 8 bits are sorted at once, without buffers; two indices make one position
    assert scratch(aten.index_put.default, meta(63, 64), [index], meta(n, 64), True) == (8 * n,) * 4
    # 2048 are sorted by one thread block; a recorded GPU allocates just so for a language model's embedding
    few = meta(2048, dtype=torch.long)
    assert scratch(aten.index_put.default, meta(10000, 64), [few], meta(2048, 64), True) == (8 * 2048,) * 4
    both = [index.view(144, 144), index[:144]]
    assert scratch(aten.index_put.default, meta(23, 23, 32), both, values.view(144, 144, 32), True) == positions
    assert scratch(aten.index_put.default, table, [meta(529, dtype=torch.bool)], meta(5, 32), True) == ()


def test_roll_bilinear_and_bce():
    x = meta(8, 60, 60, 128)
    size = 4 * 8 * 3600 * 128
    assert scratch(aten.roll.default, x, [6, 6], [1, 2]) == (size,)
    assert scratch(aten.roll.default, x, [6], [1]) == ()
    assert scratch(aten.roll.default, x.transpose(1, 2), [6], [1]) == (size,)
    bilinear, given = aten.upsample_bilinear2d_backward.default, ([120, 120], [8, 512, 60, 60], True)
    grad = meta(8, 640, 120, 120)
    assert scratch(bilinear, grad[:, :512], *given) == (4 * 8 * 512 * 14400,)
    assert scratch(bilinear, grad[:, :512].contiguous(), *given) == ()
    assert scratch(bilinear, meta(8, 120, 120, 512).permute(0, 3, 1, 2), *given) == ()
    bce, y = aten.binary_cross_entropy_with_logits.default, meta(8, 512, 512)
    assert scratch(bce, y, y, None, None, 0) == (4 * y.numel(),)
    assert scratch(bce, y, y) == (4 * y.numel(),) * 2  # the mean


def test_cudnn_is_an_assumption_apart():
    x, w, y = meta(8, 256, 32, 32), meta(64, 256, 3, 3), meta(8, 64, 32, 32)
    expected = 4 * (8 * 256 * 1024 + 64 * 256 * 9 + 8 * 64 * 1024)
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert assumed_cudnn_workspace(aten.convolution.default, (x, w, None, *shape), {}, y) == expected
    given = (y, x, w, None, *shape, [True, True, False])
    assert assumed_cudnn_workspace(aten.convolution_backward.default, given, {}, (x, w, None)) == expected
    assert assumed_cudnn_workspace(aten.mm.default, (x, w), {}, y) == 0
    assert workspace(aten.convolution.default, (x, w, None, *shape), {}, y, H100) == ()


def test_operators_of_a_step_on_fake_tensors():
    """A dispatch mode below autograd asks of every operator, as the tracker does."""

    class Asking(TorchDispatchMode):
        found: dict[str, tuple[int, ...]] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if found := workspace(func, args, kwargs or {}, out, H100):
                self.found[str(func)] = found
            return out

    with FakeTensorMode(), Asking() as asked:
        x = torch.zeros(2, 16, 32, 64, requires_grad=True)
        y = torch.nn.functional.layer_norm(x.transpose(2, 3), [32]).softmax(-1)
        (y @ x).sum().backward()
    size = 4 * x.numel()
    assert asked.found["aten._softmax_backward_data.default"] == (size,)
    assert asked.found["aten.native_layer_norm.default"] == (size,)
