"""What a rank sends in an optimizer step under each ZeRO stage: by formula, after what DeepSpeed 0.19 does.

    stage 0   gradients all-reduced once a step, after the backward pass
    stage 1   gradients all-reduced once a step, within the last backward pass; updated weights all-gathered
    stage 2   gradients all-reduced once a micro-batch; updated weights all-gathered
    stage 3   gradients reduce-scattered once a micro-batch; weights all-gathered when a module needs them, those below
              the persistence threshold once a step

Stages 1 and 2 all-reduce though each rank keeps a part only: `use_multi_rank_bucket_allreduce`, DeepSpeed's default,
joins the parts of all ranks into one call. Set to false, each part is reduced to its rank alone, at half of the bytes.

Not in the formula: the gradient norm, its overflow flag and the log's means (a few numbers a step), and what happens
once (weights broadcast at the start, module orders compared).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from dit_ds.engine.deepspeed_json import DeepSpeedJson

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
_PREFETCH, _REUSE, _LIVE, _PERSISTENT = 50_000_000, 1_000_000_000, 1_000_000_000, 100_000  # DeepSpeed's defaults
_BUCKET, _STAGE_0_BUCKET = 500_000_000, 500_000_000


class Event(NamedTuple):
    """A module is entered or left; its own parameters, without its children's."""

    module: int
    enters: bool
    backward: bool  # in the backward pass
    again: bool  # a forward in the backward pass, of activations that were not kept
    parameters: tuple[int, ...]


@dataclass(eq=False)
class ModuleTrace:
    """A model as far as communication goes, filled in by `watch` and one training step.

    Attributes:
        sizes: elements of each parameter.
        trained: whether each is.
        visits: the modules' order in the forward and the backward pass.
    """

    sizes: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    visits: list[Event] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Record the parameters now, and the visits of every step from now on."""
        index = {p: i for i, p in enumerate(model.parameters())}
        self.sizes = [p.numel() for p in index]
        self.trained = [p.requires_grad for p in index]
        in_backward = False

        def hook(number: int, enters: bool, backward: bool, own: tuple[int, ...]) -> Any:
            def record(*_: Any) -> None:
                nonlocal in_backward
                in_backward |= backward
                self.visits.append(Event(number, enters, in_backward, in_backward and not backward, own))

            return record

        for number, module in enumerate(model.modules()):
            own = tuple(index[p] for p in module.parameters(recurse=False))
            module.register_forward_pre_hook(hook(number, True, False, own))
            module.register_forward_hook(hook(number, False, False, own))
            module.register_full_backward_pre_hook(hook(number, True, True, own))
            module.register_full_backward_hook(hook(number, False, True, own))


@dataclass(frozen=True)
class Transfer:
    """One kind of communication, over a whole optimizer step.

    Attributes:
        what: gradients or weights.
        kind: all-reduce, reduce-scatter, reduce (each part to its owner) or all-gather.
        buffer: bytes of the whole tensors, padding included.
        calls: collectives.
        ranks: that take part in each.
        under: forward or backward, the pass under which it may hide, or step: it stands alone.
        passes: how many of those passes a step has for it.
    """

    what: str
    kind: str
    buffer: float
    calls: int
    ranks: int
    under: str
    passes: int = 1

    @property
    def rounds(self) -> int:
        """Times that the data goes around the ring."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends by the ring algorithm, the ranks' mean."""
        return self.rounds * (self.ranks - 1) / self.ranks * self.buffer


