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

from dit_ds.distributed import World
from dit_ds.engine.simulated_rank import replacements
from dit_ds.errors import RunFailed
from dit_ds.models import attention
from dit_ds.models.segmenter import pixel_statistics
from dit_ds.planning.memory.autocast import Autocast
from dit_ds.planning.memory.live_tensors import LiveTensors
from dit_ds.planning.memory.streams import Streams

Live = TypeVar("Live", bound=LiveTensors)
STREAMS = Streams()  # of this process's fake GPU
_NAME = "fakegpu"
_AUTOCAST = Autocast(_NAME)


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
    q, k, v, attn_mask = _AUTOCAST.lowered(q, k, v, attn_mask)
    if attn_mask is not None:
        mask = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    arguments = (q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]


def _also_clear(clear: Any) -> Callable[[], None]:
    """`torch.clear_autocast_cache`, which `torch.autocast` calls at its end, for the fake GPU, too."""

    def clear_autocast_cache() -> None:
        clear()
        _AUTOCAST.clear()

    return clear_autocast_cache


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
        Tensor: {"record_stream": lambda x, stream: live.use_on(x, stream.number)},
        torch: {name: _made_on_host(getattr(torch, name)) for name in ("tensor", "as_tensor")}
        | {"clear_autocast_cache": _also_clear(getattr(torch, "clear_autocast_cache", None))},
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
            STREAMS.tracker = live
            yield live
    finally:
        STREAMS.tracker = None
        _AUTOCAST.clear()
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
    # PyTorch notes at the first use of a device context which functions make tensors, for good: those, not ours
    with torch.device("meta"):
        torch.empty(0)
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

    _setup_privateuseone_for_python_backend(_NAME, Backend())
    _AUTOCAST.register()
    return _NAME


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
    replaced = replacements(device, STREAMS)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _changed(replaced):
            yield World(rank, ranks, 0, device)
    finally:
        dist.destroy_process_group()
