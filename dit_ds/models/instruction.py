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
        released: the scheme as the paper's released code has it, where that is another; see each scheme.
        static: there are static tokens, beside which the released `LayerWise` has no projections.
    """

    zero: bool = False
    adapt: bool = False
    dropout: float = 0.0
    released: bool = False
    static: bool = False


class Instruction(nn.Module):
    """A scheme: makes the text tokens that each layer of the image encoder reads.

    Attributes:
        carries: what the next layer's `forward` gets as `text`: `text`, the input of this one; `tokens`, the output of
            this one; `layer`, the text tokens that the ViT's layer puts out, which it then computes.
        reads_former_layer: `forward` takes two more arguments: the text tokens that the ViT's former layer put out
            (B, T, embed_dim), None at layer 0; and the text's mask (B, T), True at words, or None.
    """

    carries = "text"
    reads_former_layer = False

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


def to_width(text_dim: int, embed_dim: int, zero: bool) -> nn.Module:
    """For the released schemes that take text as it is, as wide as the ViT: BERT's 768 for ViT-B.

    Text of another width has one projection for all layers, as the released ViT-H has before its layers' own.
    """
    return nn.Identity() if text_dim == embed_dim else projection(text_dim, embed_dim, zero)


def identity(dim: int) -> nn.Linear:
    """A linear layer (.., dim) to (.., dim) that is the identity at first."""
    linear = nn.Linear(dim, dim)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class LayerWise(Instruction):
    """L-DIT (paper section 3.3, equation 8): every layer i has its own projection of the text, F_t^i = F_t W_i + b_i.

    Released with static tokens: no projections and no dropout, each layer adds its static tokens to the text itself.
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        own = not (options.released and options.static)
        self.projections = nn.ModuleList(projection(text_dim, embed_dim, options.zero) for _ in range(depth) if own)
        self.shared = None if own else to_width(text_dim, embed_dim, options.zero)

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        if self.shared is not None:
            return self.shared(text)
        return self.dropout(self.projections[layer](text))


class EndToEnd(Instruction):
    """E-DIT (section 3.2, equations 4-7): projected once, F_t^0 = F_t W_0 + b_0, the text tokens go
    through the layers with the visual ones.

    With `Options.adapt` a linear layer, the identity at first, is applied to the text tokens between two layers: the
    paper adds it where the image encoder is frozen, its released code always, but not beside static tokens. Released
    they have zero weights at first, and dropout behind each.
    """

    carries = "layer"

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projection = projection(text_dim, embed_dim, options.zero)
        self.released = options.released
        self.adapters = nn.ModuleList(
            projection(embed_dim, embed_dim, zero=True) if self.released else identity(embed_dim)
            for _ in range(depth - 1)
            if options.adapt
        )

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        if layer == 0:
            return self.dropout(self.projection(text))
        if not self.adapters:
            return text
        adapted = self.adapters[layer - 1](text)
        return self.dropout(adapted) if self.released else adapted


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


_HEADS, _WIDTH = 8, 512  # of cross-attention, in the released code


