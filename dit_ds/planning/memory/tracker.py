"""Who holds the memory: every storage that operators make, from its birth to its end, real or fake.

A storage is rounded as CUDA's allocator rounds. Its category is known at the latest when it is gone:

    parameters    the model's, as the rank holds them, and its buffers
    gradients     those that wait for the optimizer
    optimizer     fp32 masters, Adam's moments, scratch of the update
    average       the moving average of the weights
    activations   what a forward pass, also one that is made again, leaves behind for the backward pass
    inputs        the batch
    buffers       DeepSpeed's: buckets, gathered parameters, copies for communication
    temporaries   everything else, gone before its pass is over
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_ds.models import attention

CATEGORIES = (
    "parameters", "gradients", "optimizer", "average", "activations", "inputs", "buffers", "temporaries"
)  # fmt: skip
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
        self._alive: dict[int, tuple[weakref.ref, Any]] = {}
        self._transients: dict[Any, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MADE_OF:
            return self._made_of(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _some_number(args[0].dtype)
        out = func(*args, **kwargs)
        if not _aliases(func):
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.device.type != "meta":
                    self._add(x)
        return out

    def _made_of(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The parts of one of our operators. On fake tensors only the first time; then what they took is known."""
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(x, FakeTensor) for x in leaves)
        key = (func, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if fake and key in self._transients:
            out = func(*args, **kwargs)
            made = sum(self._add(x) for x in out)
            self._pass_by(self._transients[key] - made)
            return out
        before, peak, self.peak = self.now, self.peak, self.now
        with self:
            out = _MADE_OF[func](*args, **kwargs)
        self._transients[key] = self.peak - before
        self.peak = max(peak, self.peak)
        return out

    def _pass_by(self, size: int) -> None:
        """So many bytes are made and freed at once."""
        self.peak = max(self.peak, self.now + size)

    def _add(self, x: Tensor) -> int:
        """Count a tensor's storage, unless it is counted; return its bytes then."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return 0
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        block = self._born(size, x)
        self._alive[key] = (weakref.ref(storage, lambda _: self._gone(self._alive.pop(key)[1])), block)
        return size

    def _born(self, size: int, x: Tensor) -> Any:
        self.now += size
        self.peak = max(self.peak, self.now)
        return size

    def _gone(self, size: Any) -> None:
        self.now -= size


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


@dataclass(eq=False, slots=True)
class Block:
    """A storage: its bytes, whether on the host, its category, the module in whose forward it was made."""

    size: int
    host: bool
    category: str
    module: str = ""


@dataclass
class Profile:
    """A rank's memory over one phase after another. Bytes.

    Attributes:
        phases: the most at once in each.
        peak: the most of all, in `phase`, where something of `module` was last made or freed; `peak_at` is the moment's number.
        at_peak: by category.
        after: what is left when the last phase is over, by category.
        host: the most at once in host memory.
        kept: what waited for the backward pass when the last forward was over, by module.
        timeline: (moment, bytes by category in the order of CATEGORIES), the highest of each of about `_POINTS`
            stretches; `bounds` are the phases' first moments.
    """

    phases: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    phase: str = ""
    module: str = ""
    peak_at: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    host: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    timeline: list[tuple[int, ...]] = field(default_factory=list)
    bounds: dict[str, int] = field(default_factory=dict)


_POINTS = 2000


class MemoryTracker(LiveTensors):
    """Writes down every storage.

    Call `enter` at the start of each phase, and `own` whenever tensors can be told by who holds them.

    Args:
        host: whether a tensor lies in host memory; where the accelerator is the CPU, none does.
    """

    def __init__(self, host: Callable[[Tensor], bool] = lambda x: False) -> None:
        super().__init__()
        self.host = host
        self.log: list[tuple[Block | None, int, str]] = []  # (block, sign, its module) or (None, 0, a phase's name)
        self._before: list[Block] = []  # made before the log begins
        self._phase = "load"
        self._passing: list[Block] = []  # made in the forward pass under way
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._hooks: list[Any] = []

    # --- what is made

    def _born(self, size: int, x: Tensor) -> Block:
        super()._born(size, x)
        block = Block(size, self.host(x), "buffers", self._modules[-1] if self._modules else "")
        if self._phase != "load":
            self._classify(block)
        self.log.append((block, 1, block.module))
        return block

    def _classify(self, block: Block) -> None:
        maker = _maker()
        if maker == "forward" or (maker == "model" and self._phase == "forward"):
            block.category = "temporaries"
            self._passing.append(block)
            return
        self._passed()
        block.category = {"deepspeed": "buffers", "optimizer": "optimizer"}.get(maker, "temporaries")

    def _passed(self) -> None:
        """A forward pass is over: what it left behind are activations."""
        if self._passing:
            alive = {id(block) for _, block in self._alive.values()}
            for block in self._passing:
                if id(block) in alive and block.category == "temporaries":  # by now not known as anything else
                    block.category = "activations"
            self._passing.clear()

    def _gone(self, block: Block) -> None:
        super()._gone(block.size)
        self.log.append((block, -1, block.module))

    def _pass_by(self, size: int) -> None:
        super()._pass_by(size)
        block = Block(size, False, "temporaries")
        module = self._modules[-1] if self._modules else ""
        self.log += [(block, 1, module), (block, -1, module)]

    # --- what is known of it

    def enter(self, phase: str) -> None:
        """From here on it is another phase."""
        self._passed()
        self._phase = phase
        self.log.append((None, 0, phase))

    def restart(self) -> None:
        """Forget what was, but for what is alive."""
        self._passed()
        self.log.clear()
        self._before = [block for _, block in self._alive.values()]

    def track_existing(self, tensors: Iterable[Tensor]) -> None:
        """These were made while the tracker was not active."""
        for x in tensors:
            self._add(x)

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """These tensors are of a category."""
        for x in tensors:
            _, block = self._alive.get(x.untyped_storage()._cdata, (None, None))
            if block is not None:
                block.category = category

    def watch(self, model: nn.Module) -> None:
        """Name the modules in whose forward things are made, from now on."""
        self._names = {id(m): name for name, m in model.named_modules()}
        self._hooks = [
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ]

    def _entered(self, module: nn.Module, *_: Any) -> None:
        self._modules.append(self._names.get(id(module), ""))

    def _left(self, *_: Any) -> None:
        self._modules.pop()

    def unwatch(self) -> None:
        """Undo `watch`."""
        for hook in self._hooks:
            hook.remove()

    def profile(self) -> Profile:
        """The phases entered since the start or `restart`, replayed with what is known by now."""
        p, sums, kept, total, phase = Profile(), dict.fromkeys(CATEGORIES, 0), {}, 0, self._phase
        host = p.host = sum(b.size for b in self._before if b.host)
        for block in self._before:
            if not block.host:
                sums[block.category] += block.size
                total += block.size
        every, highest = max(1, len(self.log) // _POINTS), -1
        module = ""
        for i, (block, sign, name) in enumerate(self.log):
            module = name if block and name else module  # in a backward pass: whose activations went last
            if block is None:
                if phase == "forward":
                    p.kept = {module: n for module, n in kept.items() if n}
                phase, kept = name, defaultdict(int)
                p.bounds[phase] = i
                p.phases[phase] = total
            elif block.host:
                host += sign * block.size
                p.host = max(p.host, host)
                continue
            else:
                sums[block.category] += sign * block.size
                total += sign * block.size
                if block.category == "activations":
                    kept[block.module] += sign * block.size
            if total > p.phases.get(phase, 0):
                p.phases[phase] = total
            if total > p.peak:
                p.peak, p.phase, p.module, p.at_peak = total, phase, module, dict(sums)
                p.peak_at = i
            if i % every == 0 or block is None or not p.timeline:
                p.timeline.append((i, *sums.values()))
                highest = total
            elif total > highest:
                p.timeline[-1] = (i, *sums.values())
                highest = total
        p.timeline.append((len(self.log), *sums.values()))
        p.after = dict(sums)
        return p


def _maker() -> str:
    """Whose code makes a tensor, by the frames below the operator: deepspeed, optimizer, model; forward if that pass
    is made again within the backward one."""
    frame, found = sys._getframe(3), ""
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        if kind == "checkpoint":
            return found and "forward"
        if kind in ("deepspeed", "optimizer") and not found:
            return kind
        if kind == "autograd" or kind == "deepspeed":
            return found or "model"
        if kind == "model":
            found = kind
        frame = frame.f_back
    return found


@functools.cache
def _kind(file: str) -> str:
    found = [(file.rfind(part), len(part), kind) for part, kind in _FILES.items() if part in file]
    return max(found)[2] if found else ""  # the innermost: any folder above may be called so


_FILES = {
    "/dit_ds/planning/memory/": "",
    "/deepspeed/runtime/zero/linear": "model",
    "/deepspeed/": "deepspeed",
    "/torch/optim/": "optimizer",
    "/torch/utils/checkpoint": "checkpoint",
    "/torch/autograd/graph": "autograd",
    "/torch/nn/": "model",
    "/dit_ds/": "model",
    "/transformers/": "model",
    "/segment_anything/": "model",
}
