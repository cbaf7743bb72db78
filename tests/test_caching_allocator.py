"""The model of CUDA's caching allocator: hand-computed sequences, a second model, and what must always hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_allocator import ReferenceAllocator

from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.blocks import DEFAULT_POOL
from dit_ds.planning.memory.caching_allocator import CachingAllocator, OutOfMemory

MIB = 1 << 20
SETTINGS = [
    "", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:4",
    "expandable_segments:True,roundup_power2_divisions:8", "large_segment_size_mb:40,max_split_size_mb:64",
    "garbage_collection_threshold:0.6,per_process_memory_fraction:0.9",
]  # fmt: skip


def allocator(text: str = "", capacity: int | None = None) -> CachingAllocator:
    return CachingAllocator(AllocatorSettings.parse(text), capacity)


def test_sizes_of_blocks_and_segments():
    a = allocator()
    assert (a.allocate(1).size, a.allocate(513).size) == (512, 1024)
    assert a.reserved == 2 * MIB  # both in one small segment
    assert a.allocate(MIB).address == 1536 and a.reserved == 2 * MIB
    first = a.allocate(MIB + 1)  # large: its own segment of 20 MiB, split as more than 1 MiB is left
    assert (first.size, a.reserved) == (MIB + 512, 22 * MIB)
    assert a.allocate(11 * MIB).address == first.end  # what is left of it, 18.99 MiB, holds it
    a.allocate(10 * MIB)
    assert a.reserved == 32 * MIB  # from 10 MiB on, a segment of the size, in steps of 2 MiB
    assert a.allocate(15 * MIB + 1).size == 16 * MIB  # what is left, 1 MiB less 512 bytes, is no block of its own
    assert a.reserved == 48 * MIB
    assert a.allocated == a.peak_allocated == 1536 + MIB + MIB + 512 + 37 * MIB


def test_the_smallest_block_that_fits_is_taken_and_neighbours_merge():
    a = allocator()
    big, small = a.allocate(40 * MIB), a.allocate(24 * MIB)
    a.free(big)
    a.free(small)
    taken = a.allocate(20 * MIB)  # of the 24
    assert taken.address == small.address and taken.size == 20 * MIB and a.reserved == 64 * MIB
    third, fourth = a.allocate(10 * MIB), a.allocate(12 * MIB)  # both of the 40
    assert (third.address, fourth.address) == (big.address, big.address + 10 * MIB)
    a.free(third)
    a.free(fourth)
    assert a.allocate(40 * MIB).address == big.address  # one block again
    assert a.reserved == a.peak_reserved == 64 * MIB


def test_streams_and_private_pools_keep_to_themselves():
    a = allocator()
    a.free(a.allocate(30 * MIB))
    assert a.allocate(30 * MIB, stream=1).address == 30 * MIB
    assert a.allocate(30 * MIB, pool=(0, 7)).address == 60 * MIB
    assert a.allocate(30 * MIB).address == 0
    assert a.reserved == 90 * MIB


def test_a_block_that_waits_for_another_stream_is_not_used_before():
    a = allocator()
    block = a.allocate(30 * MIB)
    a.free(block, waits=True)
    assert a.allocated == 0  # it no longer counts as allocated
    other = a.allocate(30 * MIB)
    assert other.address == 30 * MIB
    a.complete(block)
    assert a.allocate(30 * MIB).address == 0
    a.free(other, waits=True)
    a.empty_cache()  # waits for all streams
    assert a.reserved == 30 * MIB
    a.complete(other)  # has passed already
    assert a.reserved == 30 * MIB


def test_at_the_capacity_unused_segments_are_released_and_split_ones_are_not():
    a = allocator(capacity=100 * MIB)
    whole, split = a.allocate(40 * MIB), a.allocate(40 * MIB)
    a.free(split)
    keeper = a.allocate(4 * MIB)  # holds a part of the second segment
    assert keeper.address == split.address
    a.free(whole)
    assert a.allocate(60 * MIB).size == 60 * MIB and a.retries == 1
    assert a.reserved == 100 * MIB and a.peak_reserved == 100 * MIB
    with pytest.raises(OutOfMemory) as failed:
        a.allocate(50 * MIB)
    assert a.retries == 2 and failed.value.segment == 50 * MIB
    assert failed.value.as_torch_words_it(128 * MIB, context=20 * MIB) == (
        "CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity of 128.00 MiB of which 8.00 MiB is "
        "free. Including non-PyTorch memory, this process has 120.00 MiB memory in use. Of the allocated memory 64.00 MiB "
        "is allocated by PyTorch, and 36.00 MiB is reserved by PyTorch but unallocated."
    )


def test_expandable_segments_grow_and_give_pages_back():
    a = allocator("expandable_segments:True", capacity=200 * MIB)
    one = a.allocate(30 * MIB)
    assert (one.address, a.reserved) == (0, 40 * MIB)  # two pages of 20 MiB
    two = a.allocate(15 * MIB)
    assert (two.address, a.reserved) == (30 * MIB, 60 * MIB)  # 10 MiB were there, a third page is mapped
    assert a.allocate(600).address != 0 and a.reserved == 62 * MIB  # a range of its own, pages of 2 MiB
    a.free(one)
    three = a.allocate(35 * MIB)  # does not fit into the first 30: behind the second, two more pages hold it
    assert (three.address, a.reserved) == (45 * MIB, 82 * MIB)
    a.free(three)
    assert a.reserved == 82 * MIB  # free memory stays
    four = a.allocate(50 * MIB)  # 35 MiB are free at the end, and grow by a page
    assert (four.address, a.reserved) == (45 * MIB, 102 * MIB)
    a.free(four)
    a.free(two)
    a.empty_cache()
    assert a.reserved == 2 * MIB


def test_expandable_segments_take_the_room_before_unmapped_pages():
    """At the capacity the memory of free pages is given back, and mapped where it is needed."""
    a = allocator("expandable_segments:True", capacity=100 * MIB)
    one, two = a.allocate(20 * MIB), a.allocate(60 * MIB)
    a.free(one)
    three = a.allocate(40 * MIB)  # the GPU has 20 MiB: the first 20 are unmapped, and two pages mapped at the end
    assert (three.address, a.reserved, a.retries) == (80 * MIB, 100 * MIB, 1)
    a.free(three)
    assert a.allocate(38 * MIB).address == 80 * MIB
    a.free(two)
    assert a.allocate(60 * MIB).address == 20 * MIB
    with pytest.raises(OutOfMemory):  # the 2 MiB that are free are no whole page, and can't be given back
        a.allocate(3 * MIB)


def test_max_split_size_keeps_large_blocks_whole():
    a = allocator("max_split_size_mb:32", capacity=200 * MIB)
    big = a.allocate(64 * MIB)
    a.free(big)
    assert a.allocate(20 * MIB).address == 64 * MIB  # below the limit: not of a block above it
    again = a.allocate(50 * MIB)  # 14 MiB less than the block: taken whole
    assert (again.address, again.size) == (0, 64 * MIB)
    a.free(again)
    assert a.allocate(40 * MIB).address == 84 * MIB  # 24 MiB less: not
    # 124 are reserved; for 100 more an unused segment of at least 100 is looked for, then smaller ones together
    assert a.allocate(100 * MIB).size == 100 * MIB and a.reserved == 160 * MIB and a.retries == 1


def test_max_split_size_releases_oversize_segments_first():
    a = allocator("max_split_size_mb:32", capacity=200 * MIB)
    blocks = [a.allocate(60 * MIB), a.allocate(50 * MIB), a.allocate(20 * MIB), a.allocate(20 * MIB)]
    for block in blocks:
        a.free(block)
    a.allocate(110 * MIB)  # 150 are reserved: the 60 and the 50 go, the 20s stay
    assert a.retries == 0 and a.reserved == 150 * MIB


def test_power_of_two_divisions():
    a = AllocatorSettings.parse("roundup_power2_divisions:4")
    assert [a.rounded(n) for n in (1, 1200, 2048, 3000, 9000)] == [512, 1536, 2048, 3072, 10240]
    assert a.rounded(5 * MIB + 1) == 6 * MIB and a.rounded(5 * MIB) == 5 * MIB
    by_size = AllocatorSettings.parse("roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]")
    assert by_size.roundup_power2_divisions == (8,) * 7 + (2, 4, 2, 4) + (1,) * 5
    assert by_size.rounded(33 * MIB) == 36 * MIB  # 32 MiB in 8 steps
    assert by_size.rounded(129 * MIB) == 192 * MIB  # 128 MiB in 2 steps
    assert by_size.rounded(3000 * MIB + 1) == 3000 * MIB + 512


def test_garbage_is_collected_above_the_threshold_where_the_process_has_a_share():
    text = "garbage_collection_threshold:0.4,per_process_memory_fraction:1.0"
    for conf, reserved in ((text, 170), (text.partition(",")[0], 230)):
        a = allocator(conf, capacity=250 * MIB)
        old, _, young = a.allocate(60 * MIB), a.allocate(40 * MIB), a.allocate(30 * MIB)
        a.free(old)
        a.free(young)
        a.free(a.allocate(30 * MIB))  # the young one again
        a.allocate(100 * MIB)  # 130 are reserved, 100 are the threshold: what was unused for longer goes, and suffices
        assert a.reserved == reserved * MIB and a.retries == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expandable_segment:True", "did you mean expandable_segments?"),
        ("expandable_segments:true", "neither True nor False"),
        ("expandable_segments", "is not OPTION:VALUE"),
        ("max_split_size_mb:10", "at least 20"),
        ("max_split_size_mb:-5", "not a whole number"),
        ("large_segment_size_mb:40,max_split_size_mb:20", "at least 40"),
        ("roundup_power2_divisions:3", "not a power of two"),
        ("roundup_power2_divisions:[256:1,512]", "not MIB:DIVISIONS"),
        ("roundup_power2_divisions:[0:1]", "not a power of two"),
        ("garbage_collection_threshold:1.5", "not a share between 0 and 1"),
        ("backend:cudaMallocAsync", "only backend:native"),
        ("max_split_size_mb:64,,", "is not OPTION:VALUE"),
        ("nonsense:1", "known are"),
    ],
)
def test_settings_that_are_none_are_refused(text, said):
    from dit_ds.errors import UserError

    with pytest.raises(UserError, match=f"(?s)^allocator settings: .*{said.replace('?', '[?]')}"):
        AllocatorSettings.parse(text)


@pytest.mark.parametrize("text", [*SETTINGS, "roundup_power2_divisions:[256:1,512:2,>:8]"])
def test_settings_are_written_as_they_are_read(text):
    parsed = AllocatorSettings.parse(text)
    assert AllocatorSettings.parse(str(parsed)) == parsed
    more = ",".join(filter(None, [text, " pinned_use_background_threads : True"]))
    assert AllocatorSettings.parse(more) == parsed


def test_pytorch_accepts_and_refuses_the_same_settings():
    """The CPU build reads the options that are not CUDA's alone."""
    import torch

    from dit_ds.errors import UserError

    def refuses(parse, text: str) -> bool:
        try:
            parse(text)
        except (RuntimeError, ValueError, UserError):
            return True
        return False

    texts = [t for t in SETTINGS if "fraction" not in t] + [
        "max_split_size_mb:10", "expandable_segments:Maybe", "roundup_power2_divisions:[256:1,512:2,>:3]",
        "garbage_collection_threshold:1.5", "garbage_collection_threshold:0", "large_segment_size_mb:1",
        "large_segment_size_mb:40,max_split_size_mb:20", "roundup_power2_divisions:5", "roundup_power2_divisions:[3:1]",
        "max_non_split_rounding_mb:10",
    ]  # fmt: skip
    try:
        for text in texts:
            assert refuses(torch._C._accelerator_setAllocatorSettings, text) == refuses(
                AllocatorSettings.parse, text
            ), text
    finally:
        torch._C._accelerator_setAllocatorSettings("")


