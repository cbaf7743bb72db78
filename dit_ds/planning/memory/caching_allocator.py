"""A model of PyTorch's caching allocator for CUDA: which addresses it gives, and what it reserves of the GPU.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13). Requests of up to 1 MiB come from the small pool,
others from the large one. Each stream, and each private pool (CUDA graphs, `torch.cuda.MemPool`), has pools of its own.
The smallest free block that is large enough serves a request, of equal ones the one with the lowest address; what is left
of it is split off. Where none is large enough, a new segment comes from the driver; where the driver has no more, unused
segments are released and the request is tried again.

What is not modelled: a CUDA graph's capture holds back the blocks that other streams used, and the driver's own choice of
addresses; new segments lie one behind the other unless `driver` says where.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable

from dit_ds.planning.memory.allocator_settings import MIB, MIN_BLOCK
from dit_ds.planning.memory.blocks import DEFAULT_POOL, SMALL, SMALL_SEGMENT, Block, Pool
from dit_ds.planning.memory.expandable_segments import ExpandableSegments, smallest_grown

_LARGE_REQUEST = 10 * MIB  # from here on a request has a segment of its own size
_SEGMENT_STEP = 2 * MIB


class OutOfMemory(Exception):
    """The driver has no more memory, and nothing is left to release.

    Attributes:
        requested: bytes that were asked for.
        segment: bytes that the driver was asked for.
        allocator: in the state in which it failed.
    """

    def __init__(self, requested: int, segment: int, allocator: CachingAllocator):
        super().__init__(f"CUDA out of memory. Tried to allocate {_words(segment)}")
        self.requested, self.segment, self.allocator = requested, segment, allocator

    def as_torch_words_it(self, total: int, context: int = 0) -> str:
        """PyTorch's message.

        Args:
            total: bytes of the GPU.
            context: bytes that others than the allocator hold: CUDA's context, libraries, NCCL.
        """
        a = self.allocator
        free = max(0, total - a.reserved - context)
        return (
            f"CUDA out of memory. Tried to allocate {_words(self.segment)}. GPU 0 has a total capacity of {_words(total)} "
            f"of which {_words(free)} is free. Including non-PyTorch memory, this process has "
            f"{_words(a.reserved + context)} memory in use. Of the allocated memory {_words(a.allocated)} is allocated by "
            f"PyTorch, and {_words(a.reserved - a.allocated)} is reserved by PyTorch but unallocated."
        )


def _words(size: int) -> str:
    """A size as PyTorch's messages give it."""
    for limit, unit in ((1 << 10, "bytes"), (1 << 20, "KiB"), (1 << 30, "MiB")):
        if size <= limit:
            return f"{size} bytes" if unit == "bytes" else f"{size / (limit >> 10):.2f} {unit}"
    return f"{size / (1 << 30):.2f} GiB"


