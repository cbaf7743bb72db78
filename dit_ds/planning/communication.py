"""Bytes that a rank sends in one optimizer step under each ZeRO stage, by formula, after what DeepSpeed 0.19 does.

    stage 0   gradients all-reduced once a step, after the backward pass
    stage 1   gradients all-reduced once a step, within the last backward pass; updated weights all-gathered
    stage 2   gradients all-reduced once a micro-batch; updated weights all-gathered
    stage 3   gradients reduce-scattered once a micro-batch; weights all-gathered when a module needs them, those below
              the persistence threshold once a step

Stages 1 and 2 all-reduce although each rank keeps only its partition: `use_multi_rank_bucket_allreduce`, DeepSpeed's
default, joins the partitions of all ranks into one call. If it is false, each partition is reduced to its rank alone, at
half of the bytes.

Left out of the formula: the gradient norm, its overflow flag and the logged means (a few numbers a step), and what
happens once (weights broadcast at the start, the comparison of module orders).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from dit_ds.engine.deepspeed_json import DeepSpeedJson

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
# DeepSpeed's defaults, in elements
_PREFETCH, _MAX_REUSE, _MAX_LIVE, _PERSISTENCE = 50_000_000, 1_000_000_000, 1_000_000_000, 100_000
_BUCKET, _STAGE_0_BUCKET = 500_000_000, 500_000_000


class Event(NamedTuple):
    """A module is entered or left.

    Attributes:
        module: its index in `model.modules()`.
        enters: True at its start, False at its end.
        backward: the backward pass has begun.
        recompute: a forward call within the backward pass, by activation checkpointing.
        parameters: indices of its direct parameters, without those of its children.
    """

    module: int
    enters: bool
    backward: bool
    recompute: bool
    parameters: tuple[int, ...]


@dataclass(eq=False)
class ModuleTrace:
    """The parameters of a model and the order in which its modules run; `record` and one training step fill it.

    Attributes:
        sizes: elements of each parameter.
        trained: `requires_grad` of each parameter.
        events: the modules' order in the forward and the backward pass.
    """

    sizes: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def trained_size(self) -> int:
        """Elements of all trained parameters."""
        return sum(size for size, trained in zip(self.sizes, self.trained) if trained)

    def record(self, model: nn.Module) -> None:
        """Record the parameters now, and from now on the events of every step, by hooks on all modules."""
        index = {p: i for i, p in enumerate(model.parameters())}
        self.sizes = [p.numel() for p in index]
        self.trained = [p.requires_grad for p in index]
        in_backward = False

        def hook(module: int, enters: bool, backward: bool, parameters: tuple[int, ...]) -> Callable[..., None]:
            def append(*_: Any) -> None:
                nonlocal in_backward
                in_backward |= backward
                self.events.append(Event(module, enters, in_backward, in_backward and not backward, parameters))

            return append

        for i, module in enumerate(model.modules()):
            direct = tuple(index[p] for p in module.parameters(recurse=False))
            module.register_forward_pre_hook(hook(i, True, False, direct))
            module.register_forward_hook(hook(i, False, False, direct))
            module.register_full_backward_pre_hook(hook(i, True, True, direct))
            module.register_full_backward_hook(hook(i, False, True, direct))


@dataclass(frozen=True)
class Transfer:
    """All collectives of one kind in an optimizer step.

    Attributes:
        payload: gradients or weights.
        collective: all-reduce, reduce-scatter, reduce (each partition to its rank) or all-gather.
        buffer: bytes of the whole tensors, padding included.
        calls: number of collectives.
        ranks: number of ranks in each.
        overlaps: forward or backward, the pass whose computation can hide it; step where none does.
        passes: how many of those passes in a step it is spread over.
    """

    payload: str
    collective: str
    buffer: float
    calls: int
    ranks: int
    overlaps: str
    passes: int = 1

    @property
    def rounds(self) -> int:
        """Times that the data goes around the ring."""
        return 2 if self.collective == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends by the ring algorithm, averaged over the ranks."""
        return self.rounds * (self.ranks - 1) / self.ranks * self.buffer


