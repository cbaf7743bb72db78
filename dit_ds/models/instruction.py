"""How words enter a layer of the image encoder: the schemes of deep instruction tuning."""

from __future__ import annotations

from torch import Tensor, nn

SCHEMES = ("default", "layer_wise")


class LayerWise(nn.Module):
    """L-DIT (paper section 3.3, equation 8): every layer i gets its own projection of the words, F_t^i = F_t W_i + b_i.

    Args:
        text_dim: width of the text encoder's output.
        embed_dim: width of the image encoder.
        depth: layers of the image encoder.
        dropout: of the projected words; 0.1 in the paper's released code, not in its text.
    """

    def __init__(self, text_dim: int, embed_dim: int, depth: int, dropout: float = 0.0):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(text_dim, embed_dim) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, layer: int) -> Tensor:
        """(B, T, text_dim) to the tokens that layer reads, (B, T, embed_dim)."""
        return self.dropout(self.projections[layer](words))


def make_instruction(scheme: str, text_dim: int, embed_dim: int, depth: int, dropout: float) -> nn.Module | None:
    """The scheme's module; None for `default`, whose words meet the image in the mask decoder only."""
    return LayerWise(text_dim, embed_dim, depth, dropout) if scheme == "layer_wise" else None
