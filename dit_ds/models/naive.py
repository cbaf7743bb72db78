"""A layer as it is usually written: SAM's attention over the concatenation [text; image], its map and bias materialised.

What the paper's released code computes, and what memory is compared with. The weights, and but for rounding the
results, are those of `image_encoder.JointBlock`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from segment_anything.modeling.image_encoder import Attention, Block, add_decomposed_rel_pos
from torch import Tensor


def naive_attention(attn: Attention, tokens: Tensor, grid: tuple[int, int], text_mask: Tensor | None) -> Tensor:
    """All T+N tokens attend to all; relative positions are added to the image's part of the map.

    Args:
        attn: a `JointAttention`.
        tokens: (B, T+N, D), text first.
        grid: (H, W), N = H*W.
        text_mask: (B, T) bool, False at padding.
    Returns:
        (B, T+N, D)
    """
    length, heads = tokens.shape[1], attn.num_heads
    t = length - grid[0] * grid[1]
    qkv, _ = attn.qkv(tokens)
    # (B*heads, T+N, d) each
    q, k, v = rearrange(qkv, "b n (three heads d) -> three (b heads) n d", three=3, heads=heads).unbind(0)
    logits = (q * attn.scale) @ k.transpose(-2, -1)  # (B*heads, T+N, T+N)
    logits[:, t:, t:] = add_decomposed_rel_pos(
        logits[:, t:, t:], q[:, t:], attn.rel_pos_h, rel_pos_w=attn.rel_pos_w, q_size=grid, k_size=grid
    )
    if text_mask is not None:
        padding = F.pad(~text_mask, (0, length - t)).repeat_interleave(heads, 0)[:, None]  # (B*heads, 1, T+N)
        logits.masked_fill_(padding, float("-inf"))
    return attn.proj(rearrange(logits.softmax(-1) @ v, "(b heads) n d -> b n (heads d)", heads=heads))


def naive_block(
    block: Block, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens through everything.

    Args:
        block: a `JointBlock`.
        x, text, text_mask: (B, H, W, D), (B, T, D) and (B, T).
    Returns:
        (B, H, W, D) and (B, T, D)
    """
    h, w = x.shape[1:3]
    t = 0 if text is None else text.shape[1]
    image = rearrange(x, "b h w d -> b (h w) d")
    tokens = image if text is None else torch.cat([text, image], dim=1)  # (B, T+N, D)
    tokens = tokens + naive_attention(block.attn, block.norm1(tokens), (h, w), text_mask)
    hidden = F.gelu(block.mlp.lin1(block.norm2(tokens)))
    tokens = tokens + block.mlp.lin2.of_activated(hidden)
    return rearrange(tokens[:, t:], "b (h w) d -> b h w d", h=h, w=w), tokens[:, :t]
