"""What a rank holds of the training state under any ZeRO stage: ranges of parameters, with their master weights,
Adam's moments and the moving average.

Stages 0-3 keep this state in different places, whole or partitioned. Here it has one form, so that a checkpoint is
written and read by parameter name and range, and resumes on another world size or another stage.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dit_ds.errors import UserError

MASTER, MOMENTS, AVERAGE = "master", ("exp_avg", "exp_avg_sq"), "ema"


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter.

    Attributes:
        name: of the parameter, by the module's names.
        start, numel: the range of the flattened parameter.
        flat: the master tensor that holds it, by which the optimizer finds its states.
        at: where in `flat` it begins.
        group: of ZeRO-3's sub-groups, which NVMe offload swaps out as a whole.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    at: int
    group: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """(numel,): this range of a tensor that is laid out as `flat`; a view."""
        return tensor.detach().view(-1)[self.at : self.at + self.numel]

    def part(self, index: int, parts: int) -> Fragment:
        """The index-th of so many nearly equal parts, perhaps empty."""
        low, high = (self.numel * i // parts for i in (index, index + 1))
        return replace(self, start=self.start + low, numel=high - low, at=self.at + low)


class TrainingState:
    """The trained parameters' fragments of this rank, in the engine's own memory.

    Args:
        engine: DeepSpeed's.
        decay: of an exponential moving average of the weights (EMA), kept as fp32 fragments; 0 keeps none.
    Raises:
        UserError: a moving average beside an optimizer on NVMe.
    """

    def __init__(self, engine: Any, decay: float = 0.0):
        self.engine, self.decay = engine, decay
        self.names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        self.shapes = {
            n: list(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters() if p.requires_grad
        }
        self.fragments = list(_fragments(engine))
        self.replicated = engine.zero_optimization_stage() == 0  # every rank holds all of it: each saves a part
        swappable = getattr(engine.optimizer, "_swappable_optimizer_subgroup", lambda group: False)
        self.swapped = any(swappable(f.group) for f in self.fragments)
        if self.swapped and decay:
            raise UserError(
                "train.ema_decay keeps a moving average in memory, which an optimizer on NVMe is to spare: drop one"
            )
        flats = {id(f.flat): f.flat.detach() for f in self.fragments}
        self._masters = list(flats.values())
        self._average = {i: x.clone() for i, x in flats.items()} if decay else {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is of each fragment."""
        return (MASTER, *MOMENTS, *((AVERAGE,) if self.decay else ()))

    def tensor(self, kind: str, fragment: Fragment) -> Tensor:
        """(numel,) view of the live tensor."""
        if kind == MASTER:
            return fragment.of(fragment.flat)
        if kind == AVERAGE:
            return fragment.of(self._average[id(fragment.flat)])
        return fragment.of(self._moments(fragment.flat)[kind])

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state = self.engine.basic_optimizer.state[flat]
        if not state:  # Adam makes them at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # on the device: fused
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
        return state

    def make_moments(self) -> None:
        """Make Adam's states of all fragments now, zero, as its first step would."""
        for f in self.resident(self.fragments):
            self._moments(f.flat)

    @property
    def adam_step(self) -> float:
        """Updates that Adam has made, the same for all parameters."""
        counts = [float(self._moments(f.flat)["step"]) for f in self.resident(self.fragments[:1])]
        return counts[0] if counts else 0.0

    def saved(self) -> Iterator[Fragment]:
        """The fragments that this rank saves: over all ranks every element once."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for f in self.fragments:
            part = f.part(rank, world) if self.replicated else f
            if part.numel:
                yield part

    def resident(self, fragments: Iterable[Fragment], write: bool = False) -> Iterator[Fragment]:
        """The fragments, each while its tensors are in memory.

        Args:
            write: what was changed meanwhile goes back to NVMe.
        """
        if not self.swapped:
            yield from fragments
            return
        optimizer = self.engine.optimizer
        for group, members in itertools.groupby(fragments, key=lambda f: f.group):
            optimizer._optimizer_states_and_gradient_swap_in(group)
            yield from members
            if write:
                optimizer._optimizer_states_and_gradient_swap_out(group)
            else:
                optimizer._release_swap_buffers(group)

    def fill(self, read: Callable[[str, str, int, int], Tensor], kinds: set[str], adam_step: float) -> None:
        """Load every fragment.

        Args:
            read: (kind, name, start, numel) -> (numel,).
            kinds: what there is to read; a moving average that was not kept yet starts from the master weights.
        """
        for f in self.resident(self.fragments, write=True):
            for kind in self.kinds:
                there = kind if kind in kinds else MASTER
                self.tensor(kind, f).copy_(read(there, f.name, f.start, f.numel))
            self._moments(f.flat)["step"].fill_(adam_step)

    @torch.no_grad()
    def update_average(self) -> None:
        """After an optimizer step: average += (1 - decay) * (master - average)."""
        if self.decay:
            torch._foreach_lerp_(list(self._average.values()), self._masters, 1 - self.decay)

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor of one kind, whole, fp32, on the device. Collective."""
        device = self.engine.device
        full = torch.zeros(torch.Size(self.shapes[name]).numel(), device=device)
        for f in self.resident(f for f in self.fragments if f.name == name):
            full[f.start : f.start + f.numel] = self.tensor(kind, f).to(device)
        if not self.replicated:
            dist.all_reduce(full)  # each element is 0 on all ranks but its owner's
        return full.view(self.shapes[name])

    @torch.no_grad()
    def averaged(self, gather: Callable[..., Any]) -> _Averaged:
        """A context in which the module computes with the moving average. Collective.

        Args:
            gather: `deepspeed.zero.GatheredParameters`.
        """
        return _Averaged(self, gather)


