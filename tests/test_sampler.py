"""The order of samples: the same global batches for every world size, worker count and resumption; each sample as often
as it should be."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_ds.data.loading.sampler import EvalBatchSampler, Samples, TrainBatchSampler, epoch_order
from dit_ds.errors import UserError

WORLDS = st.integers(1, 64)
quick = settings(max_examples=60, deadline=None)


@st.composite
def runs(draw) -> tuple[Samples, int, int]:
    """Sets of images with a few samples each, in shards; some mixed, some by image, some along shards. With a micro-batch
    and a number of micro-batches in a global batch."""
    parts, images, shards = [], [], []
    kind = draw(st.sampled_from(["global", "shards", "image"]))
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=40))
        weights = [1.0, 2.0, 3.0] if kind == "image" else [0.5, 1.0, 1.3, 2.0]
        parts.append((sum(sizes), draw(st.sampled_from(weights))))
        first = images[-1] + 1 if images else 0
        images += [first + i for i, n in enumerate(sizes) for _ in range(n)]
    assume(sum(round(w * n) for n, w in parts))
    per_shard = draw(st.integers(1, 7))
    shards = [i // per_shard for i in images]
    samples = Samples(
        parts, np.array(images) if kind == "image" else None, np.array(shards) if kind == "shards" else None, "sha"
    )
    # an image's five samples must go in a batch
    micro, places = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from([5, 6, 7, 8, 12, 16, 24, 32, 36, 48, 60, 61, 64, 128])),
    )
    return samples, micro, places


def global_batches(samples, micro, batch_size, world, seed=1, epoch=0, state=None):
    """What all ranks take together, step by step, as sorted items; and whether the ranks' micro-batches are as large as
    they should be."""
    ranks = []
    for rank in range(world):
        sampler = TrainBatchSampler(samples, batch_size, micro, rank, world, seed)
        sampler.resume(state) if state else sampler.start_at(epoch, 0)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) and all(len(m) == micro for m in ranks[-1])
    steps = batch_size // (micro * world)
    whole = []
    for k in range(len(ranks[0]) // steps):
        whole.append(sorted(i for r in ranks for m in r[k * steps : (k + 1) * steps] for i in m))
    return whole


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


@quick
@given(run=runs(), data=st.data(), epoch=st.integers(0, 5))
def test_any_world_any_resumption_same_batches(run, data, epoch):
    samples, micro, places = run
    batch_size = micro * places
    reference = global_batches(samples, batch_size, batch_size, 1, epoch=epoch)
    for world in {1, data.draw(st.sampled_from(divisors(places, 64)), "world")}:
        assert global_batches(samples, micro, batch_size, world, epoch=epoch) == reference
    # stop anywhere, go on with another world and micro-batch
    k = data.draw(st.integers(0, len(reference)))
    state = TrainBatchSampler(samples, batch_size, batch_size, 0, 1, 1).state(epoch, k)
    assert set(state) == {"epoch", "samples_seen", "seed", "manifest_sha"}
    other = data.draw(st.sampled_from(divisors(batch_size, 64)), "world after the stop")
    micro = data.draw(st.sampled_from(divisors(batch_size // other, 8)))
    assert global_batches(samples, micro, batch_size, other, state=state) == reference[k:]


@quick
@given(run=runs(), epochs=st.integers(1, 4))
def test_each_sample_as_often_as_its_weight_says(run, epochs):
    samples, _, places = run
    sampler = TrainBatchSampler(samples, batch_size := 4 * places, batch_size, 0, 1, 3)
    times, lengths = Counter(), set()
    for epoch in range(epochs):
        sampler.start_at(epoch, 0)
        items = [i for batch in sampler for i in batch]
        for batch in sampler:
            assert sum(w for *_, w in batch) == pytest.approx(batch_size)
        lengths.add(len(list(sampler)))
        real = [(t, s) for t, s, w in items if w]
        assert len(set(real)) == len(real)  # seen again, it is drawn anew
        times.update(s for _, s in real)
    assert lengths == {sampler.batches_per_epoch}
    start = 0
    for n, weight in samples.datasets:
        counts = [times[s] for s in range(start, start + n)]
        assert sum(counts) == epochs * round(weight * n)
        assert max(counts) - min(counts) <= 1
        start += n


@quick
@given(run=runs())
def test_an_image_goes_in_one_step(run):
    samples, micro, places = run
    batch_size = micro * places
    if samples.images is None:
        return
    sampler = TrainBatchSampler(samples, batch_size, micro, 0, 1, 1)
    assert sampler.batches_per_epoch <= math.ceil(sum(round(w * n) for n, w in samples.datasets) / (batch_size - 4))
    in_batch: dict[tuple[int, int], set[int]] = {}
    in_micro: dict[tuple[int, int], set[int]] = {}
    for m, micro_batch in enumerate(sampler):
        for t, s, w in micro_batch:
            if w:
                key = (t, int(samples.images[s]))
                in_batch.setdefault(key, set()).add(m // places)
                in_micro.setdefault(key, set()).add(m)
    assert all(len(b) == 1 for b in in_batch.values())
    if micro == 1:
        return
    split = [k for k, m in in_micro.items() if len(m) > 1]
    assert len(split) <= sampler.batches_per_epoch * places


def test_too_large_an_image_is_refused():
    with pytest.raises(UserError, match="an image has 9 refs, train.batch_size is 8"):
        TrainBatchSampler(Samples([(9, 1.0)], images=np.zeros(9, np.int64)), 8, 8, 0, 1, 0)


@quick
@given(n=st.integers(1, 300), batch=st.integers(1, 17), world=WORLDS, workers=st.integers(1, 8))
def test_evaluation_takes_each_once_in_lockstep(n, batch, world, workers):
    ranks = [EvalBatchSampler(n, batch, r, world) for r in range(world)]
    assert {len(list(r)) for r in ranks} == {len(ranks[0])}
    counted = Counter(s for r in ranks for b in r for _, s, weight in b if weight)
    assert counted == Counter(range(n))
    alone = {tuple(s for _, s, _ in b) for b in EvalBatchSampler(n, batch, 0, 1)}
    assert all(tuple(s for _, s, _ in b) in alone for r in ranks for b in r)
    for r in ranks[:2]:
        assert sum((r.worker_slices(w, workers) for w in range(workers)), []) == list(r)


@quick
@given(run=runs(), workers=st.integers(1, 8), data=st.data())  # 0 are the training process itself
def test_readers_of_a_stream_share_each_micro_batch(run, workers, data):
    samples, micro, places = run
    world = data.draw(st.sampled_from(divisors(places, 64)))
    sampler = TrainBatchSampler(samples, micro * places, micro, 0, world, 1)
    workers = min(workers, micro)
    shares = [sampler.worker_slices(w, workers) for w in range(workers)]
    for m, micro_batch in enumerate(sampler):
        joined = [None] * micro
        for w in range(workers):
            joined[w::workers] = shares[w][m]
        assert joined == micro_batch


def test_a_stream_is_read_about_once():
    """All readers together, on any number of ranks and workers: hardly more shards than there are."""
    shards = np.repeat(np.arange(256), 160)  # RefCOCO's train split
    for world, workers in [(1, 4), (8, 2)]:
        opened = 0
        for rank in range(world):
            sampler = TrainBatchSampler(Samples([(len(shards), 1.0)], shards=shards), 64, 64 // world, rank, world, 0)
            count = min(workers, 64 // world)
            opened += sum(
                len({shards[s] for m in sampler.worker_slices(w, count) for _, s, _ in m}) for w in range(count)
            )
        assert opened <= 256 + 64
    # and a batch mixes many of them
    sampler = TrainBatchSampler(Samples([(len(shards), 1.0)], shards=shards), 64, 64, 0, 1, 0)
    assert np.mean([len({shards[s] for _, s, _ in b}) for b in sampler]) > 50


def test_states_of_others_are_refused():
    sampler = TrainBatchSampler(Samples([(50, 1.0)], manifest_sha="a"), 8, 8, 0, 1, 0)
    state = sampler.state(2, 3)
    assert state == {"epoch": 2, "samples_seen": 24, "seed": 0, "manifest_sha": "a"}
    with pytest.raises(UserError, match="manifest_sha"):
        TrainBatchSampler(Samples([(50, 1.0)], manifest_sha="b"), 8, 8, 0, 1, 0).resume(state)
    with pytest.raises(UserError, match="seed"):
        TrainBatchSampler(Samples([(50, 1.0)], manifest_sha="a"), 8, 8, 0, 1, 1).resume(state)
    with pytest.raises(UserError, match="same batch size"):
        TrainBatchSampler(Samples([(50, 1.0)], manifest_sha="a"), 10, 5, 0, 1, 0).resume(state)


def test_orders_differ_between_epochs_and_seeds_and_stay_what_they_are():
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(0, 1, 50))
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(1, 0, 50))
    # a run that is resumed next year must find the same order
    assert epoch_order(7, 2, 12).tolist() == [6, 7, 8, 4, 11, 0, 1, 5, 10, 3, 9, 2]
    images = np.repeat(np.arange(5), 2)
    pinned = {
        "global": ([6, 7, 8, 4], Samples([(10, 1.0)])),
        "shards": ([3, 7, 8, 4], Samples([(10, 1.0)], shards=images)),
        "image": ([0, 1, 0, 0], Samples([(10, 1.0)], images=images)),
        "mixture": ([9, 6, 7, 7], Samples([(6, 0.5), (4, 2.0)])),
    }
    for name, (expected, samples) in pinned.items():
        sampler = TrainBatchSampler(samples, 4, 4, 0, 1, 7)
        sampler.start_at(2, 0)
        assert [s for _, s, _ in next(iter(sampler))] == expected, name
