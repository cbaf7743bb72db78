"""Losses of DIT-SAM, and of LAVT and ReLA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.models.segmenter import upscale


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
    logits, target = upscale(logits, mask.shape[-1], align_corners), mask.float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))  # (B,)
    if dice_weight:
        p = logits.sigmoid()
        overlap, total = (p * target).sum((1, 2)), p.sum((1, 2)) + target.sum((1, 2))
        loss = loss + dice_weight * (1 - (2 * overlap + 1) / (total + 1))
    return (loss * weight).mean()


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
