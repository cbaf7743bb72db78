"""What a recorded program asked of the allocator."""

from __future__ import annotations

from bisect import bisect_right

from dit_ds.planning.memory.allocations import ALLOCATE, COMPLETE, EMPTY_CACHE, FAILED, FREE, FREE_LATER, Request
from dit_ds.planning.memory.blocks import DEFAULT_POOL
from dit_ds.planning.memory.recorded.snapshot import Event, Start, Trace, start_of


def requests_of(trace: Trace, start: Start | None = None) -> tuple[list[Request], list[int]]:
    """What the program asked for and gave back, and the number of each request's event; -1 for what was there before.

    Recorded releases of segments count as `empty_cache` where the frames say so, or where no segment was made right after
    them; others are the allocator's own, which does as it must.
    """
    start = start or start_of(trace)
    beginnings = [s.address for s in start.segments]
    requests, keys, following = [], {}, 0
    for key, (address, (size, waits, _)) in enumerate(sorted(start.blocks.items())):
        i = bisect_right(beginnings, address) - 1
        stream, pool = (start.segments[i].stream, start.segments[i].pool) if i >= 0 else (0, DEFAULT_POOL)
        requests.append(Request(ALLOCATE, key, size, stream, pool))
        if waits:
            requests.append(Request(FREE_LATER, key))
        keys[address], following = key, key + 1
    numbers = [-1] * len(requests)
    events = trace.events
    for i, event in enumerate(events):
        made: Request | None = None
        if event.action == "alloc":
            keys[event.address] = following
            made = Request(ALLOCATE, following, event.size, event.stream, event.pool)
            following += 1
        elif event.action == "free_requested" and event.address in keys:
            at_once = i + 1 < len(events) and events[i + 1][:2] == ("free_completed", event.address)
            made = Request(FREE if at_once else FREE_LATER, keys[event.address])
            if at_once:
                del keys[event.address]
        elif event.action == "free_completed" and event.address in keys:
            made = Request(COMPLETE, keys.pop(event.address))
        elif event.action == "oom":
            made = Request(FAILED, -1, event.size, event.stream, event.pool)
        elif event.action in ("segment_free", "segment_unmap") and _by_user(events, i):
            made = Request(EMPTY_CACHE, -1)
        if made is not None:
            requests.append(made)
            numbers.append(i)
    return requests, numbers


def _by_user(events: list[Event], i: int) -> bool:
    """Whether a released segment is the last of those that a call of `empty_cache` released."""
    released = ("segment_free", "segment_unmap")
    following = events[i + 1].action if i + 1 < len(events) else ""
    if following in released:
        return False
    return events[i].by_user or following not in ("segment_alloc", "segment_map", "oom")
