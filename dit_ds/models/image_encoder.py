"""SAM's image encoder (ViT), every layer of which can read text tokens.

Without text it computes what `segment_anything`'s `ImageEncoderViT` computes, from parameters of the same names and
shapes; at any image size, to which it interpolates the position tables.

Shapes: B samples, T text tokens, N = H*W visual tokens of width D, `heads` heads of width d = D/heads.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dit_ds.config.train_schema import ACTIVATION_CHECKPOINTING
from dit_ds.errors import UserError
from dit_ds.models.attention import relative_position_attention, text_attention
from dit_ds.models.attention_kernels import why_not
from dit_ds.models.instruction import Instruction, StaticTokens
from dit_ds.models.naive import naive_block
from dit_ds.models.positions import absolute_positions, take_lengths


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, H, W, dim): half of the channels encode the row, half the column, by waves of 1/2 to 8 half-periods a side."""
    waves = torch.pi * 2.0 ** torch.linspace(-1, 3, dim // 4)
    angles = [(torch.arange(n)[:, None] + 0.5) / n * waves for n in grid]  # (H, dim/4), (W, dim/4)
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)  # (H, dim/2), (W, dim/2)
    both = [repeat(rows, "h d -> 1 h w d", w=grid[1]), repeat(columns, "w d -> 1 h w d", h=grid[0])]
    return torch.cat(both, dim=-1) * 0.25


