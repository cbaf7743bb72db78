"""The sizes of LAVT and ReLA."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Widths and depths; stage i is embed_dim * 2^i wide and has a token for every (4 * 2^i)^2 pixels.

    Attributes:
        lavt_dim: width of LAVT's decoder.
        rela_dim, rela_heads, rela_ffn, rela_pixel_ffn, rela_pixel_layers, rela_layers: of ReLA's decoders.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    drop_path: float
    lavt_dim: int
    rela_dim: int
    rela_heads: int
    rela_ffn: int
    rela_pixel_ffn: int
    rela_pixel_layers: int
    rela_layers: int

    @property
    def dims(self) -> list[int]:
        """Widths of the four stages."""
        return [self.embed_dim * 2**i for i in range(4)]


SIZES = {
    "swin_t_tiny": Size(
        32,
        (1, 1, 2, 1),
        (1, 2, 2, 4),
        window_size=2,
        drop_path=0.1,
        lavt_dim=32,
        rela_dim=32,
        rela_heads=4,
        rela_ffn=64,
        rela_pixel_ffn=64,
        rela_pixel_layers=1,
        rela_layers=3,
    ),  # for CPUs and tests
    "swin_b": Size(
        128,
        (2, 2, 18, 2),
        (4, 8, 16, 32),
        window_size=12,
        drop_path=0.3,
        lavt_dim=512,
        rela_dim=256,
        rela_heads=8,
        rela_ffn=2048,
        rela_pixel_ffn=1024,
        rela_pixel_layers=6,
        rela_layers=9,
    ),
}
