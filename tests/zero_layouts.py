"""DeepSpeed's layouts of the training state cover it, or are refused. Run by `test_zero_state` in a process of its own.

A process has one process group, and DeepSpeed keeps it; here each engine has another.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn

from dit_ds.config.load import validate
from dit_ds.distributed import World
from dit_ds.engine import engine as ds
from dit_ds.engine import zero_layout, zero_state
from dit_ds.engine.zero_layout import coverage_error, find_fragments
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import RunFailed, UserError

LAYOUTS = [  # of configs/deepspeed, the model's type and the type in which gradients are accumulated
    ("zero0", "fp32", "fp32"), ("zero0", "bf16", "bf16"), ("zero1", "bf16", "bf16"), ("zero1", "bf16", "fp32"),
    ("zero2", "fp32", "fp32"), ("zero2", "bf16", "fp32"), ("zero2_offload", "bf16", "bf16"), ("zero3", "fp32", "fp32"),
    ("zero3", "bf16", "bf16"), ("zero3_offload", "bf16", "bf16"),
]  # fmt: skip


@pytest.fixture
def make_engine(monkeypatch):
    """Engines of any rank of any number in this process: a process group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    ds.import_deepspeed()
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3, utils
    from deepspeed.utils import groups

    for module in (partition_parameters, partitioned_param_coordinator, stage3, utils):
        for check in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *_, **__: None)

    @contextlib.contextmanager
    def make(layout: tuple[str, str, str], rank: int = 0, ranks: int = 1) -> Iterator[Any]:
        name, precision, accumulated = layout
        override = {"zero_optimization": SETTINGS[name], "data_types": {"grad_accum_dtype": accumulated}}
        config = validate({
            "train": {"batch_size": ranks},
            "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero0.json"), "precision": precision,
                          "override": override | {"train_micro_batch_size_per_gpu": 1}},
        })  # fmt: skip
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 300), nn.LayerNorm(300), nn.Linear(300, 3))
        model[0].weight.requires_grad_(False)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            yield ds.initialize(model, config, World(rank, ranks, 0, torch.device("cpu")))
        finally:
            dist.destroy_process_group()
            comm.cdb = groups._WORLD_GROUP = None

    return make


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_the_ranks_fragments_cover_every_trained_parameter_once(make_engine, layout):
    for ranks in (1, 3):
        ranges = []
        for rank in range(ranks):
            with make_engine(layout, rank, ranks) as engine:
                state = TrainingState(engine)
                assert state._fragment_error() is None
                ranges += [(f.name, f.start, f.numel) for f in state.saved()]
        sizes = {n: torch.Size(shape).numel() for n, shape in state.shapes.items()}
        assert sizes.keys() == {"0.bias", *(f"{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias"))}
        assert coverage_error(sizes, ranges) is None
        assert coverage_error(sizes, ranges[1:]) and coverage_error(sizes, [*ranges, ranges[0]])


@pytest.mark.parametrize(
    "layout, names",
    [
        (LAYOUTS[1], ("fp16_groups", "fp32_groups")),
        (LAYOUTS[2], ("single_partition_of_fp32_groups",)),
        (LAYOUTS[3], ("fp32_groups_flat_partition",)),
        (LAYOUTS[8], ("fp32_partitioned_groups_flat", "grad_position")),
    ],
    ids=lambda x: "-".join(x),
)
def test_an_attribute_that_deepspeed_renamed_is_an_error_and_no_other_layout(make_engine, layout, names):
    with make_engine(layout) as engine:
        assert find_fragments(engine)
        for name in names:
            value = engine.optimizer.__dict__.pop(name)
            with pytest.raises(UserError, match=f"has no '{name}'.*deepspeed=={zero_layout.TESTED_DEEPSPEED}"):
                find_fragments(engine)
            setattr(engine.optimizer, name, value)
        assert find_fragments(engine)


def test_a_parameter_without_mapping_position_or_optimizer_is_an_error(make_engine, monkeypatch):
    with make_engine(LAYOUTS[2]) as engine:
        del engine.module[3].bias._hp_mapping
        with pytest.raises(UserError, match="the parameter 3.bias has no '_hp_mapping'"):
            find_fragments(engine)
    with make_engine(LAYOUTS[8]) as engine:
        engine.optimizer.grad_position.popitem()
        with pytest.raises(UserError, match="'grad_position' has no entry of"):
            find_fragments(engine)
    with make_engine(LAYOUTS[0]) as engine:
        monkeypatch.setattr(engine, "optimizer", object())
        with pytest.raises(UserError, match="the optimizer is not AdamW itself"):
            find_fragments(engine)


def test_a_run_whose_state_is_not_covered_stops_at_its_start(make_engine, monkeypatch):
    monkeypatch.setattr(zero_state, "gather_objects", lambda value: [value])
    with make_engine(LAYOUTS[8]) as engine:
        state = TrainingState(engine)
        state.check_coverage()
        last = state.fragments.pop()
        with pytest.raises(RunFailed, match=rf"{last.name} has {last.numel} elements, and the ranks hold 0"):
            state.check_coverage()
        monkeypatch.setattr("deepspeed.utils.safe_get_local_fp32_param", lambda p: None)
        with pytest.raises(RunFailed, match="safe_get_local_fp32_param returns None for 0.bias"):
            state.check_coverage()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
