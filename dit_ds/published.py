"""The paper's tables as data: *Deep Instruction Tuning for Segment Anything Model*."""

from __future__ import annotations

from typing import NamedTuple


class MemoryRow(NamedTuple):
    """A row of Table 8 (appendix A.1): which encoders are frozen, the batch it gives, and the GPU's memory in GB."""

    method: str
    visual_frozen: bool
    text_frozen: bool
    batch: int
    gpu_gb: float


TABLE_8 = (
    MemoryRow("L-DIT", True, True, 32, 11.9),
    MemoryRow("L-DIT", True, False, 32, 12.4),
    MemoryRow("L-DIT", False, False, 32, 17.1),
    MemoryRow("LAVT", False, False, 8, 24.0),
    MemoryRow("ReLA", False, False, 32, 12.0),
)
