"""A rank's part of the training state at any ZeRO stage: master weights, the optimizer's states and the moving average
of the weights, by parameter name and range.

ZeRO's stages store this state in different tensors, whole or partitioned (`zero_layout`). Here it has one form, so that
a checkpoint resumes on another number of ranks and at another stage.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dit_ds.distributed import gather_objects
from dit_ds.engine.optimizer_states import MOMENTS, optimizer_states
from dit_ds.engine.zero_layout import TESTED_DEEPSPEED, Fragment, coverage_error, find_fragments, private
from dit_ds.errors import RunFailed

MASTER, AVERAGE = "master", "ema"


class TrainingState:
    """This rank's fragments of the trained parameters, as views into DeepSpeed's tensors.

    Args:
        engine: DeepSpeed's.
        decay: of an exponential moving average (EMA) of the weights, which is stored as fp32 fragments; 0 for none.
    Raises:
        UserError: this release of DeepSpeed stores its state in another way.
    """

    def __init__(self, engine: Any, decay: float = 0.0):
        self.engine, self.decay = engine, decay
        self.stage: int = engine.zero_optimization_stage()
        trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self.names = list(trained)
        self.shapes = {n: list(private(p, "ds_shape") if self.stage == 3 else p.shape) for n, p in trained.items()}
        self.fragments = find_fragments(engine)
        self.optimizer = optimizer_states(engine)
        self.replicated = self.stage == 0  # every rank holds whole parameters, and saves a part of each
        flats = {id(f.flat): f.flat.detach() for f in self.fragments}
        self._masters = list(flats.values())
        self._average = {i: x.clone() for i, x in flats.items()} if decay else {}
        self._before_change: Callable[[], None] = lambda: None

    def kinds(self, fragment: Fragment) -> tuple[str, ...]:
        """The kinds of tensor that a fragment has."""
        return (MASTER, *self.optimizer.kinds(fragment), *((AVERAGE,) if self.decay else ()))

    def all_kinds(self) -> list[str]:
        """The kinds that any of this rank's fragments has, the masters first."""
        return list(dict.fromkeys(itertools.chain([MASTER], *(self.kinds(f) for f in self.fragments))))

    def tensor(self, kind: str, fragment: Fragment) -> Tensor:
        """(numel,) of a fragment: a view into the tensor that training updates, or a copy of what is stored in 8 bits."""
        if kind == MASTER:
            return fragment.view(fragment.flat)
        if kind == AVERAGE:
            return fragment.view(self._average[id(fragment.flat)])
        return self.optimizer.tensor(kind, fragment)

    def before_change(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever these tensors are about to change: before each update, loading, or lending of the
        weights' memory. Forward and backward passes change none but `optimizer.changed_in_backward`."""
        self._before_change = call
        self.engine.basic_optimizer.register_step_pre_hook(lambda *_: call())

    def make_states(self) -> None:
        """Allocate the optimizer's states of all fragments, zero, as its first step would."""
        for f in self.fragments:
            self.optimizer.make(f)

    @property
    def adam_step(self) -> float:
        """The number of updates that AdamW has made, the same for all parameters; 0 on a rank without fragments of its."""
        first = next((f for f in self.fragments if MOMENTS[0] in self.optimizer.kinds(f)), None)
        return self.optimizer.step(first) if first else 0.0

    def saved(self) -> list[Fragment]:
        """The fragments that this rank saves: together the ranks' cover every element once."""
        if not self.replicated:
            return self.fragments
        rank, world = dist.get_rank(), dist.get_world_size()
        return [part for f in self.fragments if (part := f.split(rank, world)).numel]

    def check_coverage(self) -> None:
        """Check that the ranks' fragments cover every trained parameter exactly once. Collective.

        At stage 3 the fragments are compared with DeepSpeed's public accessor, too.

        Raises:
            RunFailed: on all ranks alike, where they don't: checkpoints would not be complete.
        """
        ranges = [(f.name, f.start, f.numel) for f in self.saved()]
        gathered = gather_objects((ranges, self._fragment_error()))
        sizes = {n: torch.Size(shape).numel() for n, shape in self.shapes.items()}
        errors = [e for _, e in gathered if e]
        error = errors[0] if errors else coverage_error(sizes, itertools.chain(*(r for r, _ in gathered)))
        if error:
            raise RunFailed(
                f"the state that ZeRO stage {self.stage} holds is not all of the model's ({error}): "
                f"checkpoints would not be whole; DeepSpeed {TESTED_DEEPSPEED} was tested"
            )

    def _fragment_error(self) -> str | None:
        """What is wrong with this rank's fragments by themselves."""
        for f in self.fragments:
            if self.tensor(MASTER, f).numel() != f.numel:
                return f"{f.name} ends {f.numel - self.tensor(MASTER, f).numel()} elements early"
        if self.stage != 3:
            return None
        from deepspeed.utils import safe_get_local_fp32_param

        parameters = dict(self.engine.module.named_parameters())
        for f in self.fragments:
            partition, master = safe_get_local_fp32_param(parameters[f.name]), self.tensor(MASTER, f)
            if partition is None:
                return f"safe_get_local_fp32_param returns None for {f.name}"
            # a copy where the masters are offloaded from a GPU; otherwise the same memory
            if partition.data_ptr() != master.data_ptr() and not torch.equal(
                partition.view(-1)[: f.numel].to(master.device), master
            ):
                return f"safe_get_local_fp32_param differs for {f.name}"
        return None

    def load(self, read: Callable[[str, str, int, int], Tensor], kinds: set[str], adam_step: float) -> None:
        """Fill every fragment.

        Args:
            read: (kind, name, start, numel) -> (numel,).
            kinds: those that `read` has; without a moving average, it starts from the master weights.
            adam_step: the number of updates that AdamW had made.
        """
        self._before_change()
        for f in self.fragments:
            for kind in (MASTER, AVERAGE) if self.decay else (MASTER,):
                self.tensor(kind, f).copy_(read(kind if kind in kinds else MASTER, f.name, f.start, f.numel))
        self.optimizer.load(self.fragments, read, adam_step)

    def averages(self) -> Iterable[Tensor]:
        """The moving averages, fp32, one of each master tensor's shape; none without a moving average."""
        return self._average.values()

    @torch.no_grad()
    def update_average(self) -> None:
        """After an optimizer step: average += (1 - decay) * (master - average)."""
        if self.decay:
            self._before_change()
            torch._foreach_lerp_(list(self._average.values()), self._masters, 1 - self.decay)

    def full_tensor(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor of one kind, gathered from all ranks, fp32, on the device. Collective."""
        device = self.engine.device
        full = torch.zeros(torch.Size(self.shapes[name]).numel(), device=device)
        for f in self.fragments:
            if f.name == name:
                full[f.start : f.start + f.numel] = self.tensor(kind, f).to(device)
        if not self.replicated:
            dist.all_reduce(full)  # an element is 0 on all ranks but the one that holds it
        return full.view(self.shapes[name])

    @contextlib.contextmanager
    def average_in_module(self, gather: Callable[..., Any]) -> Iterator[None]:
        """A context in which the module computes with the moving average. Collective.

        After an exception the weights are not restored: that is a collective, and the other ranks may be elsewhere.

        Args:
            gather: `deepspeed.zero.GatheredParameters`.
        """
        if not self.decay:
            yield
            return
        self._before_change()
        # in fp32 the module's weights may be the masters themselves, and are overwritten
        masters = [self.tensor(MASTER, f).clone() for f in self.fragments]
        self._set_module(AVERAGE, gather)
        yield
        for f, master in zip(self.fragments, masters):
            self.tensor(MASTER, f).copy_(master)
        self._set_module(MASTER, gather)

    @torch.no_grad()
    def _set_module(self, kind: str, gather: Callable[..., Any]) -> None:
        """Copy tensors of one kind to the module's weights, one parameter at a time."""
        parameters = dict(self.engine.module.named_parameters())
        for name in self.names:
            p, full = parameters[name], self.full_tensor(kind, name)
            with gather([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(full)


# elements of a parameter that share a factor: few enough to stay in cache and in one thread
_BLOCK = 1 << 15


def digest(name: str, start: int, x: Tensor) -> int:
    """A checksum of a parameter's elements: their bits, each times a factor that depends on the parameter's name and
    the element's index, summed modulo 2^64.

    Sums over fragments do not depend on how parameters are partitioned, so that they compare between numbers of ranks
    and ZeRO stages. The factors are odd: a single changed bit always changes the sum.

    Args:
        name: of the parameter.
        start: index of the first element of `x` in the flattened parameter.
        x: (numel,), fp32.
    """
    bits, factors = x.contiguous().float().view(torch.int32), _factors(_BLOCK, x.device)
    seed, total, at = zlib.crc32(name.encode()), torch.zeros((), dtype=torch.int64, device=x.device), 0
    while at < bits.numel():
        block, first = divmod(start + at, _BLOCK)
        piece = bits[at : at + _BLOCK - first]
        block_factor = _odd(seed << 32 | block)
        total += block_factor * (piece.to(torch.int64) * factors[first : first + piece.numel()]).sum()  # wraps around
        at += piece.numel()
    return int(total) % (1 << 64)


@functools.cache
def _factors(number: int, device: torch.device) -> Tensor:
    raw = np.random.Philox(key=0).random_raw(number) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).to(device)


def _odd(seed: int) -> int:
    return int((np.random.Philox(key=seed).random_raw(1) | np.uint64(1)).view(np.int64)[0])
