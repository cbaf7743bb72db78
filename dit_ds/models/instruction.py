"""How words enter a layer of the image encoder: the schemes of deep instruction tuning."""

from __future__ import annotations

from torch import Tensor, nn

SCHEMES = ("default", "end_to_end", "layer_wise")


class LayerWise(nn.Module):
    """L-DIT (paper section 3.3, equation 8): every layer i gets its own projection of the words, F_t^i = F_t W_i + b_i.

    Args:
        text_dim: width of the text encoder's output.
        embed_dim: width of the image encoder.
        depth: layers of the image encoder.
        dropout: of the projected words; 0.1 in the paper's released code, not in its text.
    """

    flows = False  # what a layer gets is made of the text encoder's words

    def __init__(self, text_dim: int, embed_dim: int, depth: int, dropout: float = 0.0):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(text_dim, embed_dim) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, layer: int) -> Tensor:
        """(B, T, text_dim) to the tokens that layer reads, (B, T, embed_dim)."""
        return self.dropout(self.projections[layer](words))


class EndToEnd(nn.Module):
    """E-DIT (paper section 3.2, equations 4-7): projected once, F_t^0 = F_t W_0 + b_0, the words flow on with the image.

    Args:
        text_dim, embed_dim, depth, dropout: as in `LayerWise`.
        adapt: a further linear layer on the words between two layers, the identity at first: what the paper adds
            where the image encoder is frozen.
    """

    flows = True  # what a layer gets is made of the words that came out of the one before

    def __init__(self, text_dim: int, embed_dim: int, depth: int, dropout: float = 0.0, adapt: bool = False):
        super().__init__()
        self.projection = nn.Linear(text_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.adapters = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in range(depth - 1) if adapt)
        for linear in self.adapters:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, words: Tensor, layer: int) -> Tensor:
        """(B, T, text_dim) to layer 0's tokens, later (B, T, embed_dim) to those that a layer reads."""
        if layer == 0:
            return self.dropout(self.projection(words))
        return self.adapters[layer - 1](words) if self.adapters else words


def make_instruction(
    scheme: str, text_dim: int, embed_dim: int, depth: int, dropout: float, frozen: bool
) -> nn.Module | None:
    """The scheme's module; None for `default`, whose words meet the image in the mask decoder only."""
    if scheme == "end_to_end":
        return EndToEnd(text_dim, embed_dim, depth, dropout, adapt=frozen)
    return LayerWise(text_dim, embed_dim, depth, dropout) if scheme == "layer_wise" else None