def _attend(query: Tensor, key_value: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Multi-head attention of projected text (B, T, width) over projected keys and values (B, K, 2*width), of which
    `key_mask` (B, K) may leave out some: (B, T, width)."""
    q = rearrange(query, "b t (heads d) -> b heads t d", heads=_HEADS)
    k, v = rearrange(key_value, "b n (two heads d) -> two b heads n d", two=2, heads=_HEADS)
    mask = None if key_mask is None else key_mask[:, None, None]  # (B, 1, 1, K)
    return rearrange(F.scaled_dot_product_attention(q, k, v, mask, dropout), "b heads t d -> b t (heads d)")


class _TextAttention(nn.Module):
    """One layer of `CrossAttention`: LN(F_t W + MHA(F_t, image))."""

    def __init__(self, text_dim: int, embed_dim: int, options: Options):
        super().__init__()
        self.project = projection(text_dim, embed_dim, options.zero)
        self.query = nn.Linear(text_dim, _WIDTH)
        self.key_value = nn.Linear(embed_dim, 2 * _WIDTH)
        self.out = projection(_WIDTH, embed_dim, options.zero)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, T, text_dim) and (B, H, W, embed_dim) to (B, T, embed_dim)."""
        attended = _attend(self.query(text), self.key_value(rearrange(image, "b h w d -> b (h w) d")))
        return self.norm(self.project(text) + self.dropout(self.out(attended)))


class CrossAttention(Instruction):
    """Table 4, CrossAtt: the text tokens of a layer depend on the image, by cross-attention.

    The paper does not say what the text attends to; here it is the layer's own visual tokens, in its released code the
    text tokens that left the former layer: `ReleasedCrossAttention`. Width and heads are that code's.
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.attend = nn.ModuleList(_TextAttention(text_dim, embed_dim, options) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.attend[layer](text, image)


class _FeedForward(nn.Module):
    """LN(x + FFN(x)), as wide as in the released code. Released: with dropout inside, and nothing that starts at zero."""

    def __init__(self, dim: int, options: Options):
        super().__init__()
        released = options.released
        inside = [nn.Dropout(options.dropout)] if released else []
        last = projection(2048, dim, options.zero and not released)
        self.layers = nn.Sequential(nn.Linear(dim, 2048), nn.ReLU(), *inside, last)
        self.norm = UnbiasedLayerNorm(dim) if released else nn.LayerNorm(dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(.., dim) to the same."""
        return self.norm(x + self.dropout(self.layers(x)))


class CrossAttentionFFN(CrossAttention):
    """Table 4, CrossAtt + FFN; the same with a feed-forward network behind it. Released: `ReleasedCrossAttentionFFN`."""

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.feed_forward = nn.ModuleList(_FeedForward(embed_dim, options) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        return self.feed_forward[layer](super().forward(text, layer, image))


class UnbiasedLayerNorm(nn.LayerNorm):
    """The released code's own LayerNorm: over the unbiased standard deviation, to which epsilon is added."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, -1, keepdim=True)
        return self.weight * ((x - mean) / (std + self.eps)) + self.bias


class _ReleasedAttention(nn.Module):
    """LN(x + drop(MHA(text, keys))), with dropout of the attention weights, too."""

    def __init__(self, text_dim: int, embed_dim: int, options: Options):
        super().__init__()
        self.query = nn.Linear(text_dim, _WIDTH)
        self.key_value = nn.Linear(embed_dim, 2 * _WIDTH)
        self.out = nn.Linear(_WIDTH, embed_dim)
        for matrix in (self.query.weight, *self.key_value.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(matrix)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)
        self.norm = UnbiasedLayerNorm(embed_dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, text: Tensor, keys: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, T, embed_dim), (B, T, text_dim), (B, K, embed_dim) and (B, K) to (B, T, embed_dim)."""
        dropout = self.dropout.p if self.training else 0.0
        attended = _attend(self.query(text), self.key_value(keys), key_mask, dropout)
        return self.norm(x + self.dropout(self.out(attended)))


class ReleasedCrossAttention(Instruction):
    """CrossAtt as released: the text attends to the text tokens that left the former layer, F_m.

    F_t W_0 + b_0 at layer 0, then LN(F_t W_i + b_i + drop(MHA(F_t, F_m))).
    """

    reads_former_layer = True

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.projections = nn.ModuleList(projection(text_dim, embed_dim, options.zero) for _ in range(depth))
        self.attend = nn.ModuleList(_ReleasedAttention(text_dim, embed_dim, options) for _ in range(depth - 1))

    def forward(
        self, text: Tensor, layer: int, image: Tensor, former: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        projected = self.projections[layer](text)
        if layer == 0:
            return projected
        if text_mask is not None:  # softmax over no key at all would be NaN; a sample without words reads none of it
            text_mask = text_mask | ~text_mask.any(1, keepdim=True)
        return self.attend[layer - 1](projected, text, former, text_mask)


class ReleasedCrossAttentionFFN(Instruction):
    """CrossAtt + FFN as released: the text attends to the layer's visual tokens, and no layer has a projection.

    q1 = LN(F_t + drop(MHA(F_t, image))), q2 = LN(q1 + drop(FFN(q1))), and the tokens are LN(F_t + drop(q2)).
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, options: Options):
        super().__init__(text_dim, embed_dim, depth, options)
        self.shared = to_width(text_dim, embed_dim, options.zero)
        self.attend = nn.ModuleList(_ReleasedAttention(embed_dim, embed_dim, options) for _ in range(depth))
        self.feed_forward = nn.ModuleList(_FeedForward(embed_dim, options) for _ in range(depth))
        self.norms = nn.ModuleList(UnbiasedLayerNorm(embed_dim) for _ in range(depth))

    def forward(self, text: Tensor, layer: int, image: Tensor) -> Tensor:
        text = self.shared(text)
        attended = self.attend[layer](text, text, rearrange(image, "b h w d -> b (h w) d"))
        return self.norms[layer](text + self.dropout(self.feed_forward[layer](attended)))


class StaticTokens(nn.Module):
    """Prompt tuning beside the text (Table 2): learnable tokens of each layer, the same for all samples.

    Args:
        count: tokens a layer.
        additive: added to the layer's text tokens, of which there are as many (the released code), not concatenated.
        first: the first layer that has some.
        std: of their initial values; None: 0 where they are added, so that they change nothing at first, else 0.02.
    """

    def __init__(
        self, count: int, embed_dim: int, depth: int, additive: bool, first: int = 0, std: float | None = None
    ):
        super().__init__()
        self.additive, self.first = additive, first
        if std is None:
            std = 0.0 if additive else 0.02
        self.tokens = nn.Parameter(torch.randn(depth - first, count, embed_dim) * std)

    def forward(self, text: Tensor, text_mask: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
        """Text tokens (B, T, D) and mask (B, T) to those of [text; static], (B, T+k, D) and (B, T+k)."""
        if layer < self.first:
            return text, text_mask
        static = self.tokens[layer - self.first].expand(text.shape[0], -1, -1)
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


# Those whose released form is another class
_RELEASED: dict[str, type[Instruction]] = {
    "cross_attention": ReleasedCrossAttention,
    "cross_attention_ffn": ReleasedCrossAttentionFFN,
}


def make_instruction(
    scheme: str, text_dim: int, embed_dim: int, depth: int, options: Options | None = None
) -> Instruction | None:
    """The scheme's module; None for `default`, where text meets the image in the mask decoder only."""
    options = options or Options()
    scheme_class = SCHEMES[scheme]
    if options.released:
        scheme_class = _RELEASED.get(scheme, scheme_class)
    return scheme_class(text_dim, embed_dim, depth, options) if scheme_class else None


def make_static_tokens(
    scheme: str, count: int, embed_dim: int, depth: int, additive: bool, released: bool
) -> StaticTokens:
    """The static tokens beside a scheme's text. Released, E-DIT's begin at the second layer."""
    if not released:
        return StaticTokens(count, embed_dim, depth, additive)
    if scheme == "end_to_end":
        return StaticTokens(count, embed_dim, depth, additive, first=1, std=0.01)
    return StaticTokens(count, embed_dim, depth, additive, std=1.0)
