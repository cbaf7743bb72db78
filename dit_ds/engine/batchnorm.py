"""BatchNorm's running statistics: buffers that change in training, and no optimizer knows of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Mean, variance and count of every BatchNorm, by name; the buffers themselves."""
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    return {f"{n}.{k}": x for n, m in norms for k, x in m.named_buffers(recurse=False)}


def restore_fp32_buffers(model: nn.Module, exact: dict[str, Tensor]) -> None:
    """Put the statistics back as they were before the model went to bf16, which would round them away: a step adds a
    tenth of a batch's."""
    for name, value in exact.items():
        module, _, buffer = name.rpartition(".")
        now = model.get_buffer(name)
        setattr(model.get_submodule(module), buffer, value.to(now.device))


class SyncedBatchNormStats:
    """Keeps them equal on all ranks, and as they were where a step is left out.

    Ranks that see other samples have other statistics, unless BatchNorm is synchronised as it is on GPUs. They are
    averaged after each step, so that an evaluation or a checkpoint at any time finds what any rank would have.
    """

    def __init__(self, model: nn.Module):
        self._live = [x for x in running_statistics(model).values() if x.is_floating_point()]
        self._kept = [x.clone() for x in self._live]

    @torch.no_grad()
    def stepped(self, taken: bool) -> None:
        """After an optimizer step, taken or left out. Collective."""
        if not self._live:
            return
        if not taken:
            torch._foreach_copy_(self._live, self._kept)
            return
        if dist.get_world_size() > 1:
            flat = torch.cat(self._live)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(self._live, list(flat.split([x.numel() for x in self._live])))
        torch._foreach_copy_(self._kept, self._live)
