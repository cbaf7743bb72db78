"""From a model's inputs to its logits, and from these to the predicted mask at the image's original size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.models.segmenter import Prediction, upscale

# arguments of the model's forward, by their keys in a batch; text, and points and boxes, only where the batch has them
INPUTS = ("image", "size", "tokens", "token_mask", "points", "labels")


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The model's inputs of a batch, on the device, contiguous there: images come with channels last in memory."""
    return {k: batch[k].to(device, non_blocking=True).contiguous() for k in INPUTS if k in batch}


def run_model(
    model: Callable[..., Tensor | Prediction], batch: dict[str, Any], device: torch.device, postprocess: MaskPostprocess
) -> tuple[Tensor, Tensor | None]:
    """A batch's (B, s, s) logits, and of a model with a no-target head (B,) bool: what it says.

    Args:
        model: in evaluation mode, on the device.
        batch: see `model_inputs`.
    """
    inputs: dict[str, Any] = model_inputs(batch, device)
    output = model(**inputs, apart=True) if postprocess.no_target_head else model(**inputs)
    return output if isinstance(output, Prediction) else (output, None)


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

    def probabilities(self, logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
        """(H, W) in [0, 1]: `original_probabilities`, which has the arguments."""
        return original_probabilities(logits, size, shape, image_size, self.align_corners)

    def scored(self, logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> ScoredMask:
        """The mask that calling this gives, with its score; arguments as of `original_probabilities`."""
        probabilities = self.probabilities(logits, size, shape, image_size)
        if self.rule == "probability":  # not computed a second time
            mask = probabilities > self.threshold
        else:
            mask = self(logits, size, shape, image_size)
        return ScoredMask.of(mask, probabilities)


class ScoredMask(NamedTuple):
    """A predicted mask.

    Attributes:
        mask: (H, W) bool.
        score: the mean probability of its pixels; 0 of an empty one.
    """

    mask: np.ndarray
    score: float

    @classmethod
    def of(cls, mask: Tensor, probabilities: Tensor) -> ScoredMask:
        """From an (H, W) bool mask and its pixels' (H, W) probabilities."""
        pixels = int(mask.sum())
        total = float(torch.where(mask, probabilities, 0).sum())
        return cls(mask.cpu().numpy(), total / max(1, pixels))

    def emptied(self) -> ScoredMask:
        """What is left where the model says that there is no target."""
        return ScoredMask(np.zeros_like(self.mask), 0.0)
