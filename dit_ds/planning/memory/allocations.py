"""What a program asks of the caching allocator, without what the allocator made of it: from a record or from a prediction."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from dit_ds.planning.memory.blocks import DEFAULT_POOL


class Request(NamedTuple):
    """What a program does to the allocator.

    Attributes:
        kind: one of `ALLOCATE`, `FREE` (usable at once), `FREE_LATER`, `COMPLETE`, `EMPTY_CACHE`, `FAILED`: an allocation
            for which the recorded GPU had no memory.
        key: of the block.
        size: bytes asked for.
    """

    kind: int
    key: int
    size: int = 0
    stream: int = 0
    pool: Hashable = DEFAULT_POOL


ALLOCATE, FREE, FREE_LATER, COMPLETE, EMPTY_CACHE, FAILED = range(6)