def random_program(seed: int, steps: int, streams: int) -> list[tuple[str, int, int]]:
    """(what, key, bytes or stream) of a program that allocates and frees blocks of all kinds of sizes."""
    rng, live, program = random.Random(seed), [], []
    for key in range(steps):
        if live and rng.random() < 0.48:
            program.append(("free", live.pop(rng.randrange(len(live))), 0))
        else:
            size = rng.choice([rng.randint(1, 5000), rng.randint(1, 2 * MIB), rng.randint(1, 30 * MIB),
                               2**rng.randint(9, 25)])  # fmt: skip
            program.append(("allocate", key, size * streams + rng.randrange(streams)))
            live.append(key)
        if rng.random() < 0.01:
            program.append(("empty", 0, 0))
    return program


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_addresses_are_those_of_a_second_model(seed, streams):
    reference = ReferenceAllocator()
    a = CachingAllocator(AllocatorSettings(), driver=lambda size, expandable: reference.segments_made.pop(0))
    reference.segments_made = []
    theirs, ours = {}, {}
    for what, key, packed in random_program(seed, 150, streams):
        if what == "allocate":
            size, stream = divmod(packed, streams)
            before = len(reference.events)
            theirs[key] = reference.allocate(size, stream)
            reference.segments_made += [e["addr"] for e in reference.events[before:] if e["action"] == "segment_alloc"]
            ours[key] = a.allocate(size, stream)
            assert ours[key].address == theirs[key] and not reference.segments_made
        elif what == "free":
            reference.free(theirs.pop(key))
            a.free(ours.pop(key))
        else:
            reference.empty_cache()
            a.empty_cache()
    assert a.peak_reserved == reference.peak_reserved
    assert [(b.address, b.size) for b in a.blocks()] == sorted((b["address"], b["size"]) for b in reference.blocks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SETTINGS), st.sampled_from([None, 150 * MIB]))
