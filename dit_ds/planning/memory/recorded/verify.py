"""Recorded histories followed by the model of the caching allocator, event by event: is it what the GPU did?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass, field

from dit_ds.planning.memory.blocks import SMALL_SEGMENT, Block
from dit_ds.planning.memory.caching_allocator import CachingAllocator
from dit_ds.planning.memory.recorded.snapshot import Start, Trace, start_of

_RESERVED = 1 << 44  # bytes of addresses that an expandable segment may grow to: more than any GPU has


@dataclass
class Verified:
    """How far the model foresees a record.

    Attributes:
        allocations, at_recorded_address: how many, and how many of them at the very address.
        segments, segments_foreseen: new or grown segments, and those that the model asked for then and there.
        recorded_at_start, recorded_peak_reserved: bytes of the segments.
        peak_reserved, peak_allocated: bytes, of the model.
        contradictions: what the record can't be, if it is whole.
    """

    allocations: int = 0
    at_recorded_address: int = 0
    segments: int = 0
    segments_foreseen: int = 0
    recorded_at_start: int = 0
    recorded_peak_reserved: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    contradictions: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether all is as recorded."""
        return (
            self.at_recorded_address == self.allocations
            and self.segments_foreseen == self.segments
            and self.peak_reserved == self.recorded_peak_reserved
            and not self.contradictions
        )


def restore(allocator: CachingAllocator, trace: Trace, start: Start) -> dict[int, Block]:
    """Give a fresh allocator the segments and blocks that there were; returns the blocks by address.

    What a block has beyond what was asked for isn't recorded: it ends where it must, as the rest was too small to split.
    """
    addresses = sorted(start.blocks)
    found: dict[int, Block] = {}
    ranges: dict[tuple[int, bool, Hashable], list[Block]] = {}
    for segment in start.segments:
        pool = allocator.pool(segment.small, segment.pool)
        inside = addresses[bisect_left(addresses, segment.address) : bisect_left(addresses, segment.end)]
        first = Block(segment.address, segment.size, segment.stream, pool, segment.expandable)
        allocator.segments[segment.address] = first
        found |= allocator.divide(first, [(a, *start.blocks[a][:2]) for a in inside])
        if segment.expandable:
            key = segment.stream, segment.small, segment.pool
            ranges.setdefault(key, []).append(allocator.segments[segment.address])
    for (stream, small, owner), parts in ranges.items():
        mapped = [e.address for e in trace.events if e.action == "segment_map" and (e.stream, e.pool) == (stream, owner)
                  and (e.size == SMALL_SEGMENT) == small]  # fmt: skip
        allocator.join(parts, max(parts[-1].address, *mapped, 0) + _RESERVED)
    allocator.peak_reserved, allocator.peak_allocated = allocator.reserved, allocator.allocated
    return found


class _Driver:
    """Gives new segments the addresses that were recorded; others lie far above."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, int]] = []  # (address, size) since the last allocation
        self._next = 1 << 56

    def __call__(self, size: int, expandable: bool) -> int:
        for i, (address, recorded) in enumerate(self.recorded):
            if recorded == size or expandable:
                if not expandable:  # of a range, this is the first part that has memory
                    del self.recorded[i]
                return address
        address, self._next = self._next, self._next + size
        return address


def verify(trace: Trace, start: Start | None = None) -> Verified:
    """Follow a record under its own settings."""
    start = start or start_of(trace)
    driver, found = _Driver(), Verified(contradictions=list(start.contradictions))
    allocator = CachingAllocator(trace.settings, driver=driver)
    live = restore(allocator, trace, start)
    missing = set(start.blocks) - set(live)
    found.contradictions += [f"{a:#x} was allocated, but lies in no segment" for a in sorted(missing)]
    reserved = found.recorded_at_start = found.recorded_peak_reserved = allocator.reserved
    grown: list[tuple[int, int]] = []  # as recorded since the last allocation
    for event in trace.events:
        action = event.action
        if action == "alloc":
            found.allocations += 1
            block = allocator.allocate(event.size, event.stream, event.pool)
            found.at_recorded_address += block.address == event.address
            live[event.address] = block
            found.segments_foreseen += len(set(grown) & set(allocator.grown))
            for made in (grown, driver.recorded, allocator.grown):
                made.clear()
        elif action == "free_requested":
            if event.address in live:
                allocator.free(live[event.address], waits=True)
        elif action == "free_completed":
            if event.address in live:
                allocator.complete(live.pop(event.address))
        elif action in ("segment_alloc", "segment_map"):
            found.segments += 1
            grown.append((event.address, event.size))
            driver.recorded.append((event.address, event.size))
            reserved += event.size
            found.recorded_peak_reserved = max(found.recorded_peak_reserved, reserved)
        elif action in ("segment_free", "segment_unmap"):
            reserved -= event.size
            if not allocator.release_at(event.address, event.size):
                found.contradictions.append(f"segment {event.address:#x} was released, but is in use")
    found.peak_reserved, found.peak_allocated = allocator.peak_reserved, allocator.peak_allocated
    return found
