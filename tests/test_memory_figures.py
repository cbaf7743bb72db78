"""A run's three figures: what it asks of the allocator from start to steady steps, streams, and what fragments."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import launch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds.planning.memory.allocation_log import AllocationLog
from dit_ds.planning.memory.allocations import ALLOCATE, COMPLETE, EMPTY_CACHE, FREE, FREE_LATER, Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.figures import figures
from dit_ds.planning.memory.kernels.gpu_scratch import GpuScratch
from dit_ds.planning.memory.simulate import simulate
from dit_ds.planning.memory.streams import Streams

MIB = 1 << 20


def test_a_run_is_its_start_and_the_same_step_three_times():
    log = AllocationLog()
    weights, scratch = log.allocate(10 * MIB, site="load"), log.allocate(3 * MIB)
    log.free(scratch)
    ready = log.mark()
    old = log.allocate(7 * MIB, site="gradients")  # left by a step that is not the one of interest
    start = log.mark()
    activations = log.allocate(50 * MIB, site="forward")
    log.free(old)
    log.allocate(7 * MIB, site="gradients")  # takes the place of the old one
    log.free(activations)
    end = log.mark()
    requests, sites = log.run(ready, start, end)
    assert [r.size // MIB for r in requests if r.kind == ALLOCATE] == [10, 3, 7, 50, 7, 50, 7, 50, 7]
    live = replayed(requests)
    assert sorted(size // MIB for size in live.values()) == [7, 10] and weights in live
    assert {sites[key] for key in live} == {"load", "gradients"}
    grown = AllocationLog()  # a step that leaves more than it found is taken once
    begin = grown.mark()
    grown.allocate(5 * MIB)
    assert len(grown.run(begin, begin, grown.mark())[0]) == 1


def test_a_step_that_empties_the_cache_does_so_each_time():
    log = AllocationLog()
    begin = log.mark()
    for _ in range(2):
        log.free(log.allocate(30 * MIB))
    log.empty_cache()
    requests, _ = log.run(begin, begin, log.mark())
    assert sum(r.kind == EMPTY_CACHE for r in requests) == 3
    assert simulate(requests, AllocatorSettings())[1].reserved == 0


def replayed(requests: list[Request]) -> dict[int, int]:
    """What is alive at the end, by key; every block is freed at most once, and after it was allocated."""
    live, waiting = {}, set()
    for kind, key, size, *_ in requests:
        if kind == ALLOCATE:
            assert key not in live
            live[key] = size
        elif kind == FREE:
            del live[key]
        elif kind == FREE_LATER:
            del live[key]
            waiting.add(key)
        elif kind == COMPLETE:
            waiting.remove(key)
    return live


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_any_log_makes_a_sequence_that_an_allocator_can_serve(seed):
    rng, log = random.Random(seed), AllocationLog()
    alive: list[int] = []

    def some(n: int) -> None:
        for _ in range(n):
            if alive and rng.random() < 0.5:
                log.free(alive.pop(rng.randrange(len(alive))), waits=rng.random() < 0.2)
            else:
                alive.append(log.allocate(rng.choice([700, 3 * MIB, 15 * MIB]), rng.randrange(2)))
            if rng.random() < 0.1:
                log.synchronize()

    marks = []
    for _ in range(3):
        some(30)
        log.synchronize()
        marks.append(log.mark())
    requests, sites = log.run(*marks)
    live = replayed(requests)
    assert set(sites) >= set(live)
    result, allocator = simulate(requests, AllocatorSettings())
    assert result.fits and allocator.allocated >= sum(live.values())


def test_the_causes_of_fragmentation_are_named():
    """Forty blocks of 8 MiB in segments of 20: every second one goes, the others keep their segments."""
    requests = [Request(ALLOCATE, k, 8 * MIB) for k in range(40)]
    requests += [Request(FREE, k) for k in range(0, 40, 2)] + [Request(ALLOCATE, 99, 300 * MIB)]
    sites = {k: "masks" if k % 2 else "maps" for k in range(40)} | {99: "logits"}
    found = figures(requests, sites, "", compare=True)
    assert (found.allocated, found.reserved) == (460 * MIB, 700 * MIB)
    assert found.pinned == {"masks": 240 * MIB}
    assert found.least_capacity == found.reserved and found.others["expandable_segments:True"] < 650 * MIB
    assert found.fragmentation == pytest.approx(1 - 460 / 700)
    whole = figures(
        requests[:40] + [Request(FREE, k) for k in range(40)] + [Request(ALLOCATE, 99, 300 * MIB)], sites, ""
    )
    assert whole.reserved == 700 * MIB and whole.least_capacity == 400 * MIB  # all 20 segments can be given back


class Told:
    """A tracker that notes what streams tell it."""

    stream, waited, emptied = 0, 0, 0

    def synchronize(self) -> None:
        self.waited += 1

    def empty_cache(self) -> None:
        self.emptied += 1


def test_streams_say_where_operators_run_and_when_the_host_waits():
    streams = Streams()
    streams.tracker = told = Told()
    side = streams.make()
    with streams.on(side):
        assert told.stream == side.number == 1 and streams.current() is side
        with streams.on(streams.default()):
            assert told.stream == 0
        assert told.stream == 1
        event = side.record_event()
        side.wait_stream(streams.default())
        assert not event.query() and told.waited == 0
    assert told.stream == 0
    event.synchronize()
    side.synchronize()
    streams.synchronize()
    streams.empty_cache()
    assert told.waited == 3 and told.emptied == 1


def test_a_tensor_used_on_another_stream_waits_for_the_host(fake_gpu):
    from dit_ds.planning.memory.fake_cluster import STREAMS

    tracker, device = fake_gpu
    side = STREAMS.make()
    x = torch.empty(MIB, device=device)
    with STREAMS.on(side):
        y = torch.empty(2 * MIB, device=device)
        x.record_stream(side)
        y.record_stream(side)  # its own
    del x, y
    made = [r for r in tracker.requests.requests if r.kind != COMPLETE]
    assert [(r.kind, r.size // MIB, r.stream) for r in made] == [
        (ALLOCATE, 4, 0), (ALLOCATE, 8, side.number), (FREE_LATER, 0, 0), (FREE, 0, 0)
    ]  # fmt: skip
    torch.zeros(1, device=device).item()
    (waited,) = [r for r in tracker.requests.requests if r.kind == COMPLETE]
    assert waited.key == made[0].key


@pytest.fixture
def fake_gpu():
    """A tracker on a fake GPU, and the device."""
    from dit_ds.planning.memory import fake_cluster
    from dit_ds.planning.memory.tracker import MemoryTracker

    tracker = MemoryTracker(host=lambda x: x.device.type == "cpu")
    with fake_cluster.fake_tensors(tracker):
        yield tracker, torch.device(fake_cluster._gpu(), 0)


def test_device_contexts_work_after_fake_tensors():
    """PyTorch notes the functions that make tensors once in a process; with ours among them, `from_pretrained` leaves
    buffers uninitialised.
    """
    code = """
