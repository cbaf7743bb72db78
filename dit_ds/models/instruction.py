"""How words enter a layer of the image encoder: the schemes of deep instruction tuning, and static tokens beside them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """What every scheme is told.

    Attributes:
        zero: what is new starts with weights of zero, so that every word is the same blank token, which says nothing
            yet; the image's features then don't depend on the words at first. False: PyTorch's initialisation.
        adapt: `EndToEnd` has its linear layers between the ViT's.
        dropout: of the words that enter; 0.1 in the paper's released code, not in its text.
    """

    zero: bool = False
    adapt: bool = False
    dropout: float = 0.0


class Instruction(nn.Module):
    """A scheme: makes the tokens that each layer of the image encoder reads.

    Attributes:
        carries: what the next layer's `forward` gets as `words`: `text`, what this layer's got; `tokens`, what this
            layer's made; `layer`, the words that came out of the ViT's layer, which then computes them.
    """

    carries = "text"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__()
        self.dropout = nn.Dropout(options.dropout)

    @abstractmethod
    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        """The tokens that a layer reads.

        Args:
            words: (B, T, text_dim) at layer 0, later as `carries` says.
            layer: counted from 0.
            image: (B, H, W, embed_dim), the layer's input.
        Returns:
            (B, T, embed_dim)
        """


def projection(inputs: int, outputs: int, zero: bool) -> nn.Linear:
    """A linear layer, if asked with weights of zero at first.

    Its bias then is small, but not zero: the LayerNorm that reads it would multiply the first gradients of zero vectors
    by a thousand, or a million where there are two, and Adam's second moment would remember them for the whole training.
    """
    linear = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(linear.weight)
        nn.init.normal_(linear.bias, std=0.02)
    return linear


def identity(dim: int) -> nn.Linear:
    """A linear layer that changes nothing at first."""
    linear = nn.Linear(dim, dim)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class LayerWise(Instruction):
    """L-DIT (paper section 3.3, equation 8): every layer i has its own projection of the words, F_t^i = F_t W_i + b_i."""

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projections = nn.ModuleList(projection(text_dim, embed_dim, options.zero) for _ in range(depth))

    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.dropout(self.projections[layer](words))


class EndToEnd(Instruction):
    """E-DIT (section 3.2, equations 4-7): projected once, F_t^0 = F_t W_0 + b_0, the words flow on with the image.

    With `Options.adapt` a linear layer works on the words between two layers, the identity at first: what the paper
    adds where the image encoder is frozen, and its released code always.
    """

    carries = "layer"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projection = projection(text_dim, embed_dim, options.zero)
        self.adapters = nn.ModuleList(identity(embed_dim) for _ in range(depth - 1) if options.adapt)

    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        if layer == 0:
            return self.dropout(self.projection(words))
        return self.adapters[layer - 1](words) if self.adapters else words


class Cascade(Instruction):
    """Table 9 (appendix A.2): each layer's projection works on the former one's, F_t^i = F_t^(i-1) W_i + b_i.

    All but the first are the identity at first: a chain of random ones would leave their biases only.
    """

    carries = "tokens"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        first = projection(text_dim, embed_dim, options.zero)
        self.chain = nn.ModuleList([first, *(identity(embed_dim) for _ in range(depth - 1))])

    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        tokens = self.chain[layer](words)
        return self.dropout(tokens) if layer == 0 else tokens  # once: what is carried on has been through it


class _WordsAttend(nn.Module):
    """A layer's part of `CrossAttention`: LN(F_t W + MHA(F_t, image))."""

    heads, width = 8, 512

    def __init__(self, text_dim: int, embed_dim: int, options: Options):
        super().__init__()
        self.project = projection(text_dim, embed_dim, options.zero)
        self.query = nn.Linear(text_dim, self.width)
        self.key_value = nn.Linear(embed_dim, 2 * self.width)
        self.out = projection(self.width, embed_dim, options.zero)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        """(B, T, text_dim) and (B, H, W, embed_dim) to (B, T, embed_dim)."""
        q = self.query(words).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, d)
        k, v = self.key_value(image.flatten(1, 2)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, heads*d)
        return self.norm(self.project(words) + self.dropout(self.out(seen)))


class CrossAttention(Instruction):
    """Table 4, CrossAtt: what a layer's words are depends on the image they are to enter.

    The paper does not say what the words attend to; here the layer's own visual tokens. Its released code's are perhaps
    learnable ones. Width and heads are that code's.
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.attend = nn.ModuleList(_WordsAttend(text_dim, embed_dim, options) for _ in range(depth))

    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.attend[layer](words, image)


class _FeedForward(nn.Module):
    """LN(x + FFN(x)) as in the Transformer, of the released code's width."""

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

    def forward(self, words: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.feed_forward[layer](super().forward(words, layer, image))


class StaticTokens(nn.Module):
    """Conventional prompt tuning beside the words (Table 2): learnable tokens of each layer, the same for all examples.

    Args:
        count: tokens a layer.
        additive: onto the layer's words, of which there are as many (the released code), instead of beside them.
    """

    def __init__(self, count: int, embed_dim: int, depth: int, additive: bool):
        super().__init__()
        self.additive = additive
        # onto the words: nothing at first
        self.tokens = nn.Parameter(torch.randn(depth, count, embed_dim) * (0.0 if additive else 0.02))

    def forward(self, words: Tensor, word_mask: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
        """A layer's words (B, T, D) and mask (B, T) to those of [words; static], (B, T+k, D) and (B, T+k)."""
        static = self.tokens[layer].expand(len(words), -1, -1)
        if self.additive:
            return words + static, word_mask
        mask = None if word_mask is None else F.pad(word_mask, (0, static.shape[1]), value=True)
        return torch.cat([words, static], dim=1), mask


# A new scheme is its class, a line here, and its name in `config.schema.ModelConfig.scheme`.
SCHEMES: dict[str, type[Instruction] | None] = {
    "default": None,  # words meet the image in the mask decoder only
    "end_to_end": EndToEnd,
    "layer_wise": LayerWise,
    "cascade": Cascade,
    "cross_attention": CrossAttention,
    "cross_attention_ffn": CrossAttentionFFN,
}


def make_instruction(
    scheme: str, text_dim: int, embed_dim: int, depth: int, options: Options | None = None
) -> Instruction | None:
    """The scheme's module; None for `default`, whose words meet the image in the mask decoder only."""
    scheme_class = SCHEMES[scheme]
    return scheme_class(text_dim, embed_dim, depth, options or Options()) if scheme_class else None
