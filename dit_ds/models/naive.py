"""A layer as it is usually written: SAM's attention over the concatenation [words; image], its map and its bias whole.

What the paper's released code computes, and what memory is compared with. The weights, and but for rounding the
results, are those of `image_encoder.WordBlock`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch import Tensor, nn


def naive_attention(attn: nn.Module, tokens: Tensor, grid: tuple[int, int], word_mask: Tensor | None) -> Tensor:
    """All T+N rows attend to all; the positions are added to the image's part of the map.

    Args:
        attn: a `WordAttention`.
        tokens: (B, T+N, D), words first.
        grid: (H, W), N = H*W.
        word_mask: (B, T) bool, False at padding.
    Returns:
        (B, T+N, D)
    """
    b, length, dim = tokens.shape
    heads, words = attn.num_heads, length - grid[0] * grid[1]
    qkv, _ = attn.qkv(tokens)
    q, k, v = qkv.view(b, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, b * heads, length, -1).unbind(0)
    logits = (q * attn.scale) @ k.transpose(-2, -1)  # (B*heads, T+N, T+N)
    logits[:, words:, words:] = add_decomposed_rel_pos(
        logits[:, words:, words:], q[:, words:], attn.rel_pos_h, attn.rel_pos_w, grid, grid
    )
    if word_mask is not None:
        padding = F.pad(~word_mask, (0, length - words)).repeat_interleave(heads, 0)[:, None]
        logits.masked_fill_(padding, float("-inf"))
    out = (logits.softmax(-1) @ v).view(b, heads, length, -1).transpose(1, 2).reshape(b, length, dim)
    return attn.proj(out)


def naive_block(block: nn.Module, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
    """All rows through everything; the words' are dropped at the end.

    Args:
        block: a `WordBlock`.
        x, words, word_mask: (B, H, W, D), (B, T, D) and (B, T).
    Returns:
        (B, H, W, D)
    """
    b, h, w, dim = x.shape
    t = 0 if words is None else words.shape[1]
    tokens = x.flatten(1, 2) if words is None else torch.cat([words, x.flatten(1, 2)], dim=1)  # (B, T+N, D)
    tokens = tokens + naive_attention(block.attn, block.norm1(tokens), (h, w), word_mask)
    hidden = F.gelu(block.mlp.lin1(block.norm2(tokens)))
    tokens = tokens + F.linear(hidden, block.mlp.lin2.weight, block.mlp.lin2.bias)
    return tokens[:, t:].view(b, h, w, dim)