class CachingAllocator(ExpandableSegments):
    """The allocator of one GPU, see `Segments` for its arguments and attributes."""

    # --- what a program does

    def allocate(self, requested: int, stream: int = 0, pool: Hashable = DEFAULT_POOL) -> Block:
        """Serve a request.

        Raises:
            OutOfMemory: the capacity is reached.
        """
        size = self.settings.rounded(requested)
        blocks = self.pool(size <= SMALL, pool)
        block = self._from_cache(blocks, size, stream) or self._from_driver(blocks, size, stream, requested)
        left = block.size - size
        if left >= MIN_BLOCK if blocks.small or self.settings.expandable_segments else (
            left > SMALL and size < self._max_split
        ):  # fmt: skip
            self._split(block, size)
        block.allocated, block.requested = True, requested
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block, waits: bool = False) -> None:
        """Take a block back.

        Args:
            waits: other streams, on which it was used (`record_stream`), have not passed yet: it becomes usable at
                `complete`.
        """
        block.allocated = False
        self.allocated -= block.size
        if waits:
            block.waiting = True
            self._waiting[block.address] = block
        else:
            self._cache(block)

    def complete(self, block: Block) -> None:
        """The other streams have passed: a block that waited becomes usable. Nothing if it is already."""
        if block.waiting:
            del self._waiting[block.address]
            block.waiting = False
            self._cache(block)

    def empty_cache(self) -> None:
        """Release all unused segments (`torch.cuda.empty_cache`), when all streams have passed."""
        for block in list(self._waiting.values()):
            self.complete(block)
        for pool in [p for p in self._pools.values() if p.owner == DEFAULT_POOL]:
            for block in pool.blocks():
                if block.expandable:
                    self._unmap(block)
                elif block.whole:
                    self.release(block)

    def release(self, block: Block) -> None:
        """Give an unused segment back to the driver."""
        block.pool.remove(block)
        del self.segments[block.address]
        self.reserved -= block.size

    def release_at(self, address: int, size: int) -> bool:
        """Release an unused segment, or pages of an expandable one; False if they are in use."""
        block = self.segments.get(address)
        if block is not None and block.whole and block.usable and block.mapped and block.size == size:
            self.release(block)
            return True
        for found in self.blocks():
            if found.expandable and found.usable and found.address <= address and address + size <= found.end:
                self._unmap(found)
                return True
        return False

    def divide(self, segment: Block, held: list[tuple[int, int, bool]]) -> dict[int, Block]:
        """Add a segment as it was found, with the blocks that are held of it.

        Args:
            held: (address, requested bytes, waits for other streams) of each, by address.
        Returns:
            The blocks by address. Those that overlap, or reach beyond the segment, are left out.
        """
        pool, found = segment.pool, {}
        self.reserved += segment.size
        last = segment  # what is behind the last block that is held
        for i, (address, requested, waits) in enumerate(held):
            size = self.settings.rounded(requested)
            limit = held[i + 1][0] if i + 1 < len(held) else segment.end if last is segment else last.end
            if address < last.address or address + size > limit:
                continue
            if address > last.address:
                self._split(last, address - last.address, rest_is_free=False)
                pool.add(last)
                last = last.next  # type: ignore[assignment]
            left = limit - address - size
            tail = left if not pool.small and left <= SMALL and not self.settings.expandable_segments else 0
            block = last
            if size + tail < block.size:
                self._split(block, size + tail, rest_is_free=False)
                last = block.next  # type: ignore[assignment]
            else:
                last = None  # type: ignore[assignment]
            found[address] = block
            block.requested, block.allocated, block.waiting = requested, not waits, waits
            if waits:
                self._waiting[address] = block
            else:
                self.allocated += block.size
            if last is None:
                break
        if last is not None:
            pool.add(last)
        return found

    # --- where a block comes from

    def _from_cache(self, pool: Pool, size: int, stream: int) -> Block | None:
        """The smallest free block that is large enough, taken out of the pool; of equal ones the lowest."""
        pool.searches += 1
        free = pool.free.get(stream)
        if not free:
            return None
        i = bisect_left(free, (size,))
        if i == len(free):
            return None
        found, _, block = free[i]
        if block.expandable:
            i = smallest_grown(free, i)
            found, _, block = free[i]
        if found >= self._max_split if size < self._max_split else found >= size + self.settings.max_non_split_rounding:
            return None
        del free[i]
        return block

    def _from_driver(self, pool: Pool, size: int, stream: int, requested: int) -> Block:
        """A block of a new segment, or of a grown one."""
        if self._collects:
            self._collect_garbage()
        block = self._new(pool, size, stream)
        if block is None and self._release_oversize(pool, size, stream):
            block = self._new(pool, size, stream)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._new(pool, size, stream)
        if block is None:
            raise OutOfMemory(requested, self.segment_size(size), self)
        return block

    def segment_size(self, size: int) -> int:
        """Bytes that the driver is asked for where a request of a (rounded) size finds no free block."""
        if size <= SMALL:
            return SMALL_SEGMENT
        if size < _LARGE_REQUEST:
            return self.settings.large_segment_size
        return -(-size // _SEGMENT_STEP) * _SEGMENT_STEP

    def _new(self, pool: Pool, size: int, stream: int) -> Block | None:
        if self.settings.expandable_segments and pool.owner == DEFAULT_POOL:
            return self._grown(pool, size, stream)
        segment = self.segment_size(size)
        if not self._reserve(segment):
            return None
        block = Block(self._driver(segment, False), segment, stream, pool)
        self.segments[block.address] = block
        self.grown.append((block.address, segment))
        return block

    # --- releasing segments before the last resort

    def _release_oversize(self, pool: Pool, size: int, stream: int) -> bool:
        """Release a segment that is large enough, or several from the largest on; only where max_split_size is set."""
        if self.settings.max_split_size is None:
            return False
        least = max(size, self._max_split)
        free = pool.free.get(stream, [])
        i = bisect_left(free, (least,))
        if i < len(free) and not free[i][2].expandable:
            self.release(free[i][2])
            return True
        released = 0
        for found, _, block in reversed(free[:i]):
            if released >= least or found < self._max_split:
                break
            if not block.expandable:
                self.release(block)
                released += found
        return released >= least

    def _collect_garbage(self) -> None:
        """Release segments that were unused for longer than the others, from the threshold on."""
        above = self.reserved - int(self.settings.garbage_collection_threshold * self.capacity)
        pool = self.pool(small=False)
        unused = [b for b in pool.blocks() if b.whole and not b.expandable]
        while above > 0 and unused:
            age = sum(pool.searches - b.born for b in unused) / len(unused)
            old = [b for b in unused if pool.searches - b.born >= age]
            for block in old:
                self.release(block)
                above -= block.size
            unused = [b for b in unused if b not in old]
