"""Autocast on the fake GPU is what it is on CUDA, and what is counted is what PyTorch allocates when nobody looks on.

PyTorch itself says what CUDA does: fake CUDA tensors run its own kernels for autocast, without a GPU. And its profiler sees
a CPU's allocations without a dispatch mode.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from autocast_calls import CALLS
from autocast_worker import models
from conftest import ROOT, warm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dit_ds.errors import RunFailed
from dit_ds.planning.memory import autocast
from dit_ds.planning.memory.fake_cluster import fake_tensors
from dit_ds.planning.memory.live_tensors import LiveTensors

MIB = 2**20


def worker(mode: str) -> dict:
    """What `autocast_worker.py` prints."""
    done = warm([str(ROOT / "tests/autocast_worker.py"), mode], timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- the lists


def test_the_lists_are_those_of_cuda():
    lists = (autocast.LOW_PRECISION, autocast.FP32, autocast.FP32_OUTPUT, autocast.FP32_OVERLOAD, autocast.WIDEST,
             autocast.BANNED)  # fmt: skip
    ours = [f"aten::{name}" for names in lists for name in names]
    assert len(ours) == len(set(ours)) > 110
    assert set(ours) == set(torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"))
    assert set(CALLS) == {name.removeprefix("aten::") for name in ours}


# Without CUDA these fail behind autocast on fake CUDA tensors, so that the types of their outputs are not known
WITHOUT_OUTPUT = {"models": {"batch_norm.default", "conv1d.default", "grid_sampler.default"},
                  "listed": {"_thnn_fused_gru_cell.default", "cudnn_convolution.default", "gru_cell.default",
                             "cudnn_convolution_transpose.default", "grid_sampler.default"}}  # fmt: skip


@pytest.mark.parametrize(("calls", "operators", "casts"), [("models", 90, 700), ("listed", 119, 1200)])
def test_operators_cast_as_on_cuda(calls, operators, casts):
    """The casts, in their order, and the types of the outputs; fp16 and bf16, inputs in either, in fp32 and mixed."""
    found = worker(calls)
    assert found["differences"] == []
    assert len(found["operators"]) >= operators and found["casts"] > casts
    allowed = {f"aten.{name}" for name in WITHOUT_OUTPUT[calls]} | {"aten.binary_cross_entropy.default"}
    assert set(found["without_output"]) <= allowed


def test_a_difference_from_cuda_is_noticed():
    assert {d[0] for d in worker("planted")["differences"]} == {"aten.exp.default"}


# --- the cache of weights


def test_weights_are_cast_as_often_as_on_a_cpu():
    """Whose cache is CUDA's, too."""
    found = worker("cached")
    assert found["ours"] == found["theirs"]
    casts = {k: len(v) for k, v in found["ours"].items()}
    assert casts["weight"] == casts["fp16"] - 1 == 3  # it and, twice, the input
    assert casts["frozen"] == casts["view"] == casts["detached"] == 4


def test_weights_take_the_memory_that_they_take_on_a_cpu():
    """Eight weights of 4 MiB, in bf16 2: cached 16 at once, else 2 and, in training, 6 uses of 16 more than once."""
    found = worker("peaks")
    for name, (real, fake) in found.items():
        assert fake == real, name
    extra = {name: fake[0] / MIB for name, (_, fake) in found.items()}
    few = pytest.approx(0.05, abs=0.05)  # the activations
    assert extra["no_grad True"] - 16 == few
    assert extra["no_grad False"] - 2 == extra["inference True"] - 2 == extra["inference False"] - 2 == few
    assert extra["train False"] - extra["train True"] > 16
    assert found["train True"][1][2]


def test_a_cache_that_cannot_be_cleared_stops_the_prediction(monkeypatch):
    monkeypatch.delattr(torch, "clear_autocast_cache")
    with pytest.raises(RunFailed, match="has no torch.clear_autocast_cache"):
        with fake_tensors(LiveTensors()):
            raise AssertionError("it was entered")


# --- what is counted

N = 256  # of (N, N) tensors in fp32


class Own(torch.autograd.Function):
    """Its backward pass needs a gradient that it has added to another."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        a = g * ctx.saved_tensors[0]
        return (a + g * 2) * a


class Gaps(torch.autograd.Function):
    """Its gradient has gaps in memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.empty_strided(g.shape, (2 * N, 2)).copy_(g)


def kept_by_hook(y: Tensor, kept: list[Tensor]) -> Tensor:
    y = y + 1  # whose gradient is y's
    y.register_hook(kept.append)
    return y


