"""What a GPU must have for a step whose tensors take so much at most."""

from __future__ import annotations

GIB = 2**30
CONTEXT_GIB = 0.6  # CUDA's context and the kernels' code
NCCL_GIB = 0.5  # its buffers, where there is more than one rank
RESERVE = 0.05  # what the allocator holds beyond what is asked of it


def needed(peak_bytes: float, ranks: int) -> float:
    """Bytes of GPU memory for a step whose tensors take `peak_bytes` at most."""
    return peak_bytes * (1 + RESERVE) + (CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0)) * GIB
