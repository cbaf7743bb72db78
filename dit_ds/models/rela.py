"""ReLA: region-language attention (Liu et al., GRES, CVPR 2023), for comparison.

A pixel decoder and learned queries, one for each region of a 10 x 10 grid, as in Mask2Former. Each query says how much
of its region belongs to the target (the minimap), and together whether there is a target at all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_ds.models.losses import two_class_loss
from dit_ds.models.segmenter import Prediction
from dit_ds.models.swin import SwinSegmenter, TextSwin
from dit_ds.models.swin_sizes import SIZES, Size
from dit_ds.models.text_encoder import TextEncoder

_SIDE = 10  # regions a side
_NO_TARGET = -20.0  # every pixel's logit where the model says that there is no target


class SinePositions(nn.Module):
    """Mask2Former's sine positions, always computed in fp32. Theirs cache the last result, which may be a fake tensor."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of a map (B, C, H, W): (B, dim, H, W), half of the channels for rows, half for columns."""
        b, _, h, w = shape
        waves = 10000 ** (-2 * torch.arange(self.dim // 4, device=device) / (self.dim // 2))  # (dim/4,)
        sides = []
        for n in (h, w):
            position = torch.arange(1, n + 1, device=device) / n * 2 * math.pi
            angles = position[:, None] * waves  # (n, dim/4)
            sides.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))  # (n, dim/2)
        rows, columns = sides[0][:, None].expand(h, w, -1), sides[1][None].expand(h, w, -1)
        return torch.cat([rows, columns], dim=-1).permute(2, 0, 1).to(dtype).expand(b, -1, -1, -1)


def make_pixel_decoder(size: Size) -> nn.Module:
    """Mask2Former's from `transformers`, with its initial weights: three levels through deformable attention, and the
    first stage added for the mask features."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerPixelDecoder,
        Mask2FormerPreTrainedModel,
    )

    config = Mask2FormerConfig(
        feature_size=size.rela_dim,
        mask_feature_size=size.rela_dim,
        num_attention_heads=size.rela_heads,
        encoder_feedforward_dim=size.rela_pixel_ffn,
        encoder_layers=size.rela_pixel_layers,
        dropout=0.0,
    )
    decoder: Any = Mask2FormerPixelDecoder(config, size.dims)
    decoder.position_embedding = SinePositions(size.rela_dim)
    decoder.apply(Mask2FormerPreTrainedModel(config)._init_weights)
    return decoder


def mlp(*dims: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [m for a, b in zip(dims, dims[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class _MultiHead(nn.Module):
    """Multi-head attention's projections, and what they compute."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for projection in (self.q, self.k, self.v, self.out):
            # as Mask2Former, where one matrix (3D, D) is q, k and v
            nn.init.xavier_uniform_(projection.weight, gain=1.0 if projection is self.out else 2**-0.5)
            nn.init.zeros_(projection.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D), (B, N, D) twice and (B, Q, N) bool, True where a query attends, to (B, Q, D)."""
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.heads)
            for project, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        x = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None])
        return self.out(rearrange(x, "b h q d -> b q (h d)"))


class Attention(_MultiHead):
    """Multi-head attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `attend`."""
        return self.attend(q, k, v, mask)


class LanguageAttention(_MultiHead):
    """What the text adds to the region queries, as in the original: sigmoid(scale) * 0.1 * LN(x + attention(x, text)).

    The queries attend to padding, too. The text's projection is zero at first: what is added is the same for any text.
    """

    def __init__(self, dim: int, heads: int, text_dim: int):
        super().__init__(dim, heads)
        self.words = nn.Linear(text_dim, dim, bias=False)
        nn.init.zeros_(self.words.weight)
        self.norm = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, queries: Tensor, text: Tensor) -> Tensor:
        """(B, Q, D) and (B, T, text_dim) to (B, Q, D)."""
        text = self.words(text)  # (B, T, D)
        return self.norm(queries + self.attend(queries, text, text)) * self.scale.sigmoid() * 0.1


class Layer(nn.Module):
    """Attention to the image within the query's mask, in the first layer to the text, then to the other queries; each
    with a residual and post-norm."""

    def __init__(self, size: Size, text_dim: int | None):
        super().__init__()
        d = size.rela_dim
        self.to_image, self.to_regions = Attention(d, size.rela_heads), Attention(d, size.rela_heads)
        self.to_words = LanguageAttention(d, size.rela_heads, text_dim) if text_dim else None
        self.ffn = mlp(d, size.rela_ffn, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        for p in self.ffn.parameters():  # as Mask2Former
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(
        self, x: Tensor, x_positions: Tensor, visual: Tensor, positions: Tensor, mask: Tensor, text: Tensor
    ) -> Tensor:
        """One layer.

        Args:
            x, x_positions: (B, Q, D) queries and (Q, D) their learned positions.
            visual, positions: (B, N, D) visual tokens and their positions.
            mask: (B, Q, N) bool, where each query attends.
            text: (B, T, text_dim).
        Returns:
            (B, Q, D)
        """
        x = self.norms[0](x + self.to_image(x + x_positions, visual + positions, visual, mask))
        if self.to_words is not None:
            x = x + self.to_words(x, text)
        x = self.norms[1](x + self.to_regions(x + x_positions, x + x_positions, x))
        return self.norms[2](x + self.ffn(x))


class Output(NamedTuple):
    """Logits of the alternatives no and yes.

    Attributes:
        mask: (B, 2, h, w), of the target at each pixel.
        minimap: (B, 2, 10, 10), of the target in each region.
        no_target: (B, 2), of there being none.
    """

    mask: Tensor
    minimap: Tensor
    no_target: Tensor


class Predictor(nn.Module):
    """Queries through the layers; each attends within the mask that the layer before predicted."""

    def __init__(self, size: Size, text_dim: int):
        super().__init__()
        d = size.rela_dim
        self.queries, self.positions = (nn.Parameter(torch.randn(_SIDE**2, d)) for _ in range(2))
        self.levels = nn.Parameter(torch.randn(3, d))
        self.sine_positions = SinePositions(d)
        self.layers = nn.ModuleList(Layer(size, None if i else text_dim) for i in range(size.rela_layers))
        self.norm = nn.LayerNorm(d)
        self.mask_embed = mlp(d, d, d, d)
        self.minimap = nn.Linear(d, 2)
        self.no_target = mlp(d, d, 2)

    def forward(self, levels: tuple[Tensor, ...], mask_features: Tensor, text: Tensor) -> Output:
        """Predict.

        Args:
            levels: (B, D, h, w) each, from 1/32 to 1/8 of the side.
            mask_features: (B, D, H, W).
            text: (B, T, text_dim).
        """
        x = self.queries.expand(mask_features.shape[0], -1, -1)
        for i, layer in enumerate(self.layers):
            level = levels[i % 3]
            positions = self.sine_positions(level.shape, level.device, level.dtype)
            visual, positions = (
                rearrange(t, "b d h w -> b (h w) d") for t in (level + self.levels[i % 3][:, None, None], positions)
            )
            mask = self._inside(x, mask_features, level.shape[2], level.shape[3])
            x = layer(x, self.positions, visual, positions, mask, text)
        x = self.norm(x)
        minimap = self.minimap(x)  # (B, Q, 2)
        filters = torch.einsum("bqa,bqd->bad", minimap, self.mask_embed(x))
        mask = torch.einsum("bad,bdhw->bahw", filters, mask_features)
        minimap = rearrange(minimap, "b (h w) a -> b a h w", h=_SIDE)
        return Output(mask.float(), minimap.float(), self.no_target(x).mean(1).float())

    @torch.no_grad()
    def _inside(self, x: Tensor, mask_features: Tensor, h: int, w: int) -> Tensor:
        """(B, Q, h*w) bool: where each query's mask is; everywhere for one without any."""
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_embed(self.norm(x)), mask_features)
        inside = F.interpolate(masks, (h, w), mode="bilinear", align_corners=False).flatten(2) >= 0
        return inside | ~inside.any(-1, keepdim=True)


