"""The schemes of deep instruction tuning: how text enters a layer of the image encoder; and static tokens beside it.

Shapes: B samples, T text tokens, k static tokens, D the width of the ViT.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """Options of every scheme.

    Attributes:
        zero: projections start with zero weights: all text tokens of a layer are the same, its bias, and the image's
            features do not depend on the text at first. False: PyTorch's initialisation.
        adapt: `EndToEnd` has a linear layer between every two layers of the ViT.
        dropout: of the text tokens that enter; 0.1 in the paper's released code, not in its text.
    """

    zero: bool = False
    adapt: bool = False
    dropout: float = 0.0


class Instruction(nn.Module):
    """A scheme: makes the text tokens that each layer of the image encoder reads.

    Attributes:
        carries: what the next layer's `forward` gets as `text`: `text`, the input of this one; `tokens`, the output of
            this one; `layer`, the text tokens that the ViT's layer puts out, which it then computes.
    """

    carries = "text"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__()
        self.dropout = nn.Dropout(options.dropout)

    @abstractmethod
    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        """The text tokens that a layer reads.

        Args:
            text: (B, T, text_dim) at layer 0, later as `carries` says.
            layer: counted from 0.
            image: (B, H, W, embed_dim), the layer's input.
        Returns:
            (B, T, embed_dim)
        """


def projection(inputs: int, outputs: int, zero: bool) -> nn.Linear:
    """A linear layer, with `zero` of zero weights at first.

    Its bias then is small, but not zero: the LayerNorm that reads it would multiply the first gradients of zero vectors
    by a thousand, or a million where there are two, and Adam's second moment would remember them for the whole training.
    """
    linear = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(linear.weight)
        nn.init.normal_(linear.bias, std=0.02)
    return linear


def identity(dim: int) -> nn.Linear:
    """A linear layer (.., dim) to (.., dim) that is the identity at first."""
    linear = nn.Linear(dim, dim)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class LayerWise(Instruction):
    """L-DIT (paper section 3.3, equation 8): every layer i has its own projection of the text, F_t^i = F_t W_i + b_i."""

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projections = nn.ModuleList(projection(text_dim, embed_dim, options.zero) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.dropout(self.projections[layer](text))


class EndToEnd(Instruction):
    """E-DIT (section 3.2, equations 4-7): projected once, F_t^0 = F_t W_0 + b_0, the text tokens go
    through the layers with the visual ones.

    With `Options.adapt` a linear layer, the identity at first, is applied to the text tokens between two layers: the
    paper adds it where the image encoder is frozen, its released code always.
    """

    carries = "layer"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projection = projection(text_dim, embed_dim, options.zero)
        self.adapters = nn.ModuleList(identity(embed_dim) for _ in range(depth - 1) if options.adapt)

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        if layer == 0:
            return self.dropout(self.projection(text))
        return self.adapters[layer - 1](text) if self.adapters else text


class Cascade(Instruction):
    """Table 9 (appendix A.2): each layer's projection is applied to the previous one's output, F_t^i = F_t^(i-1) W_i + b_i.

    All but the first are the identity at first: through a chain of random ones little but their biases would be left.
    """

    carries = "tokens"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        first = projection(text_dim, embed_dim, options.zero)
        self.chain = nn.ModuleList([first, *(identity(embed_dim) for _ in range(depth - 1))])

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        tokens = self.chain[layer](text)
        return self.dropout(tokens) if layer == 0 else tokens  # later layers get what went through it


class _TextAttention(nn.Module):
    """One layer of `CrossAttention`: LN(F_t W + MHA(F_t, image))."""

    heads, width = 8, 512

    def __init__(self, text_dim: int, embed_dim: int, options: Options):
        super().__init__()
        self.project = projection(text_dim, embed_dim, options.zero)
        self.query = nn.Linear(text_dim, self.width)
        self.key_value = nn.Linear(embed_dim, 2 * self.width)
        self.out = projection(self.width, embed_dim, options.zero)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, T, text_dim) and (B, H, W, embed_dim) to (B, T, embed_dim)."""
        q = rearrange(self.query(text), "b t (heads d) -> b heads t d", heads=self.heads)
        visual = self.key_value(rearrange(image, "b h w d -> b (h w) d"))
        k, v = rearrange(visual, "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads t d -> b t (heads d)")
        return self.norm(self.project(text) + self.dropout(self.out(attended)))


class CrossAttention(Instruction):
    """Table 4, CrossAtt: the text tokens of a layer depend on the image, by cross-attention.

    The paper does not say what the text attends to; here it is the layer's own visual tokens. In its released code it is
    the text rows that left the layer before. Width and heads are that code's.
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.attend = nn.ModuleList(_TextAttention(text_dim, embed_dim, options) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.attend[layer](text, image)


class _FeedForward(nn.Module):
    """LN(x + FFN(x)), as wide as in the released code."""

    def __init__(self, dim: int, options: Options):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 2048), nn.ReLU(), projection(2048, dim, options.zero))
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(.., dim) to the same."""
        return self.norm(x + self.dropout(self.layers(x)))


class CrossAttentionFFN(CrossAttention):
    """Table 4, CrossAtt + FFN."""

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.feed_forward = nn.ModuleList(_FeedForward(embed_dim, options) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.feed_forward[layer](super().forward(text, layer, image))


class StaticTokens(nn.Module):
    """Prompt tuning beside the text (Table 2): learnable tokens of each layer, the same for all samples.

    Args:
        count: tokens a layer.
        additive: added to the layer's text tokens, of which there are as many (the released code), not concatenated.
    """

    def __init__(self, count: int, embed_dim: int, depth: int, additive: bool):
        super().__init__()
        self.additive = additive
        # added to the text: zero at first
        self.tokens = nn.Parameter(torch.randn(depth, count, embed_dim) * (0.0 if additive else 0.02))

    def forward(self, text: Tensor, text_mask: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
        """Text tokens (B, T, D) and mask (B, T) to those of [text; static], (B, T+k, D) and (B, T+k)."""
        static = self.tokens[layer].expand(len(text), -1, -1)
        if self.additive:
            return text + static, text_mask
        mask = None if text_mask is None else F.pad(text_mask, (0, static.shape[1]), value=True)
        return torch.cat([text, static], dim=1), mask


# A new scheme is its class, a line here, and its name in `config.schema.ModelConfig.scheme`.
SCHEMES: dict[str, type[Instruction] | None] = {
    "default": None,  # text meets the image in the mask decoder only
    "end_to_end": EndToEnd,
    "layer_wise": LayerWise,
    "cascade": Cascade,
    "cross_attention": CrossAttention,
    "cross_attention_ffn": CrossAttentionFFN,
}


def make_instruction(
    scheme: str, text_dim: int, embed_dim: int, depth: int, options: Options | None = None
) -> Instruction | None:
    """The scheme's module; None for `default`, where text meets the image in the mask decoder only."""
    scheme_class = SCHEMES[scheme]
    return scheme_class(text_dim, embed_dim, depth, options or Options()) if scheme_class else None
