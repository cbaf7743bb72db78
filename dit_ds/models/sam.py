"""SAM's parts: sizes, the batched prompt encoder and mask decoder, and position tables of other lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from dit_ds.models.positions import absolute_positions, is_other_length, relative_positions


@dataclass(frozen=True)
class Size:
    """Widths and depths. `vit_b`, `vit_l`, `vit_h` are SAM's; `vit_t` is for CPUs and trained from scratch.

    Attributes:
        pretrained: image size in pixels and window size in tokens that the position tables are made for; None: those of
            the run.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    pretrained: tuple[int, int] | None = None

    @property
    def global_layers(self) -> tuple[int, ...]:
        """The layers that attend globally where SAM has windows in the others: the last of each quarter."""
        quarter = max(1, self.depth // 4)
        return tuple(range(quarter - 1, self.depth, quarter))


SIZES = {
    "vit_t": Size(embed_dim=128, depth=4, num_heads=4, prompt_dim=64, decoder_mlp_dim=256),
    "vit_b": Size(embed_dim=768, depth=12, num_heads=12, pretrained=(1024, 14)),
    "vit_l": Size(embed_dim=1024, depth=24, num_heads=16, pretrained=(1024, 14)),
    "vit_h": Size(embed_dim=1280, depth=32, num_heads=16, pretrained=(1024, 14)),
}


class DensePositions(PositionEmbeddingRandom):
    """Keeps its frequencies in fp32 when the model goes to bf16: rounding them would move every pixel's phase."""

    positional_encoding_gaussian_matrix: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        self.positional_encoding_gaussian_matrix = exact.to(self.positional_encoding_gaussian_matrix.device)
        return self


class TextPromptEncoder(PromptEncoder):
    """SAM's `PromptEncoder` whose sparse prompts are also text tokens, padded as SAM pads its points."""

    def __init__(self, size: Size, image_size: int):
        grid = (image_size // size.patch_size, image_size // size.patch_size)
        super().__init__(size.prompt_dim, grid, (image_size, image_size), mask_in_chans=16)
        self.pe_layer = DensePositions(size.prompt_dim // 2)

    def forward(
        self,
        text: Tensor | None,
        text_mask: Tensor | None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text, points and boxes to the prompts of the mask decoder (paper equation 7).

        Args:
            text: (B, T, C) projected text features; None for none.
            text_mask: (B, T) bool; padding becomes SAM's `not_a_point_embed`.
            points, labels: see `embed_points`; None for none.
        Returns:
            sparse (B, T+P, C), text first, dense (1, C, 1, 1) for "no mask given", positions (1, C, h, w). Without any
            prompt sparse is (1, 0, C).
        """
        dense = self.no_mask_embed.weight.view(1, -1, 1, 1)
        dtype = dense.dtype if text is None else text.dtype
        sparse = []
        if text is not None:
            assert text_mask is not None
            sparse.append(torch.where(text_mask[..., None], text, self.not_a_point_embed.weight))
        if points is not None:
            assert labels is not None
            sparse.append(self.embed_points(points, labels).to(dtype))
        prompts = torch.cat(sparse, dim=1) if sparse else dense.new_zeros(1, 0, self.embed_dim)  # (B, T+P, C)
        with torch.autocast(dense.device.type, enabled=False):
            positions = self.get_dense_pe()
        return prompts, dense, positions.to(dtype)

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """What SAM's `_embed_points` and `_embed_boxes` compute, for points and corners in one tensor, as SAM's ONNX
        export has them.

        Args:
            points: (B, P, 2) x and y in pixels of the square input, whose pixels' centres are whole numbers.
            labels: (B, P) int: 1 on the object, 0 not on it, 2 and 3 a box's upper left and lower right corner, -1 no
                point at all, wherever it is.
        Returns:
            (B, P, C)
        """
        with torch.autocast(points.device.type, enabled=False):  # bf16 would move the coordinates
            positions = self.pe_layer.forward_with_coords(points.float() + 0.5, self.input_image_size)  # (B, P, C)
        # all labels at once, so that each embedding has a gradient in every step
        kinds = torch.cat([e.weight for e in (self.not_a_point_embed, *self.point_embeddings)])  # (1+4, C)
        return positions.to(kinds.dtype) * (labels >= 0)[..., None] + kinds[labels + 1]

    def train_points(self, kinds: Sequence[str]) -> None:
        """Train the embeddings of the prompts in `kinds` (text, point, box), where embeddings train at all."""
        if self.no_mask_embed.weight.requires_grad:
            if len(kinds) > kinds.count("text"):
                self.not_a_point_embed.requires_grad_(True)  # the padding of points
            for i, e in enumerate(self.point_embeddings):
                e.requires_grad_(("point" in kinds and i == 1) or ("box" in kinds and i in (2, 3)))


class DecoderAttention(Attention):
    """The mask decoder's `Attention`, on a GPU by PyTorch's fused kernels, which keep no attention map for backward."""

    @classmethod
    def of(cls, attention: Attention) -> DecoderAttention:
        """With the layers of a plain one."""
        with torch.device("meta"):
            new = cls(attention.embedding_dim, attention.num_heads, attention.embedding_dim // attention.internal_dim)
        for name, layer in attention.named_children():
            setattr(new, name, layer)
        return new

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Q, C), (B, K, C) and (B, K, C) to (B, Q, C)."""
        if q.device.type != "cuda":  # SAM's own bits
            return super().forward(q, k, v)
        return self.fused(q, k, v)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `forward`, by `scaled_dot_product_attention`."""
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, Q, d)
        return self.out_proj(rearrange(out, "b heads n d -> b n (heads d)"))


class BatchedMaskDecoder(MaskDecoder):
    """SAM's `MaskDecoder` with one set of prompts for each of B images; only the first mask token is decoded."""

    def __init__(self, size: Size, layers: int):
        transformer = TwoWayTransformer(layers, size.prompt_dim, num_heads=8, mlp_dim=size.decoder_mlp_dim)
        for module in list(transformer.modules()):
            for name, child in module.named_children():
                if type(child) is Attention:
                    setattr(module, name, DecoderAttention.of(child))
        super().__init__(transformer_dim=size.prompt_dim, transformer=transformer)

    def forward(self, image: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """Decode masks.

        Args:
            image: (B, C, h, w) from the image encoder.
            positions: (1, C, h, w).
            sparse: (B, T, C), or (1, T, C) for all.
            dense: broadcastable to `image`.
        Returns:
            (B, 4h, 4w) logits.
        """
        b, _, h, _ = image.shape
        queries = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1+4, C)
        tokens = torch.cat([queries.expand(b, -1, -1), sparse.expand(b, -1, -1)], dim=1)  # (B, 5+T, C)
        out, src = self.transformer(image + dense, positions.expand(b, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(rearrange(src, "b (h w) c -> b c h w", h=h))  # (B, C/8, 4h, 4w)
        weights = self.output_hypernetworks_mlps[0](out[:, 1])  # (B, C/8): mask token 0
        return torch.einsum("bc,bchw->bhw", weights, upscaled)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of SAM's heads for the IoU and the other masks, which are not computed."""
        heads = [self.iou_prediction_head, *self.output_hypernetworks_mlps[1:]]
        return [p for head in heads for p in head.parameters()]


def resize_positions(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a state dict's position tables the lengths of another's, interpolated as in the forward pass.

    For code that keeps them at its image's size. This package's models take tables of any length as they are.
    """
    fitted = dict(state)
    for name, value in state.items():
        want = target.get(name)
        if want is None or not is_other_length(name, value, want):
            continue
        if want.ndim == 4:
            fitted[name] = absolute_positions(value, (want.shape[1], want.shape[2]))
        else:
            fitted[name] = relative_positions(value, want.shape[0])
    return fitted
