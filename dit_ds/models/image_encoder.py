"""SAM's image encoder, every layer of which can read words.

Without words it computes what `segment_anything`'s `ImageEncoderViT` computes with global attention, from parameters of
the same names.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, Block, ImageEncoderViT
from torch import Tensor, nn

from dit_ds.models.attention import relative_position_attention
from dit_ds.models.instruction import make_instruction


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, H, W, dim): half of the channels waves along the rows, half along the columns, from one to many a side."""
    waves = torch.pi * 2.0 ** torch.linspace(-1, 3, dim // 4)
    angles = [(torch.arange(n)[:, None] + 0.5) / n * waves for n in grid]  # (H, dim/4), (W, dim/4)
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)
    both = [rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)]
    return torch.cat(both, dim=-1)[None] * 0.25


class QKV(nn.Linear):
    """SAM's `qkv` projection. Words need keys and values only, so their query rows are not computed."""

    def forward(self, x: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and (B, T, D) to (B, N, 3D) and (B, T, 2D)."""
        d = self.in_features
        of_words = None if words is None else F.linear(words, self.weight[d:], self.bias[d:])
        return super().forward(x), of_words


class WordAttention(Attention):
    """SAM's `Attention` whose visual queries also attend to words."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], backend: str):
        super().__init__(dim, num_heads, qkv_bias=True, use_rel_pos=True, input_size=grid)
        self.qkv = QKV(dim, 3 * dim)
        self.backend = backend

    def forward(self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        b, h, w, dim = x.shape
        qkv, of_words = self.qkv(x.view(b, h * w, dim), words)
        q, k, v = qkv.view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        if of_words is not None:
            of_words = of_words.view(b, -1, 2, self.num_heads, q.shape[-1]).permute(2, 0, 3, 1, 4).unbind(0)
        out = relative_position_attention(
            q, k, v, self.rel_pos_h, self.rel_pos_w, (h, w), of_words, word_mask, self.backend
        )
        return self.proj(out.transpose(1, 2).reshape(b, h, w, dim))


class WordBlock(Block):
    """SAM's `Block` over [words; visual] of which only the visual rows go on (equation 8).

    The words a layer gets are replaced before the next, so their own outputs would be thrown away: they are not
    computed.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], backend: str):
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(dim, num_heads, norm_layer=norm, use_rel_pos=True, window_size=0, input_size=grid)
        self.attn = WordAttention(dim, num_heads, grid, backend)

    def forward(self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        x = x + self.attn(self.norm1(x), None if words is None else self.norm1(words), word_mask)
        return x + self.mlp(self.norm2(x))


class ImageEncoder(ImageEncoderViT):
    """SAM's ViT with global attention in every layer and a scheme by which words enter them.

    Args:
        image_size: side of the square input in pixels.
        patch_size, embed_dim, depth, num_heads, out_chans: as in SAM.
        scheme: one of `instruction.SCHEMES`.
        text_dim: width of the words.
        backend: one of `attention.BACKENDS`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_chans: int,
        scheme: str,
        text_dim: int,
        backend: str = "auto",
    ):
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(
            image_size,
            patch_size,
            embed_dim=embed_dim,
            depth=0,
            num_heads=num_heads,
            out_chans=out_chans,
            norm_layer=norm,
        )
        grid = (image_size // patch_size, image_size // patch_size)
        self.blocks = nn.ModuleList(WordBlock(embed_dim, num_heads, grid, backend) for _ in range(depth))
        self.instruction = make_instruction(scheme, text_dim, embed_dim, depth)
        # SAM leaves these at zero and loads them; from scratch a place must be told from another to be learned
        with torch.no_grad():
            self.pos_embed.copy_(sine_positions(grid, embed_dim))

    def forward(self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            x: (B, 3, S, S) normalised image.
            words: (B, T, text_dim); ignored by the scheme `default`.
            word_mask: (B, T) bool, False at padding.
        Returns:
            (B, out_chans, S/patch, S/patch)
        """
        x = self.patch_embed(x) + self.pos_embed  # (B, H, W, D)
        for i, block in enumerate(self.blocks):
            if self.instruction is None or words is None:
                x = block(x)
            else:
                x = block(x, self.instruction(words, i), word_mask)
        return self.neck(x.permute(0, 3, 1, 2))