class ReLA(SwinSegmenter):
    """ReLA: LAVT's backbone, its gates closed at first, Mask2Former's pixel decoder, and region queries.

    Source: the original's code, with which its outputs are the same for the same weights.

    Under DeepSpeed's bf16 or fp16 the pixel decoder computes in that type, too, while the original's stays in fp32 under
    autocast, as it does here under `torch_autocast` in the DeepSpeed JSON.

    Args:
        text_encoder: BERT without its pooler; its features of padding are kept.
        size: a key of `swin.SIZES`.
        image_size: side of the square input.
        attention: eager or sdpa, of Swin's windows.
    """

    def __init__(self, text_encoder: TextEncoder, size: str = "swin_b", image_size: int = 480, attention: str = "sdpa"):
        super().__init__()
        s = SIZES[size]
        self.image_size = image_size
        self.text_encoder = text_encoder
        text_encoder.zero_padding = False  # the region queries read what it makes of padding
        self.backbone = TextSwin(size, image_size, text_encoder.dim, gates=3, attention=attention)
        gates: Any = self.backbone.gates
        for gate in gates:  # tanh(0): closed. Both layers at zero would stay there
            nn.init.zeros_(gate[2].weight)
        self.pixel_decoder = make_pixel_decoder(s)
        self.predictor = Predictor(s, text_encoder.dim)

    def forward(
        self, image: Tensor, size: Tensor, tokens: Tensor, token_mask: Tensor, apart: bool = False
    ) -> Output | Tensor | Prediction:
        """As `Segmenter.forward`: an `Output` in training, in evaluation (B, S/4, S/4), above 0 where the target is;
        nowhere, where the model says that there is none.

        Args:
            apart: in evaluation, the masks and what the no-target head says apart, see `Prediction`.
        """
        text = self.text_encoder(tokens, token_mask)  # (B, T, text_dim)
        stages = self.backbone(self.preprocess(image, size), text, token_mask)
        with torch.autocast(image.device.type, enabled=False):
            dtype = self.pixel_decoder.level_embed.dtype
            decoded = self.pixel_decoder([x.to(dtype) for x in stages])
        out = self.predictor(decoded.multi_scale_features, decoded.mask_features, text)
        if self.training:
            return out
        logits, none = (x[:, 1] - x[:, 0] for x in (out.mask, out.no_target))
        if apart:
            return Prediction(logits, none > 0)
        return logits.masked_fill((none > 0)[:, None, None], _NO_TARGET)

    def loss(self, output: Output, mask: Tensor, weight: Tensor) -> Tensor:
        """5 (mask + 0.1 minimap + 0.1 no-target), each a `two_class_loss`; a sample with an empty mask has no target.

        A region is of the target if all pixels next to its centre are.
        """
        logits = F.interpolate(output.mask, mask.shape[-2:], mode="bilinear", align_corners=False)
        regions = F.interpolate(mask[:, None].float(), (_SIDE, _SIDE), mode="bilinear", align_corners=False)[
            :, 0
        ].floor()
        none = mask.flatten(1).sum(1) == 0
        parts = (two_class_loss(output.minimap, regions, weight), two_class_loss(output.no_target, none, weight))
        return 5 * (two_class_loss(logits, mask, weight) + 0.1 * parts[0] + 0.1 * parts[1])
