"""FLOPs of a training step, counted on fake tensors, and what GPUs do at most.

Counted are matrix products and convolutions, a multiplication and an addition as two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import Prompts
from dit_ds.models.attention import count_flops
from dit_ds.models.build import build_model
from dit_ds.models.text_encoder import offline_text
from dit_ds.planning.memory.fake_cluster import fake_tensors
from dit_ds.planning.memory.profiled_step import fake_batch
from dit_ds.planning.memory.tracker import LiveTensors


class Passes(NamedTuple):
    """FLOPs a sample of the two passes of a training step."""

    forward: int
    backward: int


def step_flops(config: RunConfig) -> int:
    """Model FLOPs of one step a sample: unfolded attention, nothing computed twice. What an MFU is measured by.

    Frozen parts count with the products that training needs of them. The count takes seconds, ViT-H's too, needs
    neither weights nor a GPU, and leaves random numbers, process groups and real models alone.

    Raises:
        UserError: the text encoder's configuration isn't there.
    """
    return sum(_passes(config, "eager", "none"))


def hardware_flops(config: RunConfig, watch: Callable[[nn.Module], object] | None = None) -> Passes:
    """What is really computed a sample: with the run's activation checkpointing and a GPU's attention kernels.

    Those multiply queries and keys again in the backward pass.

    Args:
        watch: called with the model, before the step is taken on fake tensors.
    Raises:
        UserError: the text encoder's configuration isn't there.
    """
    return _passes(config, "sdpa_efficient", config.train.activation_checkpointing, watch)


def _passes(
    config: RunConfig, attention: str, policy: str, watch: Callable[[nn.Module], object] | None = None
) -> Passes:
    one = config.model_copy(deep=True)
    one.model.attention, one.text.cache = attention, 0
    with (
        offline_text(one),
        torch.random.fork_rng(_cuda_devices()),
        fake_tensors(LiveTensors()),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*backward hook")  # of modules without a gradient, as it must be
        model = build_model(one, text_weights=False)
        model.checkpoint_activations(policy)
        if watch is not None:
            watch(model.train())
        d = one.data
        inputs, mask, weight = fake_batch(1, d.image_size, d.tokens, Prompts.of(d.prompts, d.points))
        with count_flops() as counter:
            loss = model.loss(model(**inputs), mask, weight)
            forward = counter.get_total_flops()
            loss.backward()
        return Passes(forward, counter.get_total_flops() - forward)


def _cuda_devices() -> list[int]:
    """Whose random state to keep: the device in use, if CUDA is; elsewhere there is none yet."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


# --- GPUs -------------------------------------------------------------------------------------------------------------