def communication_volume(shape: ModuleTrace, ds: dict[str, Any], world_size: int, accumulation: int) -> list[Transfer]:
    """What a rank sends in one optimizer step.

    Args:
        shape: the model's.
        ds: the DeepSpeed JSON: stage, precision, `communication_data_type`, thresholds, ZeRO++'s switches. The
            quantised transfers of ZeRO++ are taken at 1 byte (weights) and 1/2 (gradients) an element, without scales.
        accumulation: micro-batches a step.
    """
    if world_size == 1:
        return []
    view = DeepSpeedJson(ds)
    zero, stage = view.zero, view.stage
    of_weight, of_gradient = _BYTES[view.precision], _BYTES[view.communication_data_type]
    if stage == 3:
        of_weight = 1 if zero.get("zero_quantized_weights") else of_weight
        of_gradient = 0.5 if zero.get("zero_quantized_gradients") else of_gradient
        return [
            _scattered_gradients(shape, zero, of_gradient, world_size, accumulation),
            *_gathered_weights(shape, zero, of_weight, world_size, accumulation),
        ]
    trained = sum(size for size, t in zip(shape.sizes, shape.trained) if t)
    if stage == 0:
        calls = math.ceil(trained / _STAGE_0_BUCKET)
        return [Transfer("gradients", "all-reduce", trained * of_gradient, calls, world_size, "step")]
    passes = accumulation if stage == 2 else 1
    apart = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    buckets = math.ceil(trained / zero.get("reduce_bucket_size", _BUCKET))
    return [
        Transfer(
            "gradients",
            "reduce" if apart else "all-reduce",
            trained * of_gradient * passes,
            buckets * passes * (world_size if apart else 1),
            world_size,
            "backward" if zero.get("overlap_comm") else "step",
            passes,
        ),
        # the flat weights are cut into equal parts of an even number of elements
        Transfer("weights", "all-gather", _padded(trained, 2 * world_size) * of_weight, 1, world_size, "step"),
    ]


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _scattered_gradients(shape: ModuleTrace, zero: dict, bytes_: float, world_size: int, accumulation: int) -> Transfer:
    """Stage 3's, each parameter's padded to equal parts."""
    sizes = [size for size, t in zip(shape.sizes, shape.trained) if t]
    scattered = zero.get("reduce_scatter", True)
    elements = sum(_padded(size, world_size) for size in sizes) if scattered else sum(sizes)
    calls = math.ceil(elements / zero.get("reduce_bucket_size", _BUCKET))
    return Transfer(
        "gradients",
        "reduce-scatter" if scattered else "all-reduce",
        elements * bytes_ * accumulation,
        calls * accumulation,
        world_size,
        "backward" if zero.get("overlap_comm", True) else "step",
        accumulation,
    )


def _gathered_weights(
    shape: ModuleTrace, zero: dict, bytes_: float, world_size: int, accumulation: int
) -> list[Transfer]:
    """Stage 3's: persistent ones once a step, the others as modules need them.

    With hierarchical partitioning (`zero_hpz_partition_size`) a node keeps a copy of what it gathered: only the first
    gather after an update goes to all ranks, and none of a frozen parameter.
    """
    threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    persistent = [i for i, size in enumerate(shape.sizes) if size <= threshold]
    once = sum(_padded(shape.sizes[i], world_size) for i in persistent) * bytes_
    transfers = [Transfer("weights", "all-gather", once, len(persistent), world_size, "step")]
    node = zero.get("zero_hpz_partition_size", 1)
    fetches, calls = fetched(
        shape,
        threshold,
        zero.get("stage3_prefetch_bucket_size", _PREFETCH),
        zero.get("stage3_max_live_parameters", _LIVE),
        zero.get("stage3_max_reuse_distance", _REUSE),
    )
    elements: Counter[tuple[str, int]] = Counter()
    for (parameter, under), times in fetches.items():
        size, times = _padded(shape.sizes[parameter], world_size), times * accumulation
        first = min(times, 1) if shape.trained[parameter] and under == "forward" else 0
        everywhere = times if node == 1 else first
        elements[under, world_size] += everywhere * size
        elements[under, node] += (times - everywhere) * size
    for (under, ranks), count in elements.items():
        if count:
            share = count / sum(n for (u, _), n in elements.items() if u == under)
            of_these = math.ceil(calls[under] * accumulation * share)
            hides = under if zero.get("overlap_comm", True) else "step"
            transfers.append(Transfer("weights", "all-gather", count * bytes_, of_these, ranks, hides, accumulation))
    return transfers