def test_blocks_never_overlap_and_sums_are_right(seed, text, capacity):
    a, live, rng = allocator(text, capacity), {}, random.Random(seed)
    waiting = []
    for what, key, packed in random_program(seed, 120, 2):
        try:
            if what == "allocate":
                live[key] = a.allocate(*divmod(packed, 2), pool=rng.choice([DEFAULT_POOL, DEFAULT_POOL, (0, 1)]))
            elif what == "free" and key in live:
                block = live.pop(key)
                a.free(block, waits=rng.random() < 0.2)
                waiting += [block] if block.waiting else []
            elif what == "empty":
                a.empty_cache()
        except OutOfMemory:
            assert a.reserved <= a.capacity
        if waiting and rng.random() < 0.3:
            a.complete(waiting.pop(0))
        check(a, live)
    for block in [*live.values()]:
        a.free(block)
    a.empty_cache()
    assert a.allocated == 0
    assert all(b.pool.owner != DEFAULT_POOL or b.expandable for b in a.blocks())


def check(a: CachingAllocator, live: dict) -> None:
    """What always holds of an allocator's blocks, lists and sums."""
    mapped = allocated = 0
    listed = {id(b) for pool in a._pools.values() for b in pool.blocks()}
    for address, block in a.segments.items():
        assert block.address == address and block.prev is None
        while block is not None:
            assert block.size > 0
            mapped += block.size * block.mapped
            allocated += block.size * block.allocated
            assert (id(block) in listed) == (block.usable and block.mapped)
            behind = block.next
            if behind is not None:
                assert behind.prev is block and behind.address == block.end
                assert not (block.usable and behind.usable and block.mapped == behind.mapped)  # or they would be one
            block = behind
    assert mapped == a.reserved <= min(a.peak_reserved, a.capacity)
    assert allocated == a.allocated == sum(b.size for b in live.values())
    for block in live.values():
        assert block.allocated and block.mapped and block.size >= block.requested
