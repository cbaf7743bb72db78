"""The count of a step's memory: exact where it can be known, the same on real tensors, and within Table 8's targets."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import MINILM, ROOT

from dit_ds.config import validate
from dit_ds.memory import fake_step
from dit_ds.memory.fake_step import LiveTensors, training_step_memory


def test_live_tensors_are_counted_until_they_are_freed():
    with LiveTensors() as live:
        a = torch.zeros(1000)  # 4000 bytes, rounded to 4096
        view = a.view(10, 100)[:, 3]
        assert live.now == 4096
        del a
        assert live.now == 4096  # the view holds it
        b = torch.ones(256) + 1  # 1024, and as much again for a moment
        assert (live.now, live.peak) == (4096 + 1024, 4096 + 2 * 1024)
        view[0] = 1  # in place: nothing new
        del view, b
        assert (live.now, live.peak) == (0, 4096 + 2 * 1024)


def test_what_was_there_before_is_not_counted():
    a = torch.zeros(1000)
    with LiveTensors() as live:
        views = (a.view(10, 100).t(), a.detach(), a.add_(1))
        assert live.now == 0, views


def test_what_autograd_keeps_is_counted_and_freed():
    w = torch.randn(64, 64, requires_grad=True)
    with LiveTensors() as live:
        y = (torch.ones(128, 64) @ w).exp()  # keeps its input and its own output
        kept = live.now
        y.sum().backward()
        del y
        assert kept == 2 * 128 * 64 * 4
        assert live.now == 64 * 64 * 4  # the gradient


def tiny(stage: int, policy: str, bf16: bool):
    return validate(
        {
            "data": {"image_size": 64},
            "model": {"size": "vit_t", "attention": "chunked"},
            "text": {"name": MINILM, "layers": 1, "random_init": True},
            "train": {"batch_size": 4, "activation_checkpointing": policy},
            "deepspeed": {
                "config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                "override": {"bf16": {"enabled": bf16}, "train_micro_batch_size_per_gpu": 4},
            },
        }
    )


@pytest.mark.parametrize(
    ("stage", "policy", "bf16"), [(0, "none", True), (0, "block", False), (1, "selective", True), (2, "block", True)]
)
def test_fake_tensors_take_what_real_ones_take(world, monkeypatch, stage, policy, bf16):
    fake = training_step_memory(tiny(stage, policy, bf16), world)
    monkeypatch.setattr(fake_step, "FakeTensorMode", lambda **_: contextlib.nullcontext())
    real = training_step_memory(tiny(stage, policy, bf16), world)
    for phase in real:
        assert fake[phase] == pytest.approx(real[phase], rel=0.01), phase


@pytest.mark.timeout(200)
def test_table_8s_fully_tuned_row_fits(world):
    """ViT-B and BERT tuned, batch 32 on one GPU, bf16, fp32 masters, each layer recomputed: 4.8 GiB at most.

    Its parameters, gradients and optimizer states alone take 3.1.
    """
    config = validate(
        {
            "model": {"size": "vit_b", "attention": "sdpa_efficient"},
            "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True},
            "train": {"batch_size": 32, "activation_checkpointing": "block"},
            "deepspeed": {
                "config": str(ROOT / "configs/deepspeed/zero0.json"),
                "override": {"train_micro_batch_size_per_gpu": 32},
            },
        }
    )
    assert 3.1 <= training_step_memory(config, world, steps=1)["peak"] / 2**30 <= 4.8