import torch
from dit_ds.planning.memory import fake_cluster, live_tensors
with fake_cluster.fake_tensors(live_tensors.LiveTensors()), torch.device("cpu"):
    torch.zeros(1)
with torch.device("meta"):
    print(*(make([]).device for make in (torch.tensor, torch.as_tensor)))
"""
    done = launch(["-c", code], ranks=1, timeout=120)
    assert (done.stdout, done.returncode) == ("meta meta\n", 0), done.stderr


def test_our_operators_temporaries_come_one_by_one_each_time(fake_gpu):
    """The first call's are noted, with cuBLAS's workspace; later calls repeat them, without it."""
    tracker, device = fake_gpu
    tracker.gpu = GpuScratch("H100")
    shapes = [(2, 16, 3, 2, 16), (4, 4, 16), (4, 4, 16)]  # qkv (B, N, 3, heads, d), tables (H, H, d) and (W, W, d)
    logged = []
    for _ in range(3):
        operands = [torch.zeros(shape, device=device) for shape in shapes]
        began = len(tracker.requests.requests)
        out = torch.ops.dit_ds.attention(*operands, None, None, "sdpa_efficient")
        logged.append([(r.kind, r.size) for r in tracker.requests.requests[began:]])
        del out, operands
    workspace = [(ALLOCATE, 32 * MIB)]
    assert logged[1] == logged[2] == [r for r in logged[0] if r not in workspace] and len(logged[1]) > 4
    assert sum(size == 32 * MIB for _, size in logged[0]) == 1


@pytest.mark.parametrize("words", [0, 5])
def test_triton_takes_no_more_than_the_folded_kernel(fake_gpu, words):
    """At the peak of each pass, and kept for the backward pass; without triton, which needs not be installed."""
    tracker, device = fake_gpu

    def step(kernel):
        b, h, w, heads, d = 4, 32, 32, 16, 80
        qkv, rel_h, rel_w, text = (
            torch.zeros(s, device=device, dtype=torch.bfloat16)
            for s in ((b, h * w, 3, heads, d), (h, h, d), (w, w, d), (b, words, 2, heads, d))
        )
        mask = torch.ones(b, words, device=device, dtype=torch.bool) if words else None
        operands = (qkv, rel_h, rel_w, text if words else None, mask)
        before, tracker.peak = tracker.now, tracker.now
        out, lse = torch.ops.dit_ds.attention(*operands, kernel)
        kept, forward = tracker.now - before, tracker.peak - before
        tracker.peak = tracker.now
        backward = torch.ops.dit_ds.attention_backward
        grads = backward(torch.zeros_like(out), *operands, out, lse, kernel, need_qkv=True, need_rel=True)
        assert [g.shape for g in grads[:3]] == [x.shape for x in operands[:3]]
        return kept, forward, tracker.peak - before

    triton, folded = step("triton"), step("sdpa_efficient")
    assert triton[0] == folded[0] == 4 * 1024 * 16 * (80 * 2 + 4)  # output and log-sum-exp
    assert triton[1] < folded[1] and triton[2] < folded[2]
    biases = 4 * 1024 * 16 * 64 * 2  # what a query adds to the logits of each row and column, in bf16
    assert triton[1] >= triton[0] + biases  # the temporaries are counted
