"""SAM's image encoder, every layer of which can read words.

Without words it computes what `segment_anything`'s `ImageEncoderViT` computes, from parameters of the same names.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dit_ds.errors import UserError
from dit_ds.models.attention import relative_position_attention, word_attention
from dit_ds.models.attention_kernels import why_not
from dit_ds.models.instruction import Instruction, StaticTokens
from dit_ds.models.naive import naive_block

# Activation checkpointing: what is computed again in the backward pass instead of being kept
#   none       nothing
#   block      each layer, from its input
#   every_K    K layers at a time, from the input of the first
#   selective  each layer but its attention, whose output and log-sum-exp are kept: they take no more room than the
#              layer's input, and for their size would take longest to compute again
CHECKPOINTING = r"none|block|selective|every_[1-9][0-9]*"


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, H, W, dim): half of the channels waves along the rows, half along the columns, from one to many a side."""
    waves = torch.pi * 2.0 ** torch.linspace(-1, 3, dim // 4)
    angles = [(torch.arange(n)[:, None] + 0.5) / n * waves for n in grid]  # (H, dim/4), (W, dim/4)
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)
    both = [rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)]
    return torch.cat(both, dim=-1)[None] * 0.25


class QKV(nn.Linear):
    """SAM's `qkv` projection. Words whose outputs nobody reads need keys and values only."""

    def forward(self, x: Tensor, words: Tensor | None = None, flow: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and (B, T, D) to (B, N, 3D) and (B, T, 2D); to (B, T, 3D) where the words flow on."""
        d = 0 if flow else self.in_features
        of_words = None if words is None else F.linear(words, self.weight[d:], self.bias[d:])
        return super().forward(x), of_words


class WordAttention(Attention):
    """SAM's `Attention` whose visual queries also attend to words."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], backend: str):
        super().__init__(dim, num_heads, qkv_bias=True, use_rel_pos=True, input_size=grid)
        self.qkv = QKV(dim, 3 * dim)
        self.backend = backend

    def forward(
        self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None, flow: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) and (B, T, D) to the same; words are None unless they flow on."""
        b, h, w, dim = x.shape
        qkv, of_words = self.qkv(x.view(b, h * w, dim), words, flow)
        qkv = qkv.view(b, h * w, 3, self.num_heads, -1)
        if of_words is not None:
            of_words = of_words.view(b, words.shape[1], -1, self.num_heads, qkv.shape[-1])
        queries = of_words[:, :, 0] if flow else None
        of_words = of_words[:, :, 1:] if flow else of_words
        out = relative_position_attention(
            qkv, self.rel_pos_h, self.rel_pos_w, grid=(h, w), words=of_words, word_mask=word_mask, backend=self.backend
        )  # (B, N, heads, d)
        out = self.proj(out.reshape(b, h, w, dim))
        if not flow:
            return out, None
        return out, self.proj(word_attention(queries, qkv, of_words, word_mask).reshape(b, -1, dim))


class _LinearOfGELU(torch.autograd.Function):
    """linear(gelu(x)) that keeps x alone: gelu(x), as large, is cheap to compute again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            torch.ops.aten.gelu_backward(grad @ weight, x) if of_x else None,
            rows.t() @ F.gelu(x).flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class LinearOfGELU(nn.Linear):
    """The second linear layer of SAM's MLP together with the activation before it."""

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearOfGELU:
        """With the parameters of a plain one."""
        new = cls(linear.in_features, linear.out_features, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(.., in_features) before the activation to (.., out_features)."""
        if torch.is_autocast_enabled(x.device.type):  # which doesn't look into a function with its own gradient
            return super().forward(F.gelu(x))
        return _LinearOfGELU.apply(x, self.weight, self.bias)


class WordBlock(Block):
    """SAM's `Block` over [words; visual].

    Words flow on with the image (equation 6), or only the visual rows do (equation 8): words that are replaced before
    the next layer have outputs that would be thrown away, and are not computed. In a block with windows each window
    attends to itself and to all words.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], backend: str, window_size: int = 0):
        if backend == "naive" and window_size:
            raise UserError("model.attention naive attends globally: set model.window_size 0, or model.attention auto")
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(dim, num_heads, norm_layer=norm, use_rel_pos=True, window_size=window_size, input_size=grid)
        self.attn = WordAttention(dim, num_heads, (window_size, window_size) if window_size else grid, backend)
        self.mlp.act = nn.Identity()
        self.mlp.lin2 = LinearOfGELU.of(self.mlp.lin2)

    def forward(
        self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None, flow: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) and (B, T, D) to the same; words are None unless they flow on."""
        if self.attn.backend == "naive":
            x, after = naive_block(self, x, words, word_mask)
            return x, after if flow else None
        normed = None if words is None else self.norm1(words)
        of_x, of_words = self._attend(self.norm1(x), normed, word_mask, flow)
        x = x + of_x
        x = x + self.mlp(self.norm2(x))
        if flow:
            words = words + of_words
            words = words + self.mlp(self.norm2(words))
        return x, words if flow else None

    def _attend(
        self, x: Tensor, words: Tensor | None, word_mask: Tensor | None, flow: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not self.window_size:
            return self.attn(x, words, word_mask, flow)
        size = x.shape[1:3]
        windows, padded_size = window_partition(x, self.window_size)  # (B*windows, window, window, D)
        each = windows.shape[0] // x.shape[0]
        words, word_mask = (y if y is None else y.repeat_interleave(each, 0) for y in (words, word_mask))
        out, of_words = self.attn(windows, words, word_mask, flow)
        if flow:  # each window has its own answer to a word's query: their mean goes on
            of_words = of_words.unflatten(0, (-1, each)).mean(1)
        return window_unpartition(out, self.window_size, padded_size, size), of_words


class ImageEncoder(ImageEncoderViT):
    """SAM's ViT with a scheme by which words enter its layers.

    Args:
        image_size: side of the square input in pixels.
        patch_size, embed_dim, depth, num_heads, out_chans: as in SAM.
        backend: one of `attention.BACKENDS`, or naive for `naive.naive_block`.
        window_size: of the layers that don't attend globally; 0 for global attention in all, as in the paper's code.
        global_layers: those that do where there are windows.
    Attributes:
        instruction: how words enter the layers; None: they don't.
        static_tokens: learnable tokens beside them, or None.
    """

    instruction: Instruction | None
    static_tokens: StaticTokens | None

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_chans: int,
        backend: str = "auto",
        window_size: int = 0,
        global_layers: tuple[int, ...] = (),
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
        self._policy = "none"  # of activation checkpointing
        grid = (image_size // patch_size, image_size // patch_size)
        self.blocks = nn.ModuleList(
            WordBlock(embed_dim, num_heads, grid, backend, 0 if i in global_layers else window_size)
            for i in range(depth)
        )
        self.instruction = self.static_tokens = None
        self.checkpoint_activations("none")
        # SAM leaves these at zero and loads them; from scratch a place must be told from another to be learned
        with torch.no_grad():
            self.pos_embed.copy_(sine_positions(grid, embed_dim))

    def checkpoint_activations(self, policy: str) -> None:
        """Choose what the backward pass computes again, see `CHECKPOINTING`.

        Raises:
            ValueError: no such policy.
        """
        if not re.fullmatch(CHECKPOINTING, policy):
            raise ValueError(f"{policy!r} is not none, block, every_K or selective")
        self._policy = policy

    def compile_blocks(self) -> None:
        """Let torch.compile make the kernels of the blocks, at their first use."""
        # which kernel serves is asked while tracing; marked here and not where it is defined, as this imports the compiler
        torch.compiler.assume_constant_result(why_not)
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def forward(self, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            x: (B, 3, S, S) normalised image.
            words: (B, T, text_dim); ignored where there is no `instruction`.
            word_mask: (B, T) bool, False at padding.
        Returns:
            (B, out_chans, S/patch, S/patch)
        """
        x = self.patch_embed(x) + self.pos_embed  # (B, H, W, D)
        if self.instruction is None:
            words = None
        again = self._policy != "none" and torch.is_grad_enabled()
        together = int(self._policy[6:]) if self._policy.startswith("every_") else 1
        for i in range(0, len(self.blocks), together):
            layers = range(i, min(i + together, len(self.blocks)))
            if again:
                x, words = checkpoint(self._layers, layers, x, words, word_mask, use_reentrant=False, **self._kept())
            else:
                x, words = self._layers(layers, x, words, word_mask)
        return self.neck(x.permute(0, 3, 1, 2))

    def _layers(
        self, layers: range, x: Tensor, words: Tensor | None, word_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Some layers; what comes out beside the image is what the next one's instruction takes."""
        for i in layers:
            if words is None:
                x, _ = self.blocks[i](x)
                continue
            carries = self.instruction.carries
            flow = carries == "layer" and i + 1 < len(self.blocks)  # nobody reads the last layer's
            made = tokens = self.instruction(words, i, x)  # (B, T, D)
            mask = word_mask
            if self.static_tokens is not None:
                tokens, mask = self.static_tokens(tokens, mask, i)
            x, after = self.blocks[i](x, tokens, mask, flow)
            if flow:
                words = after[:, : made.shape[1]]
            elif carries == "tokens":
                words = made
        return x, words

    def _kept(self) -> dict[str, Any]:
        """What `selective` keeps within a layer."""
        if self._policy != "selective":
            return {}
        return {"context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.dit_ds.attention.default])}
