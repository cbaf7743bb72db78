"""A global batch, split into ranks, gradient accumulation steps and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from dit_ds.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """How the samples of an optimizer step are processed.

    Attributes:
        micro_batch: samples of a rank in one forward pass.
        accumulation: micro-batches of a rank in one optimizer step.
        ranks: data-parallel ranks.
    """

    micro_batch: int
    accumulation: int
    ranks: int

    @property
    def batch(self) -> int:
        """Samples of an optimizer step, of all ranks."""
        return self.micro_batch * self.accumulation * self.ranks


def exact_split(batch: int, ranks: int, micro_batch: int) -> BatchSplit:
    """The split with this micro-batch; where the ranks have fewer samples each, with those.

    Raises:
        UserError: the batch is not a multiple of micro-batch x ranks; the message names those that divide.
    """
    if micro_batch * ranks > batch and batch % ranks == 0:
        micro_batch = batch // ranks
    if batch % (micro_batch * ranks):
        raise UserError(_what_divides(batch, micro_batch, ranks))
    return BatchSplit(micro_batch, batch // (micro_batch * ranks), ranks)


def split_batch(batch: int, ranks: int, micro_batch: int) -> BatchSplit | None:
    """The split with the largest micro-batch up to this one; None where the batch is not a multiple of the ranks."""
    fitting = [s for s in every_split(batch, ranks) if s.micro_batch <= micro_batch]
    return fitting[-1] if fitting else None


def every_split(batch: int, ranks: int) -> list[BatchSplit]:
    """All splits over so many ranks, the smallest micro-batch first; none where the batch is not a multiple of them."""
    if batch % ranks:
        return []
    samples = batch // ranks
    return [BatchSplit(m, samples // m, ranks) for m in _divisors(samples)]


def _what_divides(batch: int, micro_batch: int, ranks: int) -> str:
    message = f"train.batch_size {batch} is not a multiple of micro-batch {micro_batch} x {ranks} ranks: "
    if batch % ranks:
        unit = micro_batch * ranks if micro_batch * ranks <= batch else ranks
        nearest = max(1, round(batch / unit)) * unit
        return message + f"set train.batch_size {nearest}, or use {_joined(_divisors(batch))} ranks"
    fitting = _joined(_divisors(batch // ranks))
    return f"{message}micro-batches that divide are {fitting} (--deepspeed.override.train_micro_batch_size_per_gpu)"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
