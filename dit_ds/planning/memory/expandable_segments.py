"""Expandable segments: a reserved range of addresses for each pool and stream, with memory mapped page by page.

See `caching_allocator`; PyTorch's option is `expandable_segments:True`.
"""

from __future__ import annotations

from dit_ds.planning.memory.blocks import SMALL_SEGMENT, Block, Pool, Segments


class ExpandableSegments(Segments):
    """Segments that can grow."""

    def _page(self, pool: Pool) -> int:
        return SMALL_SEGMENT if pool.small else self.settings.large_segment_size

    def _grown(self, pool: Pool, size: int, stream: int) -> Block | None:
        """A block of the lowest addresses with room, memory mapped as far as it is missing."""
        block = self._room(pool, size, stream)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            behind = block.next
            assert behind is not None  # `_room` counted it
            if not self._map(behind, min(size - block.size, behind.size)):
                return None
            block = behind  # which has taken the blocks before it in
        pool.remove(block)
        return block

    def _room(self, pool: Pool, size: int, stream: int) -> Block:
        """The first of free and unmapped blocks side by side that have the size together; at worst of a new range."""
        for _, start in pool.unmapped.get(stream, ()):
            if start.prev is not None and start.prev.usable:
                start = start.prev
            room, block = 0, start
            while block is not None and block.usable and room < size:
                room, block = room + block.size, block.next  # type: ignore[assignment]
            if room >= size:
                return start
        range_size = max(2 * size, min(self.capacity + self.capacity // 8, 1 << 44))  # PyTorch: 9/8 of the GPU
        page = self._page(pool)
        range_size = -(-range_size // page) * page
        return self.reserve_range(self._driver(range_size, True), range_size, stream, pool)

    def reserve_range(self, address: int, size: int, stream: int, pool: Pool) -> Block:
        """Reserve addresses for an expandable segment, without memory yet."""
        block = Block(address, size, stream, pool, expandable=True)
        block.mapped = False
        self.segments[address] = block
        pool.add_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Map memory at the beginning of an unmapped block, in whole pages; it becomes free and takes neighbours in."""
        page = self._page(block.pool)
        size = -(-size // page) * page
        if not self._reserve(size):
            return False
        self.grown.append((block.address, size))
        block.pool.remove_unmapped(block)
        block.mapped = True
        if size < block.size:
            rest = Block(block.address + size, block.size - size, block.stream, block.pool, expandable=True)
            rest.mapped = False
            block.size = size
            self._insert_behind(block, rest)
            block.pool.add_unmapped(rest)
        self._cache(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the memory of the whole pages in a free block."""
        page, pool = self._page(block.pool), block.pool
        base = self._range_start(block)
        begin = base - (base - block.address) // page * page
        end = base + (block.end - base) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            before = Block(block.address, begin - block.address, block.stream, pool, expandable=True)
            before.prev, before.next = block.prev, block
            if block.prev is None:
                self.segments[before.address] = before
            else:
                block.prev.next = before
            block.prev = before
            pool.add(before)
        if end < block.end:
            behind = Block(end, block.end - end, block.stream, pool, expandable=True)
            self._insert_behind(block, behind)
            pool.add(behind)
        block.address, block.size, block.mapped = begin, end - begin, False
        self.reserved -= block.size
        self._merge(block)
        if block.whole:
            del self.segments[block.address]
        else:
            pool.add_unmapped(block)

    @staticmethod
    def _range_start(block: Block) -> int:
        while block.prev is not None:
            block = block.prev
        return block.address

    def join(self, ranges: list[Block], end: int) -> None:
        """Make one reserved range of the first blocks of parts that have memory, with addresses up to `end`.

        Args:
            ranges: by address, each already added by `divide`.
        """
        last: Block | None = None
        for first, limit in zip(ranges, [r.address for r in ranges[1:]] + [end]):
            if last is not None:
                del self.segments[first.address]
                last.next, first.prev = first, last
            last = first
            while last.next is not None:
                last = last.next
            if last.end < limit:
                gap = Block(last.end, limit - last.end, first.stream, first.pool, expandable=True)
                gap.mapped = False
                self._insert_behind(last, gap)
                gap.pool.add_unmapped(gap)
                last = gap


def smallest_grown(free: list[tuple[int, int, Block]], i: int) -> int:
    """Of the free blocks from `i` on the one to take, if a block counts with the room that it can grow into."""

    def room(block: Block) -> int:
        behind = block.next
        return block.size + (behind.size if behind is not None and not behind.mapped else 0)

    while i + 1 < len(free) and free[i][2].expandable and room(free[i + 1][2]) < room(free[i][2]):
        i += 1
    return i
