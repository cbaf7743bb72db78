"""What is replaced in DeepSpeed where it runs as one rank of a simulated cluster, see `planning.memory.fake_cluster`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from dit_ds.engine.engine import import_deepspeed

# Comparisons between ranks, in each module of deepspeed.runtime.zero that calls them by a global name
_COMPARISONS = {
    "utils": ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"),
    "partition_parameters": ("assert_ints_same_as_other_ranks",),
    "partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",),
    "stage3": ("assert_ints_same_as_other_ranks",),
}


def replacements(device: torch.device) -> dict[Any, dict[str, Any]]:
    """Attributes of DeepSpeed's objects and modules to replace, with their new values, by owner.

    The accelerator answers with `device`, and ranks are not compared, as there is no other one.

    Args:
        device: of the simulated rank, with an index.
    """
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = {
        "device_name": lambda index=None: device.type if index is None else f"{device.type}:{index}",
        "current_device_name": lambda: str(device),
        "current_device": lambda: device.index,
        "on_accelerator": lambda tensor: tensor.device == device,
    }
    replaced: dict[Any, dict[str, Any]] = {get_accelerator(): accelerator}
    for name, comparisons in _COMPARISONS.items():
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        replaced[module] = {comparison: lambda *_, **__: None for comparison in comparisons}
    return replaced