def communication_volume(trace: ModuleTrace, ds: dict[str, Any], world_size: int, accumulation: int) -> list[Transfer]:
    """What a rank sends in one optimizer step.

    Args:
        trace: of the model.
        ds: the DeepSpeed JSON: stage, precision, `communication_data_type`, thresholds, ZeRO++'s switches. The
            quantised transfers of ZeRO++ are taken at 1 byte (weights) and 1/2 (gradients) an element, without scales.
        accumulation: micro-batches a step.
    Returns:
        The transfers; none for one rank.
    """
    if world_size == 1:
        return []
    view = DeepSpeedJson(ds)
    zero, stage = view.zero, view.stage
    weight_bytes: float = _BYTES[view.precision]
    gradient_bytes: float = _BYTES[view.communication_data_type]
    if stage == 3:
        weight_bytes = 1 if zero.get("zero_quantized_weights") else weight_bytes
        gradient_bytes = 0.5 if zero.get("zero_quantized_gradients") else gradient_bytes
        return [
            _scattered_gradients(trace, zero, gradient_bytes, world_size, accumulation),
            *_gathered_weights(trace, zero, weight_bytes, world_size, accumulation),
        ]
    gradients = functools.partial(Transfer, payload="gradients", ranks=world_size)
    buffer = trace.trained_size * gradient_bytes
    if stage == 0:
        calls = math.ceil(trace.trained_size / _STAGE_0_BUCKET)
        return [gradients(collective="all-reduce", buffer=buffer, calls=calls, overlaps="step")]
    passes = accumulation if stage == 2 else 1
    per_rank = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    buckets = math.ceil(trace.trained_size / zero.get("reduce_bucket_size", _BUCKET))
    return [
        gradients(
            collective="reduce" if per_rank else "all-reduce",
            buffer=buffer * passes,
            calls=buckets * passes * (world_size if per_rank else 1),
            overlaps="backward" if zero.get("overlap_comm") else "step",
            passes=passes,
        ),
        # the flat weights are cut into equal partitions of an even number of elements
        _gather(_padded(trace.trained_size, 2 * world_size) * weight_bytes, 1, world_size, "step"),
    ]


def _gather(buffer: float, calls: int, ranks: int, overlaps: str, passes: int = 1) -> Transfer:
    return Transfer(
        payload="weights", collective="all-gather", buffer=buffer, calls=calls, ranks=ranks, overlaps=overlaps,
        passes=passes,
    )  # fmt: skip


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _scattered_gradients(
    trace: ModuleTrace, zero: dict[str, Any], element_bytes: float, world_size: int, accumulation: int
) -> Transfer:
    """Gradients of stage 3; each parameter's are padded to equal partitions."""
    sizes = [size for size, trained in zip(trace.sizes, trace.trained) if trained]
    scattered = zero.get("reduce_scatter", True)
    elements = sum(_padded(size, world_size) for size in sizes) if scattered else sum(sizes)
    calls = math.ceil(elements / zero.get("reduce_bucket_size", _BUCKET))
    return Transfer(
        payload="gradients",
        collective="reduce-scatter" if scattered else "all-reduce",
        buffer=elements * element_bytes * accumulation,
        calls=calls * accumulation,
        ranks=world_size,
        overlaps="backward" if zero.get("overlap_comm", True) else "step",
        passes=accumulation,
    )


def _gathered_weights(
    trace: ModuleTrace, zero: dict[str, Any], element_bytes: float, world_size: int, accumulation: int
) -> list[Transfer]:
    """Weights of stage 3: persistent ones are gathered once a step, the others as modules need them.

    With hierarchical partitioning (`zero_hpz_partition_size`) a node keeps a copy of what it gathered: only the first
    gather after an update goes to all ranks, and for a frozen parameter none does.
    """
    threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENCE)
    persistent = [size for size in trace.sizes if size <= threshold]
    once = sum(_padded(size, world_size) for size in persistent) * element_bytes
    transfers = [_gather(once, len(persistent), world_size, "step")]
    node = zero.get("zero_hpz_partition_size", 1)
    fetches, calls = count_fetches(
        trace,
        threshold,
        zero.get("stage3_prefetch_bucket_size", _PREFETCH),
        zero.get("stage3_max_live_parameters", _MAX_LIVE),
        zero.get("stage3_max_reuse_distance", _MAX_REUSE),
    )
    elements: Counter[tuple[str, int]] = Counter()  # by pass and number of ranks
    for (parameter, pass_), times in fetches.items():
        size, times = _padded(trace.sizes[parameter], world_size), times * accumulation
        first = min(times, 1) if trace.trained[parameter] and pass_ == "forward" else 0
        global_gathers = times if node == 1 else first
        elements[pass_, world_size] += global_gathers * size
        elements[pass_, node] += (times - global_gathers) * size
    for (pass_, ranks), count in elements.items():
        if count:
            share = count / sum(n for (p, _), n in elements.items() if p == pass_)
            share_of_calls = math.ceil(calls[pass_] * accumulation * share)
            overlaps = pass_ if zero.get("overlap_comm", True) else "step"
            transfers.append(_gather(count * element_bytes, share_of_calls, ranks, overlaps, passes=accumulation))
    return transfers


