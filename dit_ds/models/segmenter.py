"""The interface of a model to training, evaluation and measurement, whichever method it implements."""

from __future__ import annotations

import functools
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, which are SAM's, too


@functools.lru_cache(maxsize=16)
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3, 1, 1) each; no buffers of the model, which bf16 would round."""
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


class Prediction(NamedTuple):
    """What a model with a no-target head gives in evaluation, if asked for both.

    Attributes:
        logits: (B, s, s), as `Segmenter.forward`'s, also of samples that have no target by the head.
        no_target: (B,) bool, of the head.
    """

    logits: Tensor
    no_target: Tensor


class Segmenter(nn.Module):
    """Images and text to masks.

    Attributes:
        image_size: S, side of the square input.
    """

    image_size: int

    def preprocess(self, image: Tensor, size: Tensor) -> Tensor:
        """Normalise, then set padding to zero, as SAM does.

        Args:
            image: (B, 3, S, S) uint8.
            size: (B, 2) height and width before padding.
        Returns:
            (B, 3, S, S) in the model's dtype.
        """
        mean, std = pixel_statistics(image.device)
        x = (image.float() - mean) / std
        side = torch.arange(self.image_size, device=image.device)
        inside = (side[:, None] < size[:, 0, None, None]) & (side[None, :] < size[:, 1, None, None])  # (B, S, S)
        return (x * inside[:, None]).to(next(self.parameters()).dtype)

    @abstractmethod
    def forward(self, image: Tensor, size: Tensor, tokens: Tensor, token_mask: Tensor) -> Any:
        """Segment what the text refers to.

        Args:
            image, size: as in `preprocess`.
            tokens, token_mask: (B, T) ids and (B, T) bool, False at padding.
        Returns:
            In evaluation mode (B, s, s) fp32 logits over the square, whose sigmoid is the probability; in training
            mode what `loss` takes.
        """

    @abstractmethod
    def loss(self, output: Any, mask: Tensor, weight: Tensor) -> Tensor:
        """The method's loss, the weighted mean over samples.

        Args:
            output: of `forward` in training mode.
            mask: (B, S, S) of 0 and 1; padding is background.
            weight: (B,), 0 for a sample that pads the batch.
        Returns:
            A scalar.
        """

    @abstractmethod
    def checkpoint_activations(self, policy: str) -> None:
        """Choose what backward recomputes: none, block, and other policies of the model.

        Raises:
            ValueError: no such policy.
        """

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile the forward of each layer of the image encoder with torch.compile, at its first call."""

    @abstractmethod
    def load_pretrained(self, path: str | Path) -> dict[str, list[str]]:
        """Load `model.checkpoint`.

        Returns:
            `loaded`, `missing` (in the model only) and `unexpected` (in the file only) tensor names.
        Raises:
            UserError: no such file, or one that lacks a part, or is of another size or network.
        """


def upscale(logits: Tensor, image_size: int, align_corners: bool = False) -> Tensor:
    """(B, s, s) to (B, image_size, image_size), bilinear; with corners aligned as in the paper's code, if asked."""
    side = (image_size, image_size)
    return F.interpolate(logits[:, None], side, mode="bilinear", align_corners=align_corners)[:, 0]
