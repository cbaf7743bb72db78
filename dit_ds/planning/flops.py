"""FLOPs of a training step, counted on fake tensors.

Matrix products and convolutions are counted, a multiplication and an addition as two FLOPs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import Prompts
from dit_ds.models.attention import count_flops
from dit_ds.models.build import build_model
from dit_ds.models.text_encoder import offline_text
from dit_ds.planning.memory.fake_cluster import fake_tensors
from dit_ds.planning.memory.live_tensors import LiveTensors
from dit_ds.planning.memory.profiled_step import fake_batch


class Passes(NamedTuple):
    """FLOPs per sample of the two passes of a training step."""

    forward: int
    backward: int


def step_flops(config: RunConfig) -> int:
    """Model FLOPs of one training step per sample, by which an MFU is measured.

    Attention counts at the heads' width, without positions folded in, and nothing is computed twice. Frozen modules count
    with the products that training needs of them. The count takes seconds, for ViT-H too, needs neither weights nor a
    GPU, and changes neither the random state nor process groups.

    Raises:
        UserError: the text encoder's configuration is missing.
    """
    return sum(_passes(config, "eager", "none"))


def hardware_flops(config: RunConfig, inspect: Callable[[nn.Module], object] | None = None) -> Passes:
    """FLOPs that a GPU computes per sample, with the run's activation checkpointing and fused attention kernels.

    Those kernels recompute the product of queries and keys in the backward pass.

    Args:
        inspect: called with the model in training mode before the step, as `ModuleTrace.record`.
    Raises:
        UserError: the text encoder's configuration is missing.
    """
    return _passes(config, "sdpa_efficient", config.train.activation_checkpointing, inspect)


def _passes(
    config: RunConfig,
    attention: Literal["eager", "sdpa_efficient"],
    policy: str,
    inspect: Callable[[nn.Module], object] | None = None,
) -> Passes:
    config = config.model_copy(deep=True)
    config.model.attention, config.text.cache = attention, 0
    with (
        offline_text(config),
        torch.random.fork_rng(_cuda_devices()),
        fake_tensors(LiveTensors()),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*backward hook")  # modules whose inputs need no gradient
        model = build_model(config, text_weights=False)
        model.checkpoint_activations(policy)
        if inspect is not None:
            inspect(model.train())
        d = config.data
        inputs, mask, weight = fake_batch(1, d.image_size, d.tokens, Prompts.of(d.prompts, d.points))
        with count_flops() as counter:
            loss = model.loss(model(**inputs), mask, weight)
            forward = counter.get_total_flops()
            loss.backward()
        return Passes(forward, counter.get_total_flops() - forward)


def _cuda_devices() -> list[int]:
    """Devices whose random state is restored: the current one, if CUDA is initialized; else there is none yet."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
