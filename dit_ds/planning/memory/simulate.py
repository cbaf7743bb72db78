"""What the caching allocator would do with a program's requests, under any settings and on any GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dit_ds.errors import UserError
from dit_ds.planning.memory.allocations import ALLOCATE, COMPLETE, EMPTY_CACHE, FREE, FREE_LATER, Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.blocks import SMALL_SEGMENT, Block
from dit_ds.planning.memory.caching_allocator import CachingAllocator, OutOfMemory

_STEP = SMALL_SEGMENT  # bytes: capacities are looked for in these steps, of which all segments are


@dataclass
class Simulated:
    """What an allocator would have done. Sizes are bytes.

    Attributes:
        fits: all requests were served.
        peak_at: number of the request at which the most was reserved for the first time.
        failed_at: number of the request that failed, or None.
        error: why.
    """

    settings: AllocatorSettings
    capacity: int | None
    fits: bool = True
    peak_reserved: int = 0
    peak_allocated: int = 0
    reserved_when_most_allocated: int = 0
    peak_at: int = 0
    failed_at: int | None = None
    error: OutOfMemory | None = None
    retries: int = 0


def simulate(requests: list[Request], settings: AllocatorSettings, capacity: int | None = None,
             until: int | None = None) -> tuple[Simulated, CachingAllocator]:  # fmt: skip
    """Serve the requests.

    Args:
        until: stop after the request of this number.
    Returns:
        The result, and the allocator in its last state.
    """
    allocator, result = CachingAllocator(settings, capacity), Simulated(settings, capacity)
    live: dict[int, Block] = {}
    allocate, free, complete = allocator.allocate, allocator.free, allocator.complete
    most = 0
    try:
        for i, (kind, key, size, stream, pool) in enumerate(requests if until is None else requests[: until + 1]):
            if kind == ALLOCATE:
                block = live[key] = allocate(size, stream, pool)
                block.key = key
                if allocator.reserved > most:
                    most, result.peak_at = allocator.reserved, i
            elif kind == FREE:
                free(live.pop(key))
            elif kind == FREE_LATER:
                free(live[key], True)
            elif kind == COMPLETE:
                complete(live.pop(key))
            elif kind == EMPTY_CACHE:
                allocator.empty_cache()
            else:
                free(allocate(size, stream, pool))
    except OutOfMemory as e:
        result.fits, result.failed_at, result.error = False, i, e
    result.peak_reserved, result.peak_allocated = allocator.peak_reserved, allocator.peak_allocated
    result.retries = allocator.retries
    return result, allocator


def least_capacity(requests: list[Request], settings: AllocatorSettings, known: Simulated | None = None,
                   share: float = 0.0) -> int:  # fmt: skip
    """The smallest capacity, in steps of 2 MiB, with which all requests are served.

    Found by bisection: it fits there and not 2 MiB below. (Which of its segments an allocator can release depends on what
    it did before, so that yet smaller capacities may happen to fit.)

    Args:
        known: `simulate`'s result without a capacity, if there is one.
        share: how far above the smallest the result may be, as a share of it.
    """
    unlimited = known or simulate(requests, settings)[0]
    low, high = unlimited.peak_allocated // _STEP - 1, -(-unlimited.peak_reserved // _STEP)
    while high - low > max(1, share * high):
        middle = (low + high) // 2
        if simulate(requests, settings, middle * _STEP)[0].fits:
            high = middle
        else:
            low = middle
    return high * _STEP


# settings that users are advised to try, from the most to the least usual
ALTERNATIVES = (
    "", "expandable_segments:True", "max_split_size_mb:128", "max_split_size_mb:512", "roundup_power2_divisions:8",
    "roundup_power2_divisions:4",
)  # fmt: skip


def ranked(requests: list[Request], others: tuple[AllocatorSettings, ...] = ()) -> list[Simulated]:
    """The alternatives without a limit, by what they reserve, the least first."""
    settings = dict.fromkeys((*others, *map(AllocatorSettings.parse, ALTERNATIVES)))
    return sorted((simulate(requests, s)[0] for s in settings), key=lambda r: r.peak_reserved)


def check_capacity(requests: list[Request], settings: AllocatorSettings, capacity: int) -> None:
    """Refuse a capacity that has no room for the first segment.

    Raises:
        UserError: it has none.
    """
    first = next((r for r in requests if r.kind == ALLOCATE), None)
    if first is not None:
        segment = CachingAllocator(settings).segment_size(settings.rounded(first.size))
        if capacity < segment:
            raise UserError(f"--capacity {capacity} bytes is less than the first segment, of {segment} bytes")
