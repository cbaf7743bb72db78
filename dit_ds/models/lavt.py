"""LAVT: language-aware vision transformer (Yang et al., CVPR 2022), for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_ds.models.losses import two_class_loss
from dit_ds.models.swin import SwinSegmenter, TextSwin
from dit_ds.models.swin_sizes import SIZES
from dit_ds.models.text_encoder import TextEncoder


class BatchNorm(nn.BatchNorm2d):
    """Computes its statistics in fp32 where the input is of a shorter type; the running ones must be fp32, see `engine`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        statistics = (self.running_mean, self.running_var)
        momentum = 0.0 if self.momentum is None else self.momentum  # PyTorch's `BatchNorm2d` gives 0.1
        return F.batch_norm(x, *statistics, weight, bias, self.training, momentum, self.eps)


def _conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm(outputs), nn.ReLU()]


class Decoder(nn.Module):
    """From the last stage upwards: enlarge, put beside the stage before, convolve twice.

    Args:
        dims: widths of the four stages.
        dim: its own.
    """

    def __init__(self, dims: list[int], dim: int):
        super().__init__()
        below = [dims[3], dim, dim]
        self.steps = nn.ModuleList(
            nn.Sequential(*_conv_norm_relu(b + skip, dim), *_conv_norm_relu(dim, dim))
            for b, skip in zip(below, dims[2::-1])
        )
        self.classify = nn.Conv2d(dim, 2, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """(B, C_i, h_i, w_i) of each stage to (B, 2, h_0, w_0) logits of background and target."""
        x = stages[-1]
        for step, skip in zip(self.steps, stages[-2::-1]):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=True)
            x = step(torch.cat([x, skip], dim=1))
        return self.classify(x)


class LAVT(SwinSegmenter):
    """LAVT: text enters Swin behind each stage, and a convolutional decoder reads the stages' outputs.

    Args:
        text_encoder: BERT without its pooler.
        size: a key of `swin.SIZES`.
        image_size: side of the square input.
        attention: eager or sdpa, of Swin's windows.
    """

    def __init__(self, text_encoder: TextEncoder, size: str = "swin_b", image_size: int = 480, attention: str = "sdpa"):
        super().__init__()
        self.image_size = image_size
        self.text_encoder = text_encoder
        self.backbone = TextSwin(size, image_size, text_encoder.dim, gates=4, attention=attention)
        self.decoder = Decoder(SIZES[size].dims, SIZES[size].lavt_dim)
        # no stage follows the last one: its gate has no gradient, which ZeRO-3 would wait for
        self.backbone.gates[3].requires_grad_(False)

    def forward(self, image: Tensor, size: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """As `Segmenter.forward`: (B, 2, S/4, S/4) logits of background and target in training, in evaluation their
        difference (B, S/4, S/4), above 0 where the target is the likelier, to be upsampled with corners aligned."""
        text = self.text_encoder(tokens, token_mask)  # (B, T, text_dim)
        logits = self.decoder(self.backbone(self.preprocess(image, size), text, token_mask)).float()
        return logits if self.training else logits[:, 1] - logits[:, 0]

    def loss(self, output: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Weighted cross-entropy of the logits, enlarged to the mask's size with corners aligned; see `two_class_loss`."""
        logits = F.interpolate(output, mask.shape[-2:], mode="bilinear", align_corners=True)
        return two_class_loss(logits, mask, weight)