class QKV(nn.Module):
    """SAM's `qkv` projection, a linear layer D to 3D, of the text, too: both with one gathering of the weights by ZeRO-3.

    Text whose outputs are not needed has keys and values only. `lora`, where there is one, see `lora.LoRA`, updates all.
    """

    lora: nn.Module | None

    def __init__(self, dim: int):
        super().__init__()
        linear = nn.Linear(dim, 3 * dim)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = None

    def forward(self, x: Tensor, text: Tensor | None = None, update_text: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and (B, T, D) to (B, N, 3D) and (B, T, 2D), with `update_text` (B, T, 3D)."""
        d = 0 if update_text else x.shape[-1]
        text_qkv = None if text is None else F.linear(text, self.weight[d:], self.bias[d:])
        qkv = F.linear(x, self.weight, self.bias)
        if self.lora is not None:
            qkv.add_(self.lora(x))
            if text_qkv is not None:
                text_qkv.add_(self.lora(text, first=d))
        return qkv, text_qkv


class JointAttention(Attention):
    """SAM's `Attention` whose visual queries also attend to text tokens."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], backend: str):
        super().__init__(dim, num_heads, qkv_bias=True, use_rel_pos=True, input_size=grid)
        self.qkv = QKV(dim)
        self.backend = backend

    def forward(
        self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None, update_text: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) and (B, T, D) to the same; the text's output is None without `update_text`."""
        h, w = grid = x.shape[1], x.shape[2]
        qkv, text_qkv = self.qkv(rearrange(x, "b h w d -> b (h w) d"), text, update_text)
        qkv = rearrange(qkv, "b n (three heads d) -> b n three heads d", three=3, heads=self.num_heads)
        if text_qkv is not None:  # (B, T, 3, heads, d) or (B, T, 2, heads, d)
            text_qkv = rearrange(
                text_qkv, "b t (kind heads d) -> b t kind heads d", heads=self.num_heads, d=qkv.shape[-1]
            )
        text_kv = text_qkv[:, :, 1:] if text_qkv is not None and update_text else text_qkv
        out = relative_position_attention(
            qkv, self.rel_pos_h, self.rel_pos_w, grid, text_kv, text_mask=text_mask, backend=self.backend
        )  # (B, N, heads, d)
        out = self.proj(rearrange(out, "b (h w) heads d -> b h w (heads d)", h=h, w=w))
        if text_qkv is None or text_kv is None or not update_text:
            return out, None
        text_out = text_attention(text_qkv[:, :, 0], qkv, text_kv, text_mask)  # (B, T, heads, d)
        return out, self.proj(rearrange(text_out, "b t heads d -> b t (heads d)"))


class _LinearOfGELU(torch.autograd.Function):
    """linear(gelu(x)) that saves x alone: gelu(x), as large as x, is cheap to recompute in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            torch.ops.aten.gelu_backward(grad @ weight, x) if need_x else None,
            rows.t() @ F.gelu(x).flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(gelu(x)), (.., in_features) to (.., out_features)."""
    if torch.is_autocast_enabled(x.device.type):  # which does not reach inside an autograd.Function
        return F.linear(F.gelu(x), weight, bias)
    return _LinearOfGELU.apply(x, weight, bias)


class LinearOfGELU(nn.Linear):
    """The second linear layer of SAM's MLP together with the activation before it. `lora` as of `QKV`."""

    lora: nn.Module | None

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearOfGELU:
        """With the parameters of a plain linear layer."""
        new = cls(linear.in_features, linear.out_features, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.lora = None
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(.., in_features) before the activation to (.., out_features)."""
        out = linear_of_gelu(x, self.weight, self.bias)
        return out if self.lora is None else out + self.lora(x, of_gelu=True)

    def of_activated(self, x: Tensor) -> Tensor:
        """The same of x behind the activation, as an MLP is usually written."""
        out = super().forward(x)
        return out if self.lora is None else out.add_(self.lora(x))


class JointBlock(Block):
    """SAM's `Block` over [text; visual].

    With `update_text` the text's rows are computed, too (equation 6), else the visual rows only (equation 8): text that
    the next layer does not read has outputs that nobody uses. In a block with windows each window attends to itself and
    to all text tokens.

    Args:
        table_grid: H and W that the relative position tables are made for; None: those of what attends, `grid` or a
            window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        backend: str,
        window_size: int = 0,
        table_grid: tuple[int, int] | None = None,
    ):
        if backend == "naive" and window_size:
            raise UserError("model.attention naive attends globally: set model.window_size 0, or model.attention auto")
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(dim, num_heads, norm_layer=norm, use_rel_pos=True, window_size=window_size, input_size=grid)
        table_grid = table_grid or ((window_size, window_size) if window_size else grid)
        self.attn = JointAttention(dim, num_heads, table_grid, backend)
        self.mlp.act = nn.Identity()
        self.mlp.lin2 = LinearOfGELU.of(self.mlp.lin2)

    def forward(
        self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None, update_text: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) and (B, T, D) to the same; the text's output is None without `update_text`."""
        if self.attn.backend == "naive":
            x, text = naive_block(self, x, text, text_mask)
            return x, text if update_text else None
        normed = None if text is None else self.norm1(text)
        x_out, text_out = self._attend(self.norm1(x), normed, text_mask, update_text)
        x = x + x_out
        x = x + self.mlp(self.norm2(x))
        if text is None or text_out is None:
            return x, None
        text = text + text_out
        return x, text + self.mlp(self.norm2(text))

    def _attend(
        self, x: Tensor, text: Tensor | None, text_mask: Tensor | None, update_text: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not self.window_size:
            return self.attn(x, text, text_mask, update_text)
        windows, padded_size = window_partition(x, self.window_size)  # (B*windows, window, window, D)
        each = windows.shape[0] // x.shape[0]
        text, text_mask = (
            y if y is None else repeat(y, "b ... -> (b windows) ...", windows=each) for y in (text, text_mask)
        )
        out, text_out = self.attn(windows, text, text_mask, update_text)
        if text_out is not None:  # each window has an output for a text token's query: the next layer reads their mean
            text_out = reduce(text_out, "(b windows) t d -> b t d", "mean", windows=each)
        return window_unpartition(out, self.window_size, padded_size, x.shape[1:3]), text_out


class ImageEncoder(ImageEncoderViT):
    """SAM's ViT with a scheme by which text enters its layers.

    Args:
        image_size: side of the square input in pixels.
        patch_size, embed_dim, depth, num_heads, out_chans: as in SAM.
        backend: one of `attention.BACKENDS`, or naive for `naive.naive_block`.
        window_size: of the layers that don't attend globally, in tokens; 0 for global attention in all, as in the
            paper's code.
        global_layers: those that attend globally where the others have windows.
        pretrained: image and window size that the position tables are made for; None: those above. A state dict whose
            tables have other lengths loads, too: its lengths are then the tables'.
    Attributes:
        grid: H and W of the image's tokens.
        instruction: the scheme; None: no text enters.
        static_tokens: learnable tokens beside the text, or None.
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
        pretrained: tuple[int, int] | None = None,
    ):
        norm = partial(nn.LayerNorm, eps=1e-6)
        table_size, table_window = pretrained or (image_size, window_size)
        super().__init__(
            table_size,
            patch_size,
            embed_dim=embed_dim,
            depth=0,
            num_heads=num_heads,
            out_chans=out_chans,
            norm_layer=norm,
        )
        self.img_size = image_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        table_grid = (table_size // patch_size, table_size // patch_size)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            window, of_window = (0, 0) if i in global_layers else (window_size, table_window)
            relative = (of_window, of_window) if of_window else table_grid
            self.blocks.append(JointBlock(embed_dim, num_heads, self.grid, backend, window, table_grid=relative))
        self.register_load_state_dict_pre_hook(take_lengths)
        self.instruction = self.static_tokens = None
        self._policy = "none"  # of activation checkpointing
        # SAM leaves these at zero and loads them; from scratch the tokens must differ by position for training to begin
        with torch.no_grad():
            self.pos_embed.copy_(sine_positions(table_grid, embed_dim))

    def checkpoint_activations(self, policy: str) -> None:
        """Choose what the backward pass recomputes.

        Args:
            policy: none; block, each layer from its input; every_K, K layers at a time from the input of the first;
                selective, each layer but its attention, whose output and log-sum-exp are saved: they are no larger than
                the layer's input, and for their size cost most to recompute.
        Raises:
            ValueError: no such policy.
        """
        if not re.fullmatch(ACTIVATION_CHECKPOINTING, policy):
            raise ValueError(f"{policy!r} is not none, block, every_K or selective")
        self._policy = policy

    def compile_blocks(self) -> None:
        """Compile each layer's forward with torch.compile, at its first call."""
        # which kernel runs is asked while tracing; marked here and not where it is defined, as this imports the compiler
        torch.compiler.assume_constant_result(why_not)
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            x: (B, 3, S, S) normalised image.
            text: (B, T, text_dim); ignored where there is no `instruction`.
            text_mask: (B, T) bool, False at padding.
        Returns:
            (B, out_chans, S/patch, S/patch)
        """
        x = self.patch_embed(x)  # (B, H, W, D)
        x = x + absolute_positions(self.pos_embed, (x.shape[1], x.shape[2]))
        if self.instruction is None:
            text = None
        recompute = self._policy != "none" and torch.is_grad_enabled()
        former = None  # text tokens that the former layer put out, for a scheme that reads them
        together = int(self._policy.removeprefix("every_")) if self._policy.startswith("every_") else 1
        for i in range(0, len(self.blocks), together):
            layers = range(i, min(i + together, len(self.blocks)))
            if recompute:
                x, text, former = checkpoint(
                    self._layers, layers, x, text, former, text_mask, use_reentrant=False, **self._contexts()
                )
            else:
                x, text, former = self._layers(layers, x, text, former, text_mask)
        return self.neck(rearrange(x, "b h w d -> b d h w"))

    def _layers(
        self, layers: range, x: Tensor, text: Tensor | None, former: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Some layers: (B, H, W, D) to the same, and `text` and `former` that the next layer's instruction takes."""
        for i in layers:
            if text is None or self.instruction is None:
                x, _ = self.blocks[i](x)
                continue
            carries, reads_former = self.instruction.carries, self.instruction.reads_former_layer
            # the last layer's is not read
            update_text = (carries == "layer" or reads_former) and i + 1 < len(self.blocks)
            more = (former, text_mask) if reads_former else ()
            made = tokens = self.instruction(text, i, x, *more)  # (B, T, D)
            mask = text_mask
            if self.static_tokens is not None:
                tokens, mask = self.static_tokens(tokens, mask, i)  # (B, T+k, D)
            x, updated = self.blocks[i](x, tokens, mask, update_text)
            if update_text:
                former = updated[:, : made.shape[1]]
            if carries == "layer":
                text = former
            elif carries == "tokens":
                text = made
        return x, text, former

    def _contexts(self) -> dict[str, Any]:
        """Of `checkpoint`: with selective the attention operator's outputs are saved within a layer."""
        if self._policy != "selective":
            return {}
        return {"context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.dit_ds.attention.default])}
