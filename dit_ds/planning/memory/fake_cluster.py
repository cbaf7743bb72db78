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
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from dit_ds.distributed import World
from dit_ds.engine import engine as ds
from dit_ds.models import attention
from dit_ds.models.segmenter import pixel_statistics
from dit_ds.planning.memory.tracker import LiveTensors

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

    def made_on_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """From numbers, which the fake GPU has no operators to take."""

        def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            made = make(data, *args, **kwargs)
            return made if device is None else made.to(device)

        return tensor

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_: Any) -> torch.Tensor:
        """As CUDA's memory-efficient kernel, which takes what the others don't, does it: no map is kept."""
        if attn_mask is not None:
            mask = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
        arguments = (q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)
        return torch.ops.aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    changed = {
        nn.Module: {"_apply": apply},
        nn.functional: {"scaled_dot_product_attention": attend},
        attention: {"require": lambda *_: None},
        torch: {name: made_on_host(getattr(torch, name)) for name in ("tensor", "as_tensor")},
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
    _OTHERS.fallback(torch.library.fallthrough_kernel)
    for names, short in ((_SHORT, True), (_EXACT, False)):
        for name in names:
            _AUTOCAST.impl(name, _cast_before(_overload(name), short))
    return "fakegpu"


# What autocast does on a GPU, as far as our models go: operators that take the short type, and those that take fp32
_SHORT = (
    "conv1d", "conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "_scaled_dot_product_efficient_attention",
)  # fmt: skip
_EXACT = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "nll_loss", "nll_loss_nd", "cross_entropy_loss", "exp",
    "binary_cross_entropy_with_logits", "grid_sampler", "pow.Tensor_Scalar", "sum", "sum.dim_IntList",
)  # fmt: skip
_AUTOCAST = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_OTHERS = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _cast_before(operator: torch._ops.OpOverload, short: bool) -> Callable[..., Any]:
    this = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("fakegpu") if short else torch.float32

        def cast(x: Any) -> Any:
            floating = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if floating else x

        with torch._C._ExcludeDispatchKeyGuard(this):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


@contextlib.contextmanager
def fake_cluster(ranks: int, rank: int = 0) -> Iterator[World]:
    """One rank of so many, on a fake GPU. For a process of its own: no process group may exist.

    DeepSpeed's comparisons between ranks are left out: there is nobody to compare with.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    deepspeed = ds.import_deepspeed()
    zero, get_accelerator = deepspeed.runtime.zero, deepspeed.accelerator.get_accelerator

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