def with_hook(y: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    y.register_hook(hook)
    return y


INDEX = torch.zeros(N, dtype=torch.long)
# graphs over y, of which another leaf w, and a list that keeps what it is given; with the tensors that their backward passes
# hold at once where it was worked out by hand
GRAPHS: dict[str, tuple[Callable[[Tensor, Tensor, list[Tensor]], Tensor], int | None]] = {
    "used thrice": (lambda y, w, kept: y * 2 + y * 3 + y * 4, 2),  # the sum so far and the next
    "kept by a hook": (lambda y, w, kept: kept_by_hook(y, kept) * 5 + y * 3, 3),  # and their sum
    "kept by a hook, second": (lambda y, w, kept: y * 3 + kept_by_hook(y, kept) * 5, 3),
    "of two branches": (lambda y, w, kept: (y + w) * 5 + y * 3, 3),  # w's, and the sum of y's
    "of two branches, first": (lambda y, w, kept: (lambda v: y * 3 + (y + v) * 5)(w * 1), None),
    "kept by a hook on a view": (
        lambda y, w, kept: y * 3 + (with_hook(y.view(-1), lambda g: kept.append(g)) * 5).view(N, N),
        3,
    ),
    "used once for all": (lambda y, w, kept: y + y, None),
    "summed by an operator in a hook": (
        lambda y, w, kept: with_hook(y * 2, lambda g: F.hinge_embedding_loss(g, w.detach(), reduction="none")) + y,
        None,
    ),
    "summed in a hook": (lambda y, w, kept: with_hook(y, lambda g: g * 2 + g * 3) * 2 + y * 3, None),
    "retained": (lambda y, w, kept: (y.retain_grad(), y * 2 + y * 3)[1], None),
    "squared": (lambda y, w, kept: y * y + y, None),
    "summed by its own backward pass": (lambda y, w, kept: Own.apply(y) + y * 2, None),
    "with gaps": (lambda y, w, kept: y * 3 + Gaps.apply(y) * 5, None),
    "transposed": (lambda y, w, kept: y.t() * 2 + y * 3 + y.sum(), None),
    "recomputed": (lambda y, w, kept: checkpoint(lambda t: (t * 2).exp() + t * 3, y, use_reentrant=False) + y, None),
    "indexed": (lambda y, w, kept: y[INDEX] + y.index_select(0, INDEX) + y.max(1, keepdim=True)[0], None),
    "gathered": (lambda y, w, kept: y.gather(0, INDEX[:, None].expand(N, N)) + y, None),
    "unbound": (lambda y, w, kept: torch.stack([y, y * 2]).unbind()[0] * y, None),
}


class Log(LiveTensors):
    """Every allocation and release, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def _allocated(self, size: int, x: Tensor) -> int:
        self.log.append(size)
        return super()._allocated(size, x)

    def _freed(self, size: int) -> None:
        self.log.append(-size)
        super()._freed(size)


def run(name: str, live: LiveTensors | None = None) -> tuple[int, list[Tensor], list[Tensor]]:
    """A step over one of GRAPHS. Returns the bytes that its backward pass held at once, the leaves and what was kept."""
    x, w = (torch.full((N, N), 0.5, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    loss = GRAPHS[name][0](x * 1, w, kept).sum()
    start = 0
    if live is not None:
        start = live.peak = live.now
    loss.backward()
    return 0 if live is None else live.peak - start, [x, w], kept


def large(log: list[int]) -> list[int]:
    """Allocations and releases of many elements, in units of 512 bytes, up."""
    return [(size > 0 or -1) * -(-abs(size) // 512) for size in log if abs(size) >= N * N]


@pytest.mark.parametrize("name", GRAPHS)
def test_allocations_are_those_without_a_mode(name):
    """The very sequence of allocations and releases of a step, real and fake, as the profiler sees them on a CPU."""
    run(name)  # what is allocated once a process is not the graph's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        _, *unwatched = run(name)
    events = p.profiler.kineto_results.events()
    truth = [e.nbytes() for e in events if e.name() == "[memory]"]
    with Log() as real:
        taken, *watched = run(name, real)
        seen = list(real.log)
    with FakeTensorMode(allow_non_fake_inputs=True), Log() as fake:
        predicted_peak, *_kept_alive = run(name, fake)
        predicted = list(fake.log)
    assert large(truth) == large(seen) == large(predicted) and len(large(truth)) > 8
    assert taken == predicted_peak
    if GRAPHS[name][1] is not None:
        assert round(taken / (4 * N * N), 1) == GRAPHS[name][1]
    for ours, theirs in zip(*([*(x.grad for x in leaves), *kept] for leaves, kept in (watched, unwatched))):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_models_learn_the_same_and_need_the_same_in_inference_mode():
    """Gradients bit for bit, counted or not; and as much without gradients as where operators arrive whole."""
    for model, (inputs, mask, weight) in models():
        gradients, peaks = [], []
        for live in (None, LiveTensors()):
            model.zero_grad()
            torch.manual_seed(0)
            if live is None:
                model.loss(model(**inputs), mask, weight).backward()
            else:
                with live:
                    model.loss(model(**inputs), mask, weight).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 100
        assert all(itertools.starmap(torch.equal, zip(*gradients)))
        for without in (torch.no_grad, torch.inference_mode):
            with LiveTensors() as live, without():
                model.eval()(**inputs)
            peaks.append((live.now, live.peak))
        assert peaks[0] == peaks[1] and peaks[0][1] > 10**5


@pytest.mark.parametrize("fake", [False, True])
def test_temporaries_of_composite_operators_count_in_inference_mode(fake):
    def temporaries() -> int:
        x = torch.ones(N, N)
        with LiveTensors() as live:
            torch.einsum("ij,kj->ik", x.to(torch.bfloat16).float(), x.t().contiguous())
        return live.peak

    with FakeTensorMode() if fake else torch.no_grad():
        with torch.no_grad():
            expected = temporaries()
        with torch.inference_mode():
            assert temporaries() == expected == 3 * 4 * N * N
