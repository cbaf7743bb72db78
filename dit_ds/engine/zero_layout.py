"""Where DeepSpeed stores a rank's fp32 master weights at each ZeRO stage, as ranges of named parameters.

DeepSpeed has no public interface for these ranges. Its private attributes are read in this module alone, through
`private`: where a release of DeepSpeed renames one, the run stops at its start, and `coverage_error` finds a layout that
changed under the same names.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_ds.errors import UserError

TESTED_DEEPSPEED = "0.19.8"


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one flattened parameter, as a rank stores it.

    Attributes:
        name: of the parameter, as in `named_parameters()`.
        start, numel: the range, in elements of the flattened parameter.
        flat: the fp32 master tensor that holds it; the optimizer's states are keyed by it and have its shape.
        offset: of the range's first element in the flattened `flat`.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """(numel,) view of this range in a tensor of `flat`'s shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]

    def split(self, index: int, parts: int) -> Fragment:
        """The index-th of `parts` nearly equal consecutive ranges; it may be empty."""
        low, high = (self.numel * i // parts for i in (index, index + 1))
        return replace(self, start=self.start + low, numel=high - low, offset=self.offset + low)


def private(owner: Any, name: str) -> Any:
    """An attribute of DeepSpeed's that is not part of its public interface.

    Raises:
        UserError: it is missing or None.
    """
    value = getattr(owner, name, None)
    if value is None:
        raise incompatible(f"{type(owner).__name__} has no '{name}'")
    return value


def incompatible(problem: str) -> UserError:
    """The error of a DeepSpeed release whose internals differ from those that were tested."""
    installed = importlib.metadata.version("deepspeed")
    return UserError(
        f"DeepSpeed {installed}: {problem}, without which the training state can't be saved: "
        f"install the tested release (pip install deepspeed=={TESTED_DEEPSPEED})"
    )


def find_fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of all trained parameters, at most one a parameter.

    At stage 0 they are the whole parameters, on every rank.

    Raises:
        UserError: a layout of DeepSpeed's that is not known.
    """
    stage = engine.zero_optimization_stage()
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if stage == 3:
        return _stage_3(engine.optimizer, trained)
    if stage in (1, 2):
        return _stage_1_or_2(engine, trained)
    if stage == 0:
        return _stage_0(engine, trained)
    raise incompatible(f"ZeRO stage {stage} is not known")


def _stage_3(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> list[Fragment]:
    """Each parameter in equal partitions, one a rank, the last of them padded; partitions lie end to end in
    sub-groups."""
    flats, positions = private(optimizer, "fp32_partitioned_groups_flat"), private(optimizer, "grad_position")
    parameter_id, partition_rank = private(optimizer, "get_param_id"), private(optimizer, "_get_param_partition_rank")
    fragments = []
    for name, p in trained.items():
        if parameter_id(p) not in positions:
            raise incompatible(f"'grad_position' has no entry of {name}")
        group, offset, partition = positions[parameter_id(p)]
        start = partition * partition_rank(p)
        numel = min(partition, private(p, "ds_numel") - start)  # without the padding
        if numel > 0:
            fragments.append(Fragment(name, start, numel, flats[group], offset))
    return fragments


def _stage_1_or_2(engine: Any, trained: Mapping[str, nn.Parameter]) -> list[Fragment]:
    """A group's parameters laid end to end and cut into one partition a rank."""
    # DeepSpeedEngine._do_optimizer_sanity_check takes BF16_Optimizer in this case, else DeepSpeedZeroOptimizer
    bf16_optimizer = (
        engine.zero_optimization_stage() == 1
        and engine.get_data_types() == (torch.bfloat16, torch.float32)
        and not engine.zero_cpu_offload()
    )
    name_of_flats = "fp32_groups_flat_partition" if bf16_optimizer else "single_partition_of_fp32_groups"
    flats = private(engine.optimizer, name_of_flats)
    fragments = []
    for name, p in trained.items():
        if not hasattr(p, "_hp_mapping"):
            raise incompatible(f"the parameter {name} has no '_hp_mapping'")
        if p._hp_mapping is None:  # all of it lies in other ranks' partitions
            continue
        source = private(p._hp_mapping, "lp_fragment_address")
        start, numel = private(source, "start"), private(source, "numel")
        offset = private(private(p._hp_mapping, "hp_fragment_address"), "start")
        group = private(p._hp_mapping, "param_group_index")
        fragments.append(Fragment(name, start, numel, flats[group], offset))
    return fragments


def _stage_0(engine: Any, trained: Mapping[str, nn.Parameter]) -> list[Fragment]:
    """Whole parameters: the module's own in fp32, fp32 copies of them in bf16 and fp16."""
    if engine.get_data_types()[0] == torch.float32:
        if engine.optimizer is not engine.basic_optimizer:
            raise incompatible("in fp32 at ZeRO stage 0 the optimizer is not AdamW itself")
        return [Fragment(name, 0, p.numel(), p, 0) for name, p in trained.items()]
    short, full = (itertools.chain(*private(engine.optimizer, n)) for n in ("fp16_groups", "fp32_groups"))
    masters = {id(p): master for p, master in zip(short, full, strict=True)}
    absent = [name for name, p in trained.items() if id(p) not in masters]
    if absent:
        raise incompatible(f"'fp16_groups' has no entry of {absent[0]}")
    return [Fragment(name, 0, p.numel(), masters[id(p)], 0) for name, p in trained.items()]


def coverage_error(sizes: Mapping[str, int], ranges: Iterable[tuple[str, int, int]]) -> str | None:
    """The first element of a parameter that is in no range, or in two.

    Args:
        sizes: the elements of each parameter, by name.
        ranges: (name, start, numel) of all ranks, in any order.
    Returns:
        The problem in words; None where the ranges cover every parameter exactly once.
    """
    by_name: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, start, numel in ranges:
        if name not in by_name:
            return f"{name} is not a trained parameter"
        by_name[name].append((start, numel))
    for name, parts in by_name.items():
        end = 0
        for start, numel in sorted(parts):
            if numel <= 0:
                return f"{name} has a range of {numel} elements"
            if start != end:
                missing, twice = f"{end} to {start - 1} are on no rank", f"from {start} on are on two ranks"
                return f"{name}: elements {missing if start > end else twice}"
            end = start + numel
        if end != sizes[name]:
            return f"{name} has {sizes[name]} elements, and the ranks hold {end}"
    return None
