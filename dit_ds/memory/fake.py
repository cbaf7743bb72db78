"""A cluster that is not there: fake tensors on a fake GPU, and a process group of ranks of which only the first exists.

Fake tensors have shapes, types and a device, but no data. PyTorch's custom device type stands for the GPU, so that
operators choose as they do on one, and what lies in host memory can be told from what doesn't. DeepSpeed's own code runs on
them; its collectives return at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_ds import engine as ds
from dit_ds.distributed import World
from dit_ds.memory.ledger import LiveTensors
from dit_ds.models import attention
from dit_ds.models.segmenter import pixel_statistics

Live = TypeVar("Live", bound=LiveTensors)


@contextlib.contextmanager
def fake_tensors(live: Live) -> Iterator[Live]:
    """All tensors made inside are fake, and counted by `live`.

    A fake module's `.to()` swaps its parameters for others, which optimizers and hooks would not notice; here it sets
    their data, as a real one does. Attention runs with the kernel asked for, though there is no device for it.
    """

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in module.children():
            child._apply(fn)
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                with torch.no_grad():
                    new = fn(x)
                if new.device != x.device:  # data can't be set across devices
                    tensors[name] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
                elif new.dtype != x.dtype:
                    x.data = new.data
        return module

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    make, mode = torch.tensor, FakeTensorMode(allow_non_fake_inputs=True)
    changed = {
        nn.Module: {"_apply": apply},
        attention: {"require": lambda *_: None},
        torch: {"tensor": tensor},
        mode: {"may_turn_const": lambda t: False},  # numbers are computed with for real, which the fake GPU can't
    }
    pixel_statistics.cache_clear()  # no fake tensor may stay behind in it, and no real one get in
    try:
        with (
            _changed(changed),
            warnings.catch_warnings(),
            mode,
            live,
        ):
            # DeepSpeed looks at the alignment of its buffers
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield live
    finally:
        pixel_statistics.cache_clear()


@contextlib.contextmanager
def _changed(attributes: dict[Any, dict[str, Any]]) -> Iterator[None]:
    """Attributes of modules, classes or objects set for a while."""
    before = {owner: {name: getattr(owner, name) for name in names} for owner, names in attributes.items()}
    for owner, names in attributes.items():
        for name, value in names.items():
            setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, names in before.items():
            for name, value in names.items():
                setattr(owner, name, value)


@functools.cache
def _gpu() -> str:
    """A device type of PyTorch's that nothing drives: fake tensors need none of its operators."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    _setup_privateuseone_for_python_backend("fakegpu", Backend())
    return "fakegpu"


@contextlib.contextmanager
def fake_cluster(ranks: int, rank: int = 0) -> Iterator[World]:
    """One rank of so many, on a fake GPU. For a process of its own: no process group may exist.

    DeepSpeed's comparisons between ranks are left out: there is nobody to compare with.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    ds.import_deepspeed()
    import deepspeed.runtime.zero as zero
    from deepspeed.accelerator import get_accelerator

    device = torch.device(_gpu(), 0)
    accelerator = {
        "device_name": lambda index=None: _gpu() if index is None else f"{_gpu()}:{index}",
        "current_device_name": lambda: str(device),
        "current_device": lambda: 0,
        "on_accelerator": lambda tensor: tensor.device == device,
    }
    changed: dict[Any, dict[str, Any]] = {get_accelerator(): accelerator}
    for name in ("utils", "partitioned_param_coordinator", "stage3", "partition_parameters"):
        module = getattr(zero, name)
        checks = ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks")
        changed[module] = {check: lambda *_, **__: None for check in checks if hasattr(module, check)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _changed(changed):
            yield World(rank, ranks, 0, device)
    finally:
        dist.destroy_process_group()
