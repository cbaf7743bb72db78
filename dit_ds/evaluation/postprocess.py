"""From a model's logits to the predicted mask at the image's own size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.models.segmenter import upscale

# what the model's forward takes, by the batch's names; words, and points with boxes, only where the batch has them
INPUTS = ("image", "size", "tokens", "token_mask", "points", "labels")


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What of a batch the model takes, on its device; there pictures, whose channels come last in memory, are turned."""
    return {k: batch[k].to(device, non_blocking=True).contiguous() for k in INPUTS if k in batch}


def original_probabilities(
    logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int, align_corners: bool = False
) -> Tensor:
    """One sample's (s, s) logits to (H, W) probabilities: up to the padded square, padding cut, to the original size."""
    return _to_original(_without_padding(logits, size, image_size, align_corners), shape).sigmoid()


def _without_padding(logits: Tensor, size: Tensor, image_size: int, align_corners: bool) -> Tensor:
    h, w = (int(x) for x in size)
    return upscale(logits[None], image_size, align_corners)[0, :h, :w]


def _to_original(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], shape, mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class MaskPostprocess:
    """From one sample's logits to the mask that is predicted.

    Attributes:
        threshold: a pixel is in if its probability exceeds this.
        rule: probability, the logits go to the original size before they are thresholded; or resize_then_any, as the
            paper's released code: thresholded in the square, the 0/1 mask resized, and in is whatever then is above 0,
            which makes masks grow by up to a pixel of the square.
        align_corners: of the logits' upsampling to the square.
        no_target_pixels: fewer say that there is no target; `evaluate` asks, where there may be none.
    """

    threshold: float
    rule: str = "probability"
    align_corners: bool = False
    no_target_pixels: int = 0

    @classmethod
    def of(cls, config: RunConfig, threshold: float | None = None) -> MaskPostprocess:
        """As configured; another threshold lies over the configuration's."""
        e = config.eval
        return cls(threshold or e.threshold, e.mask_rule, config.model.align_corners, e.no_target_pixels)

    def __call__(self, logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
        """(s, s) logits to an (H, W) bool mask; `size`, `shape`, `image_size` as for `original_probabilities`."""
        if self.rule == "probability":
            return original_probabilities(logits, size, shape, image_size, self.align_corners) > self.threshold
        inside = _without_padding(logits, size, image_size, self.align_corners).sigmoid() > self.threshold
        return _to_original(inside.float(), shape) > 0