@functools.lru_cache(maxsize=16)  # the counts are the same on any number of ranks
def count_fetches(
    trace: ModuleTrace, persistence_threshold: int, prefetch: int, max_live: int, max_reuse: int
) -> tuple[Counter[tuple[int, str]], Counter[str]]:
    """How often stage 3 gathers each parameter in one micro-batch.

    Args:
        persistence_threshold, prefetch, max_live, max_reuse: elements, as in the JSON's
            `stage3_param_persistence_threshold`, `stage3_prefetch_bucket_size`, `stage3_max_live_parameters` and
            `stage3_max_reuse_distance`.
    Returns:
        Gathers by (parameter, forward or backward), and collectives by pass.
    """
    coordinator = _Coordinator(trace, persistence_threshold, prefetch, max_live, max_reuse)
    for event in trace.events:
        (coordinator.enter if event.enters else coordinator.leave)(event)
    return coordinator.fetches, coordinator.calls


class _Coordinator:
    """Follows DeepSpeed's `PartitionedParameterCoordinator`: which parameters are gathered and released, and when.

    When a module is entered, its parameters that are partitioned are gathered, then the next ones in order, up to
    `prefetch` elements, while no more than `max_live` are gathered. When it is left, its parameters are released, unless
    they are needed within the next `max_reuse` elements or a prefetch has passed a later use of them.
    """

    def __init__(self, trace: ModuleTrace, persistence_threshold: int, prefetch: int, max_live: int, max_reuse: int):
        self.trace, self.prefetch, self.max_live, self.max_reuse = trace, prefetch, max_live, max_reuse
        self.persistent = {i for i, size in enumerate(trace.sizes) if size <= persistence_threshold}
        self.order = [event.parameters for event in trace.events if event.enters]
        self.queue = deque((step, p) for step, parameters in enumerate(self.order) for p in parameters)
        self.prefetched_until = [-1] * len(trace.sizes)  # the last use of a parameter that the queue has passed
        self.users: list[set[int]] = [set() for _ in trace.sizes]  # modules that have been entered and not left
        self.gathered, self.live, self.step = set(self.persistent), 0, 0
        # by module in its backward pass: frozen parameters that a recomputed forward has used since it began
        self.recomputed: dict[int, set[int]] = {}
        self.fetches: Counter[tuple[int, str]] = Counter()
        self.calls: Counter[str] = Counter()

    def enter(self, event: Event) -> None:
        pass_ = "backward" if event.backward else "forward"
        if event.backward and not event.recompute:
            self.recomputed[event.module] = set()
        self._gather(set(event.parameters) - self.gathered, pass_)
        for p in event.parameters:
            self.users[p].add(event.module)
            if event.recompute and self.recomputed and not self.trace.trained[p]:
                self.recomputed[next(reversed(self.recomputed))].add(p)
        for _ in {p for p in event.parameters if self.prefetched_until[p] < self.step}:
            step, p = self.queue.popleft()
            self.prefetched_until[p] = step
        self._gather(self._to_prefetch(), pass_)
        self.step += 1

    def leave(self, event: Event) -> None:
        used = set(event.parameters)
        released = {p for p in used if self.prefetched_until[p] <= self.step} - self._needed_soon()
        if event.backward and not event.recompute:
            recomputed = self.recomputed.pop(event.module, set())
            used, released = used | recomputed, released | recomputed
        for p in used:
            self.users[p].discard(event.module)
        released = {p for p in released - self.persistent if p in self.gathered and not self.users[p]}
        self.gathered -= released
        self.live -= sum(self.trace.sizes[p] for p in released)

    def _gather(self, parameters: set[int], pass_: str) -> None:
        self.fetches.update((p, pass_) for p in parameters)
        self.calls[pass_] += bool(parameters)
        self.gathered |= parameters
        self.live += sum(self.trace.sizes[p] for p in parameters)

    def _to_prefetch(self) -> set[int]:
        """Parameters that the prefetch takes from the queue."""
        taken: set[int] = set()
        elements, limit = 0, min(self.max_live - self.live, self.prefetch)
        while self.queue and elements < limit:
            step, p = self.queue.popleft()
            self.prefetched_until[p] = max(self.prefetched_until[p], step)
            if p not in self.gathered and p not in taken:
                taken.add(p)
                elements += self.trace.sizes[p]
        return taken

    def _needed_soon(self) -> set[int]:
        """Parameters of the modules that come within the reuse distance."""
        soon: set[int] = set()
        passed = 0
        for parameters in itertools.islice(self.order, self.step, None):
            if passed >= self.max_reuse:
                break
            soon.update(parameters)
            passed += sum(self.trace.sizes[p] for p in parameters)
        return soon
