"""What GPU memory holds: every storage that operators allocate, from allocation to release, real or fake.

Sizes are rounded as CUDA's caching allocator rounds them. A storage's category is known at the latest when it is freed:

    parameters    the model's, as the rank holds them, and its buffers
    gradients     those that wait for the optimizer's step
    optimizer     fp32 masters, Adam's moments, scratch of the update
    average       the moving average of the weights
    activations   what a forward pass, also a recomputed one, saves for the backward pass
    inputs        the batch
    workspaces    cuBLAS's, which stay
    buffers       DeepSpeed's: buckets, gathered parameters, copies for communication
    temporaries   everything else, freed before its pass is over
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.autograd.graph
import torch.optim
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

import dit_ds
from dit_ds.planning.memory.allocation_log import AllocationLog
from dit_ds.planning.memory.allocations import ALLOCATE, Request
from dit_ds.planning.memory.kernels.gpu_scratch import GpuScratch
from dit_ds.planning.memory.live_tensors import ROUND, LiveTensors

CATEGORIES = (
    "parameters", "gradients", "optimizer", "average", "activations", "inputs", "buffers", "workspaces", "temporaries"
)  # fmt: skip


@dataclass(eq=False, slots=True)
class Block:
    """A storage: its bytes, whether it lies in host memory, its category, the module whose forward allocated it.

    Attributes:
        key: in the log of what is asked of the GPU's allocator; None for host memory.
        stream: on which it was allocated.
        used_on: other streams that used it.
    """

    size: int
    host: bool
    category: str
    module: str = ""
    key: int | None = None
    stream: int = 0
    used_on: set[int] = field(default_factory=set)


@dataclass
class Profile:
    """A rank's memory over the phases of a step. All sizes are bytes.

    Attributes:
        phases: each phase's peak.
        peak: the largest of them, reached in `phase`, where the last storage allocated or freed was of `module`, at the
            `peak_at`-th event (an allocation, a release or the start of a phase).
        at_peak: bytes at the peak, by category.
        after: bytes left at the end of the last phase, by category.
        host: the peak in host memory.
        kept: activations saved for the backward pass at the end of the last forward pass, by module.
        timeline: (event number, bytes by category in the order of CATEGORIES): the highest event of each of about
            `_POINTS` intervals.
        bounds: each phase's first event number.
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
    """Logs every allocation and release, for a profile by phase, category and module.

    Call `enter` at the start of each phase, and `tag` whenever the category of some tensors is known.

    Args:
        host: whether a tensor lies in host memory; where the accelerator is the CPU, none does.
        gpu: whose operators' scratch is logged, for tensors on it.
    Attributes:
        requests: what is asked of the GPU's allocator.
    """

    def __init__(self, host: Callable[[Tensor], bool] = lambda x: False, gpu: GpuScratch | None = None) -> None:
        super().__init__()
        self.host, self.gpu = host, gpu
        self.requests = AllocationLog()
        self._workspaces: list[Block] = []
        self._sequences: dict[Any, tuple[list[Request], list[int]]] = {}  # of our operators: requests, outputs' keys
        self.log: list[tuple[Block | None, int, str]] = []  # (block, sign, its module) or (None, 0, a phase's name)
        self._before: list[Block] = []  # allocated before the log begins
        self._phase = "load"
        self._in_forward: list[Block] = []  # allocated in the forward pass under way
        self._modules: list[str] = []  # whose forward is running, the innermost last
        self._names: dict[int, str] = {}
        self._hooks: list[RemovableHandle] = []

    # --- allocations and releases

    def _allocated(self, size: int, x: Tensor) -> Block:
        super()._allocated(size, x)
        block = Block(size, self.host(x), "buffers", self._modules[-1] if self._modules else "", stream=self.stream)
        if not block.host and size:
            block.key = self.requests.allocate(x.untyped_storage().nbytes(), self.stream, self._site())
        if self._phase != "load":
            self._classify(block)
        self.log.append((block, 1, block.module))
        return block

    def _classify(self, block: Block) -> None:
        maker = _maker()
        if maker == "forward" or (maker == "model" and self._phase == "forward"):
            block.category = "temporaries"
            self._in_forward.append(block)
            return
        self._end_forward()
        block.category = {"deepspeed": "buffers", "optimizer": "optimizer"}.get(maker, "temporaries")

    def _end_forward(self) -> None:
        """A forward pass is over: what is left of it are activations."""
        if self._in_forward:
            alive = set(map(id, self._blocks()))
            for block in self._in_forward:
                if id(block) in alive and block.category == "temporaries":  # not tagged since
                    block.category = "activations"
            self._in_forward.clear()

    def _freed(self, block: Block) -> None:
        super()._freed(block.size)
        self.log.append((block, -1, block.module))
        if block.key is not None:
            self.requests.free(block.key, waits=bool(block.used_on - {block.stream}))

    def _site(self) -> str:
        """Where the run is, for a reader."""
        return f"{self._phase}, {self._modules[-1]}" if self._modules and self._modules[-1] else self._phase

    def use_on(self, x: Tensor, stream: int) -> None:
        """A tensor is used on a stream (`record_stream`): its memory is not given out before the stream has passed."""
        _, block = self._alive.get(x.untyped_storage()._cdata, (None, None))
        if block is not None:
            block.used_on.add(stream)

    def synchronize(self) -> None:
        """The host waits for all streams."""
        self.requests.synchronize()

    def empty_cache(self) -> None:
        """Unused segments are given back."""
        self.requests.empty_cache()

    def _operator_ran(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if self.gpu is None or not self.gpu.knows(func) or self._on_host((*args, out)):
            return
        for size in self.gpu.kept(func, self.stream):
            self._keep(size)
        scratch = self.gpu.scratch(func, args, kwargs, out)
        if scratch:
            self._add_transient(sum(-(-size // ROUND) * ROUND for size in scratch))
            for key in [self.requests.allocate(size, self.stream, self._site()) for size in scratch]:
                self.requests.free(key)

    def _on_host(self, values: Iterable[Any]) -> bool:
        """Whether the first tensor of an operator's arguments and result lies in host memory."""
        for x in values:
            for leaf in x if isinstance(x, (list, tuple)) else (x,):
                if isinstance(leaf, Tensor):
                    return self.host(leaf)
        return True

    def _keep(self, size: int) -> None:
        """Count a workspace that stays until the process ends."""
        with self._lock:
            self.now += size
            self.peak = max(self.peak, self.now)
        block = Block(size, False, "workspaces", key=self.requests.allocate(size, self.stream, "workspace of cuBLAS"))
        self._workspaces.append(block)
        self.log.append((block, 1, ""))

    # our operators' temporaries, one by one

    def _began(self) -> int:
        return len(self.requests.requests)

    def _remember(self, key: Any, began: int, out: Iterable[Tensor]) -> None:
        found = (
            self._alive[x.untyped_storage()._cdata][1].key for x in out if x.untyped_storage()._cdata in self._alive
        )
        outputs, sequence = list(found), self.requests.requests[began:]
        freed = {request.key for request in sequence if request.kind != ALLOCATE}  # not so cuBLAS's workspace
        self._sequences[key] = [r for r in sequence if r.key in freed or r.key in outputs], outputs

    def _add_outputs(self, key: Any, out: Iterable[Tensor]) -> int:
        out, made = list(out), 0
        sequence, outputs = self._sequences[key]
        keys: dict[int, int] = {}
        for request in sequence:
            if request.key in outputs:
                made += self._add(out[outputs.index(request.key)])
            elif request.kind == ALLOCATE:
                keys[request.key] = self.requests.allocate(request.size, self.stream, self._site())
            elif request.key in keys:
                self.requests.free(keys.pop(request.key))
        return made + super()._add_outputs(key, out)

    def _add_transient(self, size: int) -> None:
        super()._add_transient(size)
        block = Block(size, False, "temporaries")
        module = self._modules[-1] if self._modules else ""
        self.log += [(block, 1, module), (block, -1, module)]

    # --- phases and categories

    def enter(self, phase: str) -> None:
        """Start a phase."""
        self._end_forward()
        self.synchronize()
        self._phase = phase
        self.log.append((None, 0, phase))

    def restart(self) -> None:
        """Clear the log; storages that are still allocated count from its start."""
        self._end_forward()
        self.log.clear()
        self._before = self._blocks() + self._workspaces

    def track_existing(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors that were allocated while the tracker was not active."""
        for x in tensors:
            self._add(x)

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Set the category of these tensors' storages."""
        for x in tensors:
            _, block = self._alive.get(x.untyped_storage()._cdata, (None, None))
            if block is not None:
                block.category = category

    def watch(self, model: nn.Module) -> None:
        """From now on note the module whose forward allocates a storage."""
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
        self._hooks.clear()

    def profile(self) -> Profile:
        """The log since the start or `restart`, added up with the categories known by now."""
        p, sums, total, phase = Profile(), dict.fromkeys(CATEGORIES, 0), 0, self._phase
        kept: dict[str, int] = {}
        host = p.host = sum(b.size for b in self._before if b.host)
        for existing in self._before:
            if not existing.host:
                sums[existing.category] += existing.size
                total += existing.size
        every, highest = max(1, len(self.log) // _POINTS), -1
        module = ""
        for i, (block, sign, name) in enumerate(self.log):
            module = name if block and name else module  # in a backward pass: whose activations were freed last
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
    """What code called the operator that makes a tensor, by the frames below it.

    Returns:
        deepspeed, optimizer, model, `forward` for a forward pass that is recomputed within the backward pass, or an empty
        string for any other code.
    """
    frame: FrameType | None = sys._getframe(3)
    found = ""
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


# The kind of code that a module or a package holds. Of packages within each other the innermost counts.
_KINDS: dict[ModuleType, str] = {
    dit_ds: "model",
    sys.modules[__package__]: "",  # the tracker and the steps under it: what calls them or is called by them counts
    torch.autograd.graph: "autograd",
    torch.nn: "model",
    torch.optim: "optimizer",
    torch.utils.checkpoint: "checkpoint",
    importlib.import_module(
        "segment_anything.modeling"
    ): "model",  # whose package itself is not imported, see dit_ds.models
}
# The same of libraries that may not be imported: until they are, no frame runs their code
_OPTIONAL_KINDS = {
    "deepspeed": "deepspeed",
    "deepspeed.runtime.zero.linear": "model",  # linear layers whose backward ZeRO-3 replaces
    "transformers": "model",
}


@functools.cache
def _kind(file: str) -> str:
    """The kind of code in a source file.

    Raises:
        ModuleNotFoundError: a library that is imported lacks a module of `_OPTIONAL_KINDS`; without it tensors would
            silently be counted in another category.
    """
    imported = [name for name in _OPTIONAL_KINDS if name.partition(".")[0] in sys.modules]
    kinds = _KINDS | {importlib.import_module(name): _OPTIONAL_KINDS[name] for name in imported}
    found = [(len(where), kind) for module, kind in kinds.items() if file.startswith(where := _location(module))]
    return max(found)[1] if found else ""


def _location(module: ModuleType) -> str:
    """A package's folder, or a module's file."""
    if hasattr(module, "__path__"):
        return os.path.join(module.__path__[0], "")
    assert module.__file__ is not None
    return module.__file__
