"""Scratch of CUDA's reductions: cases computed by hand from the kernel's rules, on tensors without data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dit_ds.errors import UserError
from dit_ds.planning.gpus import LIMITS, PEAKS, GpuLimits, limits_of
from dit_ds.planning.memory.kernels import reductions
from dit_ds.planning.memory.kernels.reductions import scratch

H100 = limits_of("H100")
MIB = 2**20
aten = torch.ops.aten


class Scratch(TorchDispatchMode):
    """Collects the scratch of every operator under it."""

    def __init__(self, gpu: GpuLimits = H100) -> None:
        super().__init__()
        self.gpu, self.found, self.known = gpu, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.found += scratch(func, args, kwargs or {}, out, self.gpu)
        self.known += func in reductions._OPERATORS
        return out


def of(run, *shape, dtype=torch.float32, gpu=H100, permute=None):
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x if permute is None else x.permute(permute)
    with Scratch(gpu) as mode:
        run(x)
    return tuple(mode.found)


def test_the_maximum_that_took_528_mib():
    # As recorded on an H100. 2048 outputs of 10000 inputs each, the outputs' dimension being the fast one: threads load 4
    # outputs at once, so a block has 512/4 = 128 threads, 32 x 4. A thread has 10000/4 = 2500 inputs. 2048/4/32 = 16
    # blocks lie side by side; 132 multiprocessors hold 2048/128 = 16 each, 2112, so 2112/16 = 132 share an output. A
    # value and its index take 16 bytes: 16 * 2048 * 132 * (32 * 4).
    assert of(lambda x: x.max(0), 10000, 2048) == (528 * MIB, 64)
    assert of(lambda x: x.max(-1), 10000, 2048, permute=(1, 0)) == (528 * MIB, 64)


@pytest.mark.parametrize(
    ("run", "shape", "expected"),
    [  # the last factors: blocks for an output, outputs of a block
        (lambda x: x.sum((0, 1)), (4, 1024, 1024), (4 * 1024 * 64 * 128, 32)),
        (lambda x: x.sum((0, 1)), (4, 512, 1024), (4 * 1024 * 32 * 128, 32)),
        (lambda x: x.sum(0), (2560, 512), (4 * 512 * 40 * 128, 16)),
        (lambda x: x.sum(0), (2560, 2048), (4 * 2048 * 40 * 128, 64)),
        (lambda x: x.sum(0), (10000, 512), (4 * 512 * 157 * 128, 16)),
        (lambda x: x.sum(0), (10000, 2048), (4 * 2048 * 132 * 128, 64)),
        (lambda x: x.max(0), (10000, 512), (16 * 512 * 157 * 128, 16)),
    ],
)
def test_sizes_recorded_on_an_h100(run, shape, expected):
    assert of(run, *shape) == expected


def test_a_gradient_of_a_bias_with_many_rows():
    # 768 outputs: 768/4/32 = 6 blocks side by side, 2112/6 = 352 share an output: 4 * 768 * 352 * 128 bytes
    assert of(lambda x: x.sum(0), 131072, 768) == (132 * MIB, 24)
    assert of(lambda x: x.sum((0, 1)), 32, 4096, 768) == (132 * MIB, 24)
    assert of(lambda x: x.sum((0, 1), keepdim=True), 32, 4096, 768) == (132 * MIB, 24)
    assert of(lambda x: x.sum((-3, -2)), 32, 4096, 768) == (132 * MIB, 24)


def test_a_sum_of_everything():
    # one output, 10^6 inputs: 512 threads beside each other, ceil(10^6/512) = 1954 values each; 132 * 2048/512 = 528
    # blocks would fit, but each thread shall have 16 values: ceil(1954/16) = 123
    for run in (torch.sum, lambda x: x.sum((0, 1), keepdim=True), lambda x: x.sum([]), torch.mean, torch.amax):
        assert of(run, 1000, 1000) == (4 * 123, 4)


def test_the_reduced_dimension_may_be_the_fast_one():
    # 8 outputs of 2^20 inputs: a block is 32 wide at first, 8 high, then 512/8 = 64 wide. 2^20/64 = 16384 values of a
    # thread, 2048 once the block's rows share an output. 8 blocks side by side, 528/8 = 66 for an output; ceil(2048/16) =
    # 128 would be the most. Every output has one partial result of each block.
    assert of(lambda x: x.sum(1), 8, 2**20) == (4 * 8 * 66, 4 * 8)
    assert of(lambda x: x.sum(0), 8, 2**20, permute=(1, 0)) == (4 * 8 * 66, 4 * 8)


@pytest.mark.parametrize(
    ("run", "dtype", "accumulator"),
    [
        (lambda x: x.sum(0), torch.bfloat16, 4),
        (lambda x: x.sum(0, dtype=torch.float32), torch.float16, 4),
        (lambda x: x.sum(0), torch.float64, 8),
        (lambda x: x.mean(0), torch.float16, 4),
        (lambda x: x.prod(0), torch.bfloat16, 4),
        (lambda x: x.amax(0), torch.bfloat16, 2),
        (lambda x: x.any(0), torch.bool, 1),
        (lambda x: x.all(0), torch.float32, 4),
        (lambda x: x.max(0), torch.bfloat16, 16),
        (lambda x: x.argmin(0), torch.float64, 16),
        (lambda x: x.aminmax(dim=0), torch.float32, 8),
        (lambda x: torch.linalg.vector_norm(x, dim=0), torch.bfloat16, 4),
        (lambda x: x.norm(dim=0), torch.float32, 4),
        (lambda x: x.var(0), torch.bfloat16, 16),
        (lambda x: x.std(0), torch.float64, 32),
        (lambda x: torch.var_mean(x, 0), torch.float32, 16),
    ],
)
def test_accumulators(run, dtype, accumulator):
    # 10000/4/32 = 79 blocks side by side, ceil(2112/79) = 27 for an output
    assert of(run, 2048, 10000, dtype=dtype) == (accumulator * 10000 * 27 * 128, 4 * 79)


@pytest.mark.parametrize(
    "run",
    [
        torch.sum, torch.mean, torch.nansum, torch.prod, torch.amax, torch.amin, torch.max, torch.min, torch.argmax,
        torch.argmin, torch.std, torch.var, torch.std_mean, torch.norm, torch.linalg.vector_norm, torch.aminmax,
        lambda x: x.norm(1), lambda x: (x > 0).any(), lambda x: (x > 0).all(), lambda x: torch.norm(x, dtype=torch.float64),
        lambda x: torch.sum(x, 0, out=torch.empty((), device="meta")), lambda x: x.var(correction=0),
    ],
)  # fmt: skip
def test_every_spelling_is_known(run):
    x = torch.empty(2**22, device="meta")
    with Scratch() as mode:
        run(x)
    assert mode.known == 1 and mode.found


def test_few_inputs_or_many_outputs_need_one_block_each():
    assert of(lambda x: x.sum(0), 1000, 768) == ()  # 1000/4 = 250 values of a thread
    assert of(lambda x: x.sum(0), 1900, 280000) == ()  # 280000/4/32 = 2188 blocks, more than the 2112 at once
    assert of(lambda x: x.sum(1), 2**20, 255) == ()
    assert of(torch.sum) == of(torch.sum, 0) == of(lambda x: x.sum(0), 0, 5) == of(lambda x: x.sum(0), 5, 0) == ()
    assert of(lambda x: x.sum(0), 0, 5, dtype=torch.bool) == of(torch.mean) == ()


def test_outputs_of_a_thread_follow_from_alignment():
    def expected(outputs, vector, blocks):
        return 4 * outputs * blocks * 32 * vector, 4 * -(-outputs // vector // 32)

    # 770 is a multiple of 2: 256 threads, 8 of which a multiprocessor holds; 770/2/32 = 13 blocks, 1056/13 = 82
    assert of(lambda x: x.sum(0), 131072, 770) == expected(770, 2, 82)
    # from the second column on, nothing is aligned: 512 threads, 4 blocks of a multiprocessor; 24 blocks, 528/24 = 22,
    # but none of a thread's 131072/16 = 8192 values shall be more than the 256th: 8192/256 = 32
    assert of(lambda x: x[:, 1:].sum(0), 131072, 769) == expected(768, 1, 32)
    assert of(lambda x: x.sum(0), 131072, 768) == expected(768, 4, 352)
    # nor where the tensor itself begins at an odd place
    assert of(lambda x: x[1:].view(131072, 768).sum(0), 131072 * 768 + 1) == expected(768, 1, 32)


def test_order_of_the_outputs_decides_before_the_inputs():
    # The result (4, 16) is contiguous, so its last dimension counts as the fast one of those that are kept, though its
    # step is the input's largest: the reduced one, of 16 bytes, is faster
    x = torch.empty(16, 131072, 4, device="meta").permute(1, 2, 0)
    with Scratch() as mode:
        x.sum(0)
    # 64 outputs of 131072 inputs: 32 x 16 threads of one output, 131072/512 = 256 values; ceil(528/64) = 9
    assert mode.found == [4 * 64 * 9, 4 * 64]
    # Of a contiguous input the kept 4 are the fast ones: a thread has 4 outputs, a block all 64, 16 wide, 8 high, one
    # block beside each other; 131072/8 = 16384 values, 16 of each thread: 1024 blocks
    assert of(lambda x: x.sum(1), 16, 131072, 4) == (4 * 64 * 1024 * 16 * 4, 4)


def test_the_gpu_decides_how_many_blocks():
    # A10: 72 multiprocessors with 1536 threads hold 72 * 12 = 864 blocks of 128; 864/79 = 11
    assert of(lambda x: x.amax(0), 2048, 10000, gpu=limits_of("A10")) == (4 * 10000 * 11 * 128, 4 * 79)
    # T4: 40 * 8 = 320, ceil(320/79) = 5
    assert of(lambda x: x.amax(0), 2048, 10000, gpu=limits_of("T4")) == (4 * 10000 * 5 * 128, 4 * 79)


def test_an_input_of_another_type_is_copied():
    # a sum of booleans is one of 64-bit integers
    assert of(lambda x: x.sum(), 1000, 1000, dtype=torch.bool) == (8 * 10**6, 8 * 123, 4)
    assert of(lambda x: x.sum(1), 1000, 10, dtype=torch.bool) == (8 * 10**4,)
    assert of(lambda x: x.mean(dtype=torch.float64), 1000, 1000) == (8 * 10**6, 8 * 123, 4)


def test_an_input_with_gaps_is_copied_for_its_maximum():
    assert of(lambda x: x[:, ::2].max(), 1000, 2000) == (4 * 10**6, 4 * 123, 4)
    assert of(lambda x: x[:, ::2].sum(), 1000, 2000) == (4 * 123, 4)


def test_more_than_2_gib_is_reduced_in_pieces():
    # two rows of 2 GiB, each reduced by itself: one output, 2^30/512 = 2^21 values of a thread, at most 256 each: 8192
    # blocks. The accumulators of the two sums of bfloat16 wait in a buffer, those of float32 in the output.
    assert of(lambda x: x.sum(1), 2, 2**30, dtype=torch.bfloat16) == (8, 4 * 8192, 4)
    assert of(lambda x: x.sum(1, dtype=torch.float32), 2, 2**30, dtype=torch.bfloat16) == (4 * 8192, 4)
    assert of(lambda x: x.amax(1), 2, 2**30, dtype=torch.bfloat16) == (2 * 8192, 4)
    assert of(lambda x: x.max(1), 2, 2**30, dtype=torch.bfloat16) == (32, 16 * 8192, 4)


def test_gradients_that_operators_sum_themselves():
    gradient = torch.empty(8, 256, 64, 64, device="meta")
    x, weight = torch.empty(8, 64, 64, 64, device="meta"), torch.empty(256, 64, 1, 1, device="meta")
    numbers = ([256], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    with Scratch() as mode:
        aten.convolution_backward(gradient, x, weight, *numbers, [True, True, False])
        assert mode.found == []
        aten.convolution_backward(gradient, x, weight, *numbers, [True, True, True])
    assert mode.found == list(of(lambda x: x.sum((0, 2, 3)), 8, 256, 64, 64))


def test_layer_norm_sums_gradients_of_many_rows_in_two_steps():
    x = torch.empty(2**17, 768, device="meta")
    statistics, weight = torch.empty(2**17, 1, device="meta"), torch.empty(768, device="meta")
    with Scratch() as mode:
        aten.native_layer_norm(x, [768], weight, weight, 1e-6)
        assert mode.found == []
        aten.native_layer_norm_backward(x, x, [768], statistics, statistics, weight, weight, [True, True, True])
    # 24 warps side by side: 2^15 / 24 = 1365 blocks above each other, then a sum of 1365 rows: 341 values of a thread,
    # 6 blocks, min(352, ceil(342/16)) = 22 for an output
    assert mode.found == [4 * 768 * 1365] * 2 + [4 * 768, 4 * 768 * 22 * 128, 24]
    few = Scratch()
    with few:
        aten.native_layer_norm_backward(
            x[:4096], x[:4096], [768], statistics[:4096], statistics[:4096], weight, weight, [True, True, True]
        )
    assert few.found == []


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.softmax(0), lambda x: x.log_softmax(1), lambda x: x.cumsum(0), lambda x: x + 1, lambda x: x @ x.T,
        lambda x: x.sort(0), lambda x: x.topk(5, 0), torch.clone, lambda x: torch.maximum(x, x),
        lambda x: torch.nn.functional.group_norm(x, 2), lambda x: torch.nn.functional.layer_norm(x, x.shape[1:]),
    ],
)  # fmt: skip
def test_other_operators_have_none(run):
    assert of(run, 4096, 10000) == ()


SHAPES = st.lists(st.sampled_from([1, 2, 3, 5, 32, 100]), min_size=1, max_size=5)


@st.composite
def reduced_tensors(draw):
    shape = draw(SHAPES)
    wanted = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    return shape, sorted(wanted), draw(st.permutations(range(len(shape))))


def loops(x, out, wanted):
    layout = reductions._Layout.of
    steps = [reductions._output_steps(tuple(x.shape), layout(out), wanted), [4 * n for n in x.stride()]]
    dims = [reductions._Dim(size, s) for size, s in zip(x.shape, zip(*steps))]
    return reductions._merged(reductions._ordered(dims))


@settings(deadline=None)
@given(reduced_tensors())
def test_dimensions_of_a_contiguous_tensor_merge_in_runs(case):
    shape, wanted, _ = case
    x = torch.empty(shape, device="meta")
    found = loops(x, x.sum(wanted), wanted)
    runs: list[list] = []  # neighbours that are both reduced, or both kept
    for i in reversed([i for i in range(len(shape)) if shape[i] > 1]):
        if runs and runs[-1][0] == (i in wanted):
            runs[-1][1] *= shape[i]
        else:
            runs.append([i in wanted, shape[i]])
    if runs:
        assert [d.size for d in found] == [n for kept in (True, False) for reduced, n in runs if reduced == kept]
        assert [d.reduced for d in found] == sorted((reduced for reduced, _ in runs), reverse=True)
    else:
        assert [d.size for d in found] == [1]


@settings(deadline=None)
@given(reduced_tensors())
def test_how_dimensions_are_named_does_not_matter(case):
    shape, wanted, order = case
    shape = [max(2, n) for n in shape]
    x = torch.empty(shape, device="meta")
    out = x.sum(wanted, keepdim=True)
    renamed = [order.index(i) for i in wanted]
    call = aten.sum.dim_IntList
    expected = scratch(call, (x, wanted, True), {}, out, H100)
    assert scratch(call, (x.permute(order), renamed, True), {}, out.permute(order), H100) == expected


@settings(deadline=None)
@given(SHAPES, st.data())
def test_pieces_cover_the_tensor(shape, data):
    limit = data.draw(st.integers(1, 2**16))
    dims = [reductions._Dim(size, (0, 4 * math.prod(shape[:i]))) for i, size in enumerate(shape)]
    before = reductions._MOST_INDEX
    reductions._MOST_INDEX = max(limit, 4 * math.prod(shape) // 64)
    try:
        pieces = list(reductions._pieces(dims, 0))
        assert all(reductions._fits(of) for of, _ in pieces)
    finally:
        reductions._MOST_INDEX = before
    assert sum(math.prod(d.size for d in of) for of, _ in pieces) == math.prod(shape)
    assert len({start for _, start in pieces}) == len(pieces)


def test_limits_are_known_of_every_gpu():
    assert LIMITS.keys() == PEAKS.keys()
    assert limits_of("NVIDIA H100 80GB HBM3") == GpuLimits(132, 2048, (9, 0))
    assert limits_of("NVIDIA GeForce RTX 4090").threads_per_multiprocessor == 1536
    with pytest.raises(UserError, match="not known"):
        limits_of("Radeon")
