"""DeepSpeed computes what plain PyTorch computes, at every ZeRO stage, on any number of ranks."""

from __future__ import annotations

import pytest
from conftest import on_ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_stage_is_plain_adam_on_one_process(ranks):
    """fp32, three steps of the same global batch: losses and every trained weight."""
    for stage, got in enumerate(on_ranks(ranks, *({"stage": s, "dropout": False, "plain": True} for s in range(4)))):
        assert got["loss_error"] <= 1e-5, stage
        assert got["weight_error"] <= 1e-4, stage  # a tenth of one step at lr 1e-3
