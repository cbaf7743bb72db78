"""What CUDA's operators take besides their outputs, by GPU: workspaces, and scratch of reductions."""

from __future__ import annotations

import os
from typing import Any

import torch

from dit_ds.planning.gpus import limits_of
from dit_ds.planning.memory.backward_in_place import in_backward
from dit_ds.planning.memory.kernels import reductions, workspaces


class GpuScratch:
    """The scratch of the operators of one process.

    Args:
        gpu: its name, as in `gpus.PEAKS`.
    Attributes:
        largest_convolution: bytes that cuDNN is assumed to take for the largest convolution so far.
    """

    def __init__(self, gpu: str):
        self.limits = limits_of(gpu)
        self.largest_convolution = 0
        own = workspaces.cublaslt_workspace(os.environ)  # 0 where the two libraries share one
        self._cublas = tuple(filter(None, (workspaces.cublas_workspace(self.limits.capability, os.environ), own)))
        self._handles: set[tuple[bool, int]] = set()

    def knows(self, func: torch._ops.OpOverload) -> bool:
        """Whether an operator can take anything; quick."""
        return reductions.knows(func) or workspaces.knows(func)

    def kept(self, func: torch._ops.OpOverload, stream: int) -> tuple[int, ...]:
        """Bytes that are allocated when an operator runs for the first time, and stay.

        cuBLAS has a workspace for each thread with a handle, and stream: the backward pass runs in a thread of its own.
        """
        if not workspaces.uses_cublas(func):
            return ()
        handle = in_backward(), stream
        if handle in self._handles:
            return ()
        self._handles.add(handle)
        return self._cublas

    def scratch(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> tuple[int, ...]:
        """Bytes of each allocation that an operator makes and frees before it returns."""
        assumed = workspaces.assumed_cudnn_workspace(func, args, kwargs, out)
        self.largest_convolution = max(self.largest_convolution, assumed)
        return (
            *workspaces.workspace(func, args, kwargs, out, self.limits),
            *reductions.scratch(func, args, kwargs, out, self.limits),
        )