class _Averaged:
    def __init__(self, state: TrainingState, gather: Callable[..., Any]):
        self.state, self.gather = state, gather

    def __enter__(self) -> None:
        s = self.state
        if s.decay:
            # in fp32 the module's weights may be the masters themselves: put aside what is overwritten
            self.masters = [s.tensor(MASTER, f).clone() for f in s.fragments]
            self._set(AVERAGE)

    def __exit__(self, error: Any, *_: Any) -> None:
        s = self.state
        if s.decay and error is None:  # one rank's error: the others are elsewhere, and nothing uses the weights again
            for f, master in zip(s.fragments, self.masters):
                s.tensor(MASTER, f).copy_(master)
            self._set(MASTER)

    @torch.no_grad()
    def _set(self, kind: str) -> None:
        s = self.state
        # one parameter after the other may overwrite masters that alias it, but only its own
        parameters = dict(s.engine.module.named_parameters())
        for name in s.names:
            p, full = parameters[name], s.whole(kind, name)
            with self.gather([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(full)


def _fragments(engine: Any) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        for name, p in trained:
            group, at, numel = optimizer.grad_position[optimizer.get_param_id(p)]
            start = numel * optimizer._get_param_partition_rank(p)
            numel = min(numel, p.ds_numel - start)  # the last partition is padded
            if numel > 0:
                yield Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], at, group)
    elif trained and hasattr(trained[0][1], "_hp_mapping"):  # stages 1 and 2: a range of all parameters laid end to end
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        for name, p in trained:
            m = p._hp_mapping
            if m is not None:
                lp, hp = m.lp_fragment_address, m.hp_fragment_address
                yield Fragment(name, lp.start, lp.numel, flats[m.param_group_index], hp.start)
    elif hasattr(optimizer, "fp32_groups"):  # stage 0, bf16 or fp16
        masters = dict(zip(map(id, sum(optimizer.fp16_groups, [])), sum(optimizer.fp32_groups, [])))
        for name, p in trained:
            yield Fragment(name, 0, p.numel(), masters[id(p)], 0)
    else:  # stage 0, fp32: plain Adam over the module's own parameters
        for name, p in trained:
            yield Fragment(name, 0, p.numel(), p, 0)


_BLOCK = 1 << 15  # elements of a parameter that share a factor; so few that they stay in cache, and in one thread


def digest(name: str, start: int, x: Tensor) -> int:
    """The elements' bits, each times a factor of its parameter and its place, added up modulo 2^64.

    Sums over fragments are the same however the parameters are cut up, so that they can be compared between world
    sizes and ZeRO stages. The factors are odd: a single changed bit always shows.

    Args:
        x: (numel,), fp32, the parameter's elements from `start` on.
    """
    bits, within = x.contiguous().float().view(torch.int32), _factors(_BLOCK, x.device)
    seed, total, at = zlib.crc32(name.encode()), torch.zeros((), dtype=torch.int64, device=x.device), 0
    while at < bits.numel():
        block, first = divmod(start + at, _BLOCK)
        piece = bits[at : at + _BLOCK - first]
        of_block = _odd(seed << 32 | block)
        total += of_block * (piece.to(torch.int64) * within[first : first + piece.numel()]).sum()  # wraps around
        at += piece.numel()
    return int(total) % (1 << 64)


@functools.cache
def _factors(number: int, device: torch.device) -> Tensor:
    words = np.random.Philox(key=0).random_raw(number) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64)).to(device)


def _odd(seed: int) -> int:
    return int((np.random.Philox(key=seed).random_raw(1) | np.uint64(1)).view(np.int64)[0])
