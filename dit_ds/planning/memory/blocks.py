"""Blocks of memory, the pools of free ones, and the segments that they lie in, see `caching_allocator`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator

from dit_ds.planning.memory.allocator_settings import MIB, AllocatorSettings

SMALL = MIB  # bytes: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB
DEFAULT_POOL: Hashable = (0, 0)
UNLIMITED = 1 << 62


class Block:
    """A part of a segment: allocated, waiting for other streams, free, or (of expandable segments) without memory.

    Attributes:
        address, size: bytes.
        requested: bytes asked for.
        key: for the program's use.
        allocated: by the program.
        waiting: freed by the program, but used on another stream that has not passed yet.
        mapped: there is memory behind the addresses.
        expandable: of an expandable segment.
    """

    __slots__ = ("address", "allocated", "born", "expandable", "key", "mapped", "next", "pool", "prev", "requested", "size",
                 "stream", "waiting")  # fmt: skip

    def __init__(self, address: int, size: int, stream: int, pool: Pool, expandable: bool = False):
        self.address, self.size, self.stream, self.pool, self.expandable = address, size, stream, pool, expandable
        self.requested = self.born = self.key = 0
        self.allocated = self.waiting = False
        self.mapped = True
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def end(self) -> int:
        return self.address + self.size

    def chain(self) -> Iterator[Block]:
        """This block and those behind it in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next

    @property
    def whole(self) -> bool:
        """Whether it is its segment's only block."""
        return self.prev is None and self.next is None

    @property
    def usable(self) -> bool:
        """Whether it may be allocated or merged."""
        return not (self.allocated or self.waiting)


class Pool:
    """The small or the large pool of the process, or of a private pool.

    Attributes:
        free: free blocks by stream, as (size, address, block), sorted.
        unmapped: by stream, as (address, block), sorted.
        searches: how often a free block was looked for; a block's age counts them.
    """

    def __init__(self, small: bool, owner: Hashable):
        self.small, self.owner, self.searches = small, owner, 0
        self.free: dict[int, list[tuple[int, int, Block]]] = {}
        self.unmapped: dict[int, list[tuple[int, Block]]] = {}

    def add(self, block: Block) -> None:
        """Add a free block."""
        block.born = self.searches
        insort(self.free.setdefault(block.stream, []), (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Remove a free block."""
        free = self.free[block.stream]
        del free[bisect_left(free, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        """Add a block without memory."""
        insort(self.unmapped.setdefault(block.stream, []), (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Remove a block without memory."""
        unmapped = self.unmapped[block.stream]
        del unmapped[bisect_left(unmapped, (block.address,))]

    def blocks(self) -> list[Block]:
        """All free blocks."""
        return [block for free in self.free.values() for _, _, block in free]


class Segments:
    """The segments of one GPU, their blocks, and what they sum up to. All sizes are bytes.

    Args:
        settings: of PYTORCH_CUDA_ALLOC_CONF.
        capacity: what the process can get from the driver for segments; None for no limit.
        driver: the address of a new segment, by its size and whether it is expandable; None for one behind the other.
    Attributes:
        allocated: in blocks that the program holds; `peak_allocated` at most (`torch.cuda.max_memory_allocated`).
        reserved: in segments; `peak_reserved` at most (`torch.cuda.max_memory_reserved`).
        retries: how often unused segments were released because the driver had no more.
        segments: the first block of every segment by its address; of expandable ones, of every reserved range.
        grown: (address, bytes) of each segment that was made and each range of pages that was mapped, in their order.
    """

    def __init__(self, settings: AllocatorSettings, capacity: int | None = None,
                 driver: Callable[[int, bool], int] | None = None):  # fmt: skip
        self.settings, self.capacity = settings, UNLIMITED if capacity is None else capacity
        if settings.memory_fraction is not None and capacity is not None:
            self.capacity = int(capacity * settings.memory_fraction)
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.retries = 0
        self.segments: dict[int, Block] = {}
        self.grown: list[tuple[int, int]] = []
        self._driver = driver or self._behind_the_last
        self._end = 0  # of the addresses given so far
        self._pools: dict[tuple[Hashable, bool], Pool] = {}
        self._waiting: dict[int, Block] = {}
        self._max_split = UNLIMITED if settings.max_split_size is None else settings.max_split_size
        self._collects = settings.garbage_collection_threshold > 0 and settings.memory_fraction is not None

    def pool(self, small: bool, owner: Hashable = DEFAULT_POOL) -> Pool:
        """A pool, made at its first use."""
        key = (owner, small)
        if key not in self._pools:
            self._pools[key] = Pool(small, owner)
        return self._pools[key]

    def blocks(self) -> Iterator[Block]:
        """All blocks that have memory, segment by segment, by address."""
        for address in sorted(self.segments):
            yield from (block for block in self.segments[address].chain() if block.mapped)

    def _behind_the_last(self, size: int, expandable: bool) -> int:
        address, self._end = self._end, self._end + size
        return address

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self.capacity:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def _split(self, block: Block, size: int, rest_is_free: bool = True) -> None:
        """Make the rest of a block one of its own behind it, free or not yet in any list."""
        rest = Block(block.address + size, block.size - size, block.stream, block.pool, block.expandable)
        block.size = size
        self._insert_behind(block, rest)
        if rest_is_free:
            block.pool.add(rest)

    @staticmethod
    def _insert_behind(block: Block, new: Block) -> None:
        new.prev, new.next = block, block.next
        if block.next is not None:
            block.next.prev = new
        block.next = new

    def _cache(self, block: Block) -> None:
        """Make a block free, one with its free neighbours."""
        self._merge(block)
        block.pool.add(block)

    def _merge(self, block: Block) -> None:
        """Unite a block, which is in no list, with neighbours that are free as it is (or without memory as it is)."""
        before, behind = block.prev, block.next
        if before is not None and before.usable and before.mapped == block.mapped:
            self._forget(before)
            if before.prev is None:
                self.segments[before.address] = block
            else:
                before.prev.next = block
            block.address, block.size, block.prev = before.address, before.size + block.size, before.prev
        if behind is not None and behind.usable and behind.mapped == block.mapped:
            self._forget(behind)
            block.size, block.next = block.size + behind.size, behind.next
            if behind.next is not None:
                behind.next.prev = block

    @staticmethod
    def _forget(block: Block) -> None:
        if block.mapped:
            block.pool.remove(block)
        else:
            block.pool.remove_unmapped(block)
