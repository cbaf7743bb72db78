"""The global batch, split over micro-batches, accumulation steps and ranks."""

from __future__ import annotations


def _what_divides(batch: int, micro: int, world_size: int) -> str:
    message = f"train.batch_size {batch} is not a multiple of micro-batch {micro} x {world_size} ranks: "
    if batch % world_size:
        unit = micro * world_size if micro * world_size <= batch else world_size
        nearest = max(1, round(batch / unit)) * unit
        return message + f"set train.batch_size {nearest}, or use {_divisors(batch)} ranks"
    return (
        message
        + f"micro-batches that divide are {_divisors(batch // world_size)} (--deepspeed.override.train_micro_batch_size_per_gpu)"
    )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _dividing(batch: int, ranks: int, most: int) -> int:
    each = batch // ranks
    return next(m for m in range(min(most, each), 0, -1) if each % m == 0)


def split_batch(batch: int, ranks: int, micro_batch: int) -> tuple[int, int] | None:
    """(micro-batch, micro-batches a step) of a global batch, the largest that divides; None where the ranks don't."""
    if batch % ranks:
        return None
    each = batch // ranks
    micro = next(m for m in range(min(micro_batch, each), 0, -1) if each % m == 0)
    return micro, each // micro
