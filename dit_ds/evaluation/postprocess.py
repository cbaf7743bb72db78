"""From a model's logits to the predicted mask at the image's original size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.models.segmenter import upscale

# arguments of the model's forward, by their keys in a batch; text, and points and boxes, only where the batch has them
INPUTS = ("image", "size", "tokens", "token_mask", "points", "labels")


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The model's inputs of a batch, on the device, contiguous there: images come with channels last in memory."""
    return {k: batch[k].to(device, non_blocking=True).contiguous() for k in INPUTS if k in batch}


def original_probabilities(
    logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int, align_corners: bool = False
) -> Tensor:
    """One sample's logits to probabilities at the original size, as SAM's `postprocess_masks`.

    Upsampled to the padded square, the padding cut off, then resized.

    Args:
        logits: (s, s).
        size: (2,) height and width of the resized image within the square, in pixels.
        shape: the original height and width H, W.
        image_size: side of the square, in pixels.
        align_corners: of the upsampling to the square.
    Returns:
        (H, W) in [0, 1].
    """
    return _to_original(_without_padding(logits, size, image_size, align_corners), shape).sigmoid()


def _without_padding(logits: Tensor, size: Tensor, image_size: int, align_corners: bool) -> Tensor:
    h, w = (int(x) for x in size)
    return upscale(logits[None], image_size, align_corners)[0, :h, :w]


def _to_original(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], shape, mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class MaskPostprocess:
    """From one sample's logits to its predicted mask (paper section 4.2: probabilities over a threshold).

    Attributes:
        threshold: a pixel is in if its probability exceeds this.
        rule: `probability`: logits are resized to the original size, then thresholded. `resize_then_any`, as the
            paper's released code: thresholded in the square, the 0/1 mask resized, and every pixel above 0 is in, which
            makes masks grow by up to a pixel of the square.
        align_corners: of the logits' upsampling to the square.
        no_target_pixels: a mask of fewer pixels means that there is no target; `evaluate` applies it, on sets with such
            expressions. Not of a model with a no-target head.
        no_target_head: the model says by itself that there is no target, see `Prediction`.
    """

    threshold: float
    rule: str = "probability"
    align_corners: bool = False
    no_target_pixels: int = 0
    no_target_head: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, threshold: float | None = None) -> MaskPostprocess:
        """As configured; `threshold` overrides the configuration's."""
        e, m = config.eval, config.model
        pixels = 0 if m.has_no_target_head else e.no_target_pixels
        return cls(threshold or e.threshold, e.mask_rule, m.aligns_corners, pixels, m.has_no_target_head)

    def __call__(self, logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
        """(s, s) logits to an (H, W) bool mask; `size`, `shape`, `image_size` as for `original_probabilities`."""
        if self.rule == "probability":
            return original_probabilities(logits, size, shape, image_size, self.align_corners) > self.threshold
        inside = _without_padding(logits, size, image_size, self.align_corners).sigmoid() > self.threshold
        return _to_original(inside.float(), shape) > 0