@functools.lru_cache(maxsize=16)  # it is the same on any number of ranks
def fetched(
    shape: ModuleTrace, threshold: int, prefetch: int, most: int, reuse: int
) -> tuple[Counter[tuple[int, str]], Counter[str]]:
    """How often stage 3 gathers each parameter in one micro-batch.

    Args:
        threshold, prefetch, most, reuse: elements, as in the JSON's `stage3_param_persistence_threshold`,
            `_prefetch_bucket_size`, `_max_live_parameters` and `_max_reuse_distance`.
    Returns:
        (parameter, forward or backward) to gathers, and collectives by pass.
    """
    coordinator = _Coordinator(shape, threshold, prefetch, most, reuse)
    for visit in shape.visits:
        (coordinator.enter if visit.enters else coordinator.leave)(visit)
    return coordinator.fetches, coordinator.calls


class _Coordinator:
    """Follows DeepSpeed's: what is gathered when a module is entered, and what goes when it is left.

    Entered: its parameters that are not there, then the next ones in order, `prefetch` elements of them, while no more
    than `most` are there. Left: its parameters go, unless they are needed again within `reuse` elements or the
    prefetch has already counted on them.
    """

    def __init__(self, shape: ModuleTrace, threshold: int, prefetch: int, most: int, reuse: int):
        self.shape, self.prefetch, self.most, self.reuse = shape, prefetch, most, reuse
        self.persistent = {i for i, size in enumerate(shape.sizes) if size <= threshold}
        self.order = [visit.parameters for visit in shape.visits if visit.enters]
        self.queue = deque((step, p) for step, parameters in enumerate(self.order) for p in parameters)
        self.counted_on = [-1] * len(shape.sizes)  # the last use that the prefetch has passed
        self.users: list[set[int]] = [set() for _ in shape.sizes]  # modules that are in
        self.there, self.live, self.step = set(self.persistent), 0, 0
        self.again: dict[
            int, set[int]
        ] = {}  # of modules in their backward: frozen ones that a forward brought meanwhile
        self.fetches: Counter[tuple[int, str]] = Counter()
        self.calls: Counter[str] = Counter()

    def enter(self, visit: Event) -> None:
        under = "backward" if visit.backward else "forward"
        if visit.backward and not visit.again:
            self.again[visit.module] = set()
        self._gather(set(visit.parameters) - self.there, under)
        for p in visit.parameters:
            self.users[p].add(visit.module)
            if visit.again and self.again and not self.shape.trained[p]:
                self.again[next(reversed(self.again))].add(p)
        for _ in {p for p in visit.parameters if self.counted_on[p] < self.step}:
            step, p = self.queue.popleft()
            self.counted_on[p] = step
        self._gather(self._next_ones(), under)
        self.step += 1

    def leave(self, visit: Event) -> None:
        own = set(visit.parameters)
        gone = {p for p in own if self.counted_on[p] <= self.step} - self._needed_soon()
        if visit.backward and not visit.again:
            brought = self.again.pop(visit.module, set())
            own, gone = own | brought, gone | brought
        for p in own:
            self.users[p].discard(visit.module)
        gone = {p for p in gone - self.persistent if p in self.there and not self.users[p]}
        self.there -= gone
        self.live -= sum(self.shape.sizes[p] for p in gone)

    def _gather(self, parameters: set[int], under: str) -> None:
        self.fetches.update((p, under) for p in parameters)
        self.calls[under] += bool(parameters)
        self.there |= parameters
        self.live += sum(self.shape.sizes[p] for p in parameters)

    def _next_ones(self) -> set[int]:
        """Parameters that the prefetch takes from the queue."""
        taken: set[int] = set()
        elements, room = 0, min(self.most - self.live, self.prefetch)
        while self.queue and elements < room:
            step, p = self.queue.popleft()
            self.counted_on[p] = max(self.counted_on[p], step)
            if p not in self.there and p not in taken:
                taken.add(p)
                elements += self.shape.sizes[p]
        return taken

    def _needed_soon(self) -> set[int]:
        """Parameters of the modules that come within the reuse distance."""
        soon: set[int] = set()
        passed = 0
        for parameters in itertools.islice(self.order, self.step, None):
            if passed >= self.reuse:
                break
            soon.update(parameters)
            passed += sum(self.shape.sizes[p] for p in parameters)
        return soon
