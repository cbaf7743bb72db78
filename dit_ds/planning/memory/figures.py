"""A run's memory in three figures, from what it asks of the GPU's allocator: allocated, least capacity, reserved.

What is allocated is what blocks hold, as `torch.cuda.max_memory_allocated` counts. Segments hold more, as blocks of other
sizes leave gaps (`max_memory_reserved`). Unused segments are given back before an allocation fails, so that a GPU of the
least capacity does.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from dit_ds.planning.memory.allocations import Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.caching_allocator import CachingAllocator
from dit_ds.planning.memory.simulate import least_capacity, simulate


@dataclass(frozen=True)
class Figures:
    """A run's first steps on one rank. Sizes are bytes.

    Attributes:
        allocated, least_capacity, reserved: see above.
        settings: of the allocator, as in PYTORCH_CUDA_ALLOC_CONF.
        pinned: free bytes in segments that can't be given back at the peak, by the site of the blocks that hold them; the
            largest first.
        others: what would be reserved with other settings, by their text.
    """

    allocated: int
    least_capacity: int
    reserved: int
    settings: str = ""
    pinned: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    @property
    def fragmentation(self) -> float:
        """Share of what is reserved that no block ever fills."""
        return 1 - self.allocated / max(1, self.reserved)


_OTHERS = ("", "expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:8")


def figures(
    requests: list[Request], sites: dict[int, str], settings: str, share: float = 0.0, compare: bool = False
) -> Figures:
    """The figures of a sequence of requests.

    Args:
        sites: where a block was allocated, by its key.
        settings: of the allocator.
        share: how far above the least capacity the result may be, as a share of it.
        compare: whether other settings are tried.
    """
    chosen = AllocatorSettings.parse(settings)
    found, _ = simulate(requests, chosen)
    others = {text: simulate(requests, AllocatorSettings.parse(text))[0].peak_reserved for text in _OTHERS
              if AllocatorSettings.parse(text) != chosen} if compare else {}  # fmt: skip
    at_peak = simulate(requests, chosen, until=found.peak_at)[1]
    return Figures(
        allocated=found.peak_allocated,
        least_capacity=least_capacity(requests, chosen, found, share),
        reserved=found.peak_reserved,
        settings=str(chosen),
        pinned=pinned(at_peak, sites),
        others=others,
    )


def pinned(allocator: CachingAllocator, sites: dict[int, str], most: int = 5) -> dict[str, int]:
    """Free bytes in segments that hold blocks, by the site of the largest block in the segment.

    Of an expandable segment they count to the next block behind, without which the pages could be given back.
    """
    sums: dict[str, int] = defaultdict(int)
    for first in allocator.segments.values():
        blocks = [b for b in first.chain() if b.mapped]
        held = [b for b in blocks if not b.usable]
        for block in blocks:
            if block.usable and held:
                behind = (b for b in held if b.address > block.address)
                holder = next(behind, held[-1]) if first.expandable else max(held, key=lambda b: b.size)
                sums[sites.get(holder.key, "")] += block.size
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:most])
