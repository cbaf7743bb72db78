"""Losses of DIT-SAM, and of LAVT and ReLA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_ds.models.segmenter import upscale

_PIXELS = 1 << 20  # of the masks whose losses are computed at once


def segmentation_loss(
    logits: Tensor, mask: Tensor, weight: Tensor, dice_weight: float = 0.0, align_corners: bool = False
) -> Tensor:
    """BCE on the upsampled logits, as the paper's code, and optionally Dice; the weighted mean over samples.

    Args:
        logits: (B, s, s).
        mask: (B, S, S) of 0 and 1, or soft between them; padding is background.
        weight: (B,), 0 for a sample that pads the batch.
        align_corners: of the upsampling.
    Returns:
        A scalar.
    """
    return (_LossOfSamples.apply(logits, mask, dice_weight, align_corners) * weight).mean()


class _LossOfSamples(torch.autograd.Function):
    """(B,) losses from (B, s, s) logits, a few samples at a time.

    The gradient is computed at once, so that no map at the image's size is kept for the backward pass, or made for the
    whole batch.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor, dice_weight: float, align_corners: bool) -> Tensor:
        each, gradients = [], []
        together = max(1, _PIXELS // mask[0].numel())
        for few, target in zip(logits.split(together), mask.split(together), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                few = few.detach().float().requires_grad_(ctx.needs_input_grad[0])
                loss = of_samples(few, target.float(), dice_weight, align_corners)  # (b,)
            each.append(loss.detach())
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, few, torch.ones_like(loss))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))  # (B, s, s)
            ctx.dtype = logits.dtype
        return torch.cat(each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None, None]).to(ctx.dtype), None, None, None


def of_samples(logits: Tensor, target: Tensor, dice_weight: float, align_corners: bool) -> Tensor:
    """(B, s, s) and (B, S, S) to (B,)."""
    logits = upscale(logits, target.shape[-1], align_corners)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    if dice_weight:
        p = logits.sigmoid()
        overlap, total = (p * target).sum((1, 2)), p.sum((1, 2)) + target.sum((1, 2))
        loss = loss + dice_weight * (1 - (2 * overlap + 1) / (total + 1))
    return loss


_CLASS_WEIGHTS = (0.9, 1.1)  # of background and target in LAVT's and ReLA's losses


def two_class_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy with the class weights 0.9 and 1.1, which LAVT and ReLA use.

    Each sample is divided by the class weights of its own pixels; the originals divide by those of the whole batch on
    a GPU, which would make the loss depend on the number of ranks. So where a sample has one label only, the class weights
    cancel.

    Args:
        logits: (B, 2, ..), background and target.
        target: (B, ..) of 0 and 1.
        weight: (B,).
    Returns:
        A scalar, the weighted mean over samples.
    """
    class_weights = torch.tensor(_CLASS_WEIGHTS, device=logits.device)
    loss = F.cross_entropy(logits.float(), target.long(), class_weights, reduction="none")  # (B, ..)
    pixel_weights = class_weights[target.long()]
    each = [x.reshape(len(weight), -1).sum(1) for x in (loss, pixel_weights)]  # (B,) twice
    return (each[0] / each[1] * weight).mean()
