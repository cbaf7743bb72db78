"""A simulated cluster: fake tensors on a fake GPU, and a process group of which this process is the only rank.

Fake tensors have shapes, types and a device, but no data. PyTorch's custom device type (PrivateUse1) stands for the GPU,
so that operators are dispatched as for an accelerator, and host memory can be told from the device's. DeepSpeed's real
code runs on them; its collectives return at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from dit_ds.distributed import World
from dit_ds.engine.simulated_rank import replacements
from dit_ds.errors import RunFailed
from dit_ds.models import attention
from dit_ds.models.segmenter import pixel_statistics
from dit_ds.planning.memory.tracker import LiveTensors

Live = TypeVar("Live", bound=LiveTensors)


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that sets parameters' data."""
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


def _made_on_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor that makes tensors of numbers on the host: the fake GPU has no operators for it."""

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, **_: Any) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by CUDA's memory-efficient kernel, which saves no attention map."""
    if attn_mask is not None:
        mask = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    arguments = (q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]


@contextlib.contextmanager
def fake_tensors(live: Live) -> Iterator[Live]:
    """A context in which all tensors are fake, and counted by `live`.

    A fake module's `.to()` replaces its parameters by others, unknown to optimizers and hooks; here it sets their data,
    as a real one's does. Attention runs with the requested kernel, though there is no device for it.

    Raises:
        RunFailed: PyTorch lacks an attribute that is replaced here.
    """

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replaced: dict[Any, dict[str, Any]] = {
        nn.Module: {"_apply": _apply},
        nn.functional: {"scaled_dot_product_attention": _attend},
        attention: {"require": lambda *_: None},
        torch: {name: _made_on_host(getattr(torch, name)) for name in ("tensor", "as_tensor")},
        mode: {"may_turn_const": lambda t: False},  # constants would be computed on the device, which can't
    }
    pixel_statistics.cache_clear()  # its tensors are real outside, fake inside
    try:
        with (
            _changed(replaced),
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
    """A context in which attributes of modules, classes or objects have other values.

    Raises:
        RunFailed: one of them does not exist.
    """
    for owner, names in attributes.items():
        for name in names:
            if not hasattr(owner, name):
                raise RunFailed(_gone(owner, name))
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


def _gone(owner: Any, name: str) -> str:
    """The message about an attribute that a library no longer has."""
    where = f"{owner.__name__}" if isinstance(owner, (ModuleType, type)) else type(owner).__name__
    library = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).partition(".")[0]
    version = getattr(sys.modules[library], "__version__", "of unknown version")
    return (
        f"{library} {version} has no {where}.{name}, which a memory prediction replaces: install a version of {library} "
        "that dit-ds' pyproject.toml allows"
    )


@functools.cache
def _gpu() -> str:
    """Register a device type that has no operators: fake tensors need none. Returns its name."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    _setup_privateuseone_for_python_backend("fakegpu", Backend())
    _FALLTHROUGH.fallback(torch.library.fallthrough_kernel)
    for names, low_precision in ((_LOW_PRECISION, True), (_FP32, False)):
        for name in names:
            _AUTOCAST.impl(name, _cast_before(_overload(name), low_precision))
    return "fakegpu"


# Autocast on CUDA, as far as our models use it: operators that take the autocast type, and those that take fp32
_LOW_PRECISION = (
    "conv1d", "conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "_scaled_dot_product_efficient_attention",
)  # fmt: skip
_FP32 = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "nll_loss", "nll_loss_nd", "cross_entropy_loss", "exp",
    "binary_cross_entropy_with_logits", "grid_sampler", "pow.Tensor_Scalar", "sum", "sum.dim_IntList",
)  # fmt: skip
_AUTOCAST = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_FALLTHROUGH = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _cast_before(operator: torch._ops.OpOverload, low_precision: bool) -> Callable[..., Any]:
    this = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("fakegpu") if low_precision else torch.float32

        def cast(x: Any) -> Any:
            floating = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if floating else x

        with torch._C._ExcludeDispatchKeyGuard(this):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


@contextlib.contextmanager
def fake_cluster(ranks: int, rank: int = 0) -> Iterator[World]:
    """A context in which this process is one rank of a simulated cluster, on a fake GPU. No process group may exist.

    Args:
        ranks: of the cluster, one GPU each.
        rank: this one.
    Raises:
        RunFailed: DeepSpeed lacks an attribute that is replaced for it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    device = torch.device(_gpu(), 0)
    replaced = replacements(device)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _changed(replaced):
            yield World(rank, ranks, 0, device)
    finally:
        dist.destroy_process_group()
