"""The states that an optimizer keeps of the master tensors, by fragment: AdamW's, 8-bit AdamW's and Muon's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_ds.engine.eight_bit import dequantize, quantize
from dit_ds.engine.zero_layout import Fragment, private

MOMENTS, MOMENTUM = ("exp_avg", "exp_avg_sq"), "momentum"
Read = Callable[[str, str, int, int], Tensor]  # kind, name, start, numel


class AdamWStates:
    """AdamW's moments, fp32 tensors of the masters' shapes.

    Attributes:
        rounded: the kinds that are stored in fewer bits: what is loaded may differ from what is then read.
        changed_in_backward: the kinds that the backward pass changes already; all others change in the step alone.
    """

    rounded: frozenset[str] = frozenset()
    changed_in_backward: frozenset[str] = frozenset()

    def __init__(self, engine: Any):
        self.engine = engine

    def kinds(self, fragment: Fragment) -> tuple[str, ...]:
        """The kinds of state that a fragment has."""
        return MOMENTS

    def tensor(self, kind: str, fragment: Fragment) -> Tensor:
        """(numel,) state of a fragment; a view where it is not `rounded`."""
        return fragment.view(self._state(fragment.flat)[kind])

    def make(self, fragment: Fragment) -> None:
        """Allocate a fragment's states, zero, as the first step would."""
        self._state(fragment.flat)

    def step(self, fragment: Fragment) -> float:
        """The number of updates that AdamW has made of the fragment."""
        return float(self._state(fragment.flat)["step"])

    def load(self, fragments: list[Fragment], read: Read, step: float) -> None:
        """Fill the states of all fragments."""
        for f in fragments:
            for kind in self.kinds(f):
                self.tensor(kind, f).copy_(read(kind, f.name, f.start, f.numel))
            self._state(f.flat)["step"].fill_(step)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """AdamW's state of a master tensor, made as its first step would where there is none yet."""
        state = self.engine.basic_optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # on the device: fused
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
        return state


class MuonStates(AdamWStates):
    """Muon's momentum of its matrices, AdamW's moments of all else, at ZeRO stages 1 and 2.

    A rank keeps the whole momentum of each matrix of which its partition holds a part: one group's in one buffer, end to
    end, in the gradients' type. DeepSpeed updates it where it reduces the gradients.
    """

    changed_in_backward = frozenset((MOMENTUM,))

    def __init__(self, engine: Any):
        super().__init__(engine)
        optimizer = engine.optimizer
        names = {id(p): n for n, p in engine.module.named_parameters()}
        self._of_muon: dict[int, int] = {}  # id of the master tensor: elements of the group's momentum here
        self._where: dict[str, tuple[int, int]] = {}  # a matrix's offset in its group's buffer, and its elements
        for group, held in zip(engine.basic_optimizer.param_groups, private(optimizer, "params_in_partition")):
            if group["use_muon"]:
                at = 0
                for p in held:
                    self._where[names[id(p)]] = (at, p.numel())
                    at += p.numel()
                self._of_muon[id(group["params"][0])] = at
        # at stage 2 the model's own, see `_muon_momentum_buffer` of DeepSpeed's optimizer
        own = optimizer.dtype if optimizer.partition_gradients else optimizer.gradient_accumulation_dtype
        self._dtype: torch.dtype = own

    def kinds(self, fragment: Fragment) -> tuple[str, ...]:
        """The momentum of a matrix; the moments of another parameter."""
        return (MOMENTUM,) if id(fragment.flat) in self._of_muon else MOMENTS

    def tensor(self, kind: str, fragment: Fragment) -> Tensor:
        """(numel,) view."""
        if kind != MOMENTUM:
            return super().tensor(kind, fragment)
        return self._momentum(fragment)[fragment.start : fragment.start + fragment.numel]

    def _momentum(self, fragment: Fragment) -> Tensor:
        """The momentum of the whole matrix that a fragment is of, flattened."""
        state = self.engine.basic_optimizer.state[fragment.flat]
        if "momentum_buffer" not in state:
            size = self._of_muon[id(fragment.flat)]
            state["momentum_buffer"] = torch.zeros(size, dtype=self._dtype, device=fragment.flat.device)
        at, numel = self._where[fragment.name]
        return state["momentum_buffer"][at : at + numel]

    def make(self, fragment: Fragment) -> None:
        """Allocate a fragment's states, zero."""
        if self.kinds(fragment) == MOMENTS:
            super().make(fragment)
        else:
            self._momentum(fragment)

    def load(self, fragments: list[Fragment], read: Read, step: float) -> None:
        """Fill the states of all fragments."""
        super().load([f for f in fragments if self.kinds(f) == MOMENTS], read, step)
        for f in fragments:
            if self.kinds(f) == (MOMENTUM,):
                whole = self._momentum(f)
                whole.copy_(read(MOMENTUM, f.name, 0, whole.numel()))


class EightBitStates(AdamWStates):
    """bitsandbytes' two moments: codes of 8 bits, and a scale for each block of a master tensor.

    They are read as fp32. Loaded by the ranks and at the stage that saved them they are what they were to the bit; under
    another partition a block has other elements, and they are rounded anew.
    """

    rounded = frozenset(MOMENTS)
    _KEYS = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}

    def tensor(self, kind: str, fragment: Fragment) -> Tensor:
        """(numel,) fp32, a copy."""
        codes, scales, table = self._stored(kind, fragment.flat)
        if scales is None:  # too few elements: fp32
            return fragment.view(codes).clone()
        return dequantize(codes.view(-1), scales, table, fragment.offset, fragment.numel)

    def load(self, fragments: list[Fragment], read: Read, step: float) -> None:
        """Fill the states of all fragments."""
        for flat in {id(f.flat): f.flat for f in fragments}.values():
            for kind in MOMENTS:
                codes, scales, table = self._stored(kind, flat)
                values = torch.zeros(flat.numel(), device=flat.device)
                for f in fragments:
                    if f.flat is flat:
                        f.view(values).copy_(read(kind, f.name, f.start, f.numel))
                if scales is None:
                    codes.view(-1).copy_(values)
                else:
                    quantize(values, codes.view(-1), scales, table)
            self._state(flat)["step"] = int(step)

    def _stored(self, kind: str, flat: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        state = self._state(flat)
        codes, scales, table = self._KEYS[kind]
        return state[codes], state.get(scales), state.get(table)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        optimizer = self.engine.basic_optimizer
        if not optimizer.state[flat]:
            group = optimizer.param_groups[0]
            listed, group["params"] = group["params"], [flat]  # it looks there; ZeRO-3 lists none between steps
            optimizer.init_state(group, flat, 0, 0)
            group["params"] = listed
        return optimizer.state[flat]


def optimizer_states(engine: Any) -> AdamWStates:
    """The states of the engine's optimizer, by its class."""
    kind = type(engine.basic_optimizer).__name__
    return {"MuonWithAuxAdam": MuonStates, "AdamW8bit": EightBitStates}.get(kind, AdamWStates)(engine)
