"""A training step's memory, counted without a GPU.

The real model, loss, backward pass and DeepSpeed engine run on fake tensors, which have shapes but no data. Every
storage that an operator allocates is counted until it is freed, rounded as CUDA's allocator rounds. Not in the count: the
CUDA context, workspaces inside kernels, NCCL's buffers, fragmentation.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_ds import engine as ds
from dit_ds.config import RunConfig
from dit_ds.distributed import World
from dit_ds.models import attention
from dit_ds.models.segmenter import pixel_statistics
from dit_ds.weights import build_model

# operators of ours whose temporaries count: what they are made of is run in their place
_MADE_OF = {
    torch.ops.dit_ds.attention.default: attention.attention_forward,
    torch.ops.dit_ds.attention_backward.default: attention.attention_backward,
}
_ROUND = 512  # bytes, CUDA's allocator's


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active and not freed yet, real or fake.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MADE_OF:
            with self:
                return _MADE_OF[func](*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _some_number(args[0].dtype)
        out = func(*args, **kwargs)
        if not _aliases(func):
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._sizes[key] = (weakref.ref(storage, lambda _: self._remove(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[1]


@functools.cache
def _aliases(func: torch._ops.OpOverload) -> bool:
    """Whether it returns views of its arguments, or them themselves: nothing new, even where they are older."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None for r in returns)


def _some_number(dtype: torch.dtype) -> bool | float | int:
    """What `.item()` of a fake tensor answers: a norm of 1, no overflow, a count of 0."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0


@contextlib.contextmanager
def fake_tensors() -> Iterator[LiveTensors]:
    """All tensors made inside are fake, and counted.

    A fake module's `.to()` swaps its parameters for others, which optimizers and hooks would not notice; here it sets
    their data, as a real one does. Attention runs with the kernel asked for, though there is no device for it.
    """

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in module.children():
            child._apply(fn)
        for tensors in (module._parameters, module._buffers):
            for x in filter(lambda x: x is not None, tensors.values()):
                with torch.no_grad():
                    new = fn(x)
                if new.dtype != x.dtype:
                    x.data = new.data
        return module

    real_apply, real_require = nn.Module._apply, attention.require
    nn.Module._apply, attention.require = apply, lambda *_: None
    pixel_statistics.cache_clear()  # no fake tensor may stay behind in it, and no real one get in
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
            # DeepSpeed looks at the alignment of its buffers
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield live
    finally:
        nn.Module._apply, attention.require = real_apply, real_require
        pixel_statistics.cache_clear()


def fake_batch(batch: int, image_size: int, tokens: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs, mask and weight of the shapes that the loader gives."""
    inputs = {
        "image": torch.zeros(batch, 3, image_size, image_size, dtype=torch.uint8),
        "size": torch.full((batch, 2), image_size),
        "tokens": torch.zeros(batch, tokens, dtype=torch.long),
        "token_mask": torch.ones(batch, tokens, dtype=torch.bool),
    }
    return inputs, torch.zeros(batch, image_size, image_size, dtype=torch.uint8), torch.ones(batch)


def training_step_memory(config: RunConfig, world: World, steps: int = 2, change: Any = None) -> dict[str, int]:
    """Count a rank's memory in training, micro-batch by micro-batch.

    Args:
        config: the run; `model.attention` must name a backend, the one of the GPU meant.
        steps: the last one is reported; by the second all optimizer states exist.
        change: applied to the model before DeepSpeed gets it.
    Returns:
        Bytes: `engine` alive once DeepSpeed is ready, `forward`, `backward` and `step` the peak of each,
        `after` alive between steps, `peak` the largest.
    """
    with fake_tensors() as live:
        model = build_model(config, text_weights=False)
        model.checkpoint_activations(config.train.activation_checkpointing)
        if change is not None:
            change(model)
        engine = ds.initialize(model, config, world)
        peaks = {"engine": live.now}
        engine.train()
        micro_batch = engine.train_micro_batch_size_per_gpu()
        for _ in range(steps):
            inputs, mask, weight = fake_batch(micro_batch, config.data.image_size, config.data.tokens)
            live.peak = live.now
            loss = model.loss(engine(**inputs), mask, weight)
            peaks["forward"], live.peak = live.peak, live.now
            engine.backward(loss)
            del loss, inputs, mask, weight
            peaks["backward"], live.peak = live.peak, live.now
            engine.step()
            peaks["step"], peaks["after"] = live.peak, live.now
        return peaks | {"peak": max(peaks[k] for k in ("forward", "backward", "step"))}
