"""DIT-SAM: text encoder, image encoder that reads text, prompt encoder and mask decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_ds.models import authors
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.instruction import Options, make_instruction, make_static_tokens
from dit_ds.models.losses import segmentation_loss
from dit_ds.models.sam import SIZES, BatchedMaskDecoder, TextPromptEncoder
from dit_ds.models.sam_checkpoint import load_sam_checkpoint
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.text_encoder import TextEncoder


class DITSAM(Segmenter):
    """SAM that reads text in every layer (paper equation 3): M = F_d(F_v(I, phi(F_t(T))), F_t(T) W_o).

    Args:
        text_encoder: F_t.
        size: a key of `sam.SIZES`.
        image_size: side of the square input.
        scheme: how text enters the image encoder, a key of `instruction.SCHEMES`.
        zero_words: the projections of the text start with zero weights, see `instruction.Options`.
        released: the scheme as the paper's released code has it, where that is another, see `instruction`.
        adapters: `end_to_end` has linear layers between those of the ViT.
        static_tokens: learnable tokens beside the text in each layer (paper Table 2).
        add_static: they are added to the text tokens instead.
        decoder_layers: depth of the mask decoder's transformer; SAM's is 2.
        freeze_image_encoder: SAM's ViT does not train; the projections of the text into it do.
        freeze_projections: they do not train either, as in the paper's released code.
        freeze_mask_decoder: train neither the mask decoder nor the prompts' embeddings.
        mask_padding: padding is not attended to in the image encoder, and is SAM's `not_a_point` in the mask decoder.
        attention: one of `attention.BACKENDS`, or naive for `naive.naive_block`.
        window_size: of the ViT's attention; 0 attends globally in every layer, 14 as SAM in all but four.
        word_dropout: of the text tokens that enter the image encoder.
        dice_weight: of a Dice loss beside BCE.
        align_corners: of the logits' upsampling in the loss.
        prompts: the kinds of prompts to train for: text, point, box.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        size: str = "vit_b",
        image_size: int = 512,
        scheme: str = "layer_wise",
        *,
        released: bool = False,
        zero_words: bool = False,
        adapters: bool = False,
        static_tokens: int = 0,
        add_static: bool = False,
        decoder_layers: int = 2,
        freeze_image_encoder: bool = False,
        freeze_projections: bool = False,
        freeze_mask_decoder: bool = False,
        mask_padding: bool = True,
        attention: str = "auto",
        window_size: int = 0,
        word_dropout: float = 0.0,
        dice_weight: float = 0.0,
        align_corners: bool = False,
        prompts: Sequence[str] = ("text",),
    ):
        super().__init__()
        s = SIZES[size]
        self.image_size, self.mask_padding, self.scheme = image_size, mask_padding, scheme
        self.dice_weight, self.align_corners = dice_weight, align_corners
        self.text_encoder = text_encoder
        self.image_encoder = ImageEncoder(
            image_size,
            s.patch_size,
            s.embed_dim,
            depth=s.depth,
            num_heads=s.num_heads,
            out_chans=s.prompt_dim,
            backend=attention,
            window_size=window_size,
            global_layers=s.global_layers,
            pretrained=s.pretrained,
        )
        options = Options(zero_words, adapters, word_dropout, released, static=static_tokens > 0)
        self.image_encoder.instruction = make_instruction(scheme, text_encoder.dim, s.embed_dim, s.depth, options)
        if static_tokens:
            self.image_encoder.static_tokens = make_static_tokens(
                scheme, static_tokens, s.embed_dim, s.depth, additive=add_static, released=released
            )
        self.prompt_encoder = TextPromptEncoder(s, image_size)
        self.mask_decoder = BatchedMaskDecoder(s, decoder_layers)
        self.text_projection = nn.Linear(text_encoder.dim, s.prompt_dim)  # W_o of equation 7
        self._initialize()
        self._freeze(freeze_image_encoder, freeze_projections, freeze_mask_decoder)
        self._train_prompts(prompts)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Scales for training from random weights; SAM's checkpoint replaces all but the projection's.

        With PyTorch's initialisation the projected text is several times smaller than SAM's prompt embeddings, and the
        product that makes a mask so small that the text changes it only after hundreds of steps.
        """
        nn.init.normal_(self.text_projection.weight, std=3 * self.text_projection.in_features**-0.5)
        nn.init.zeros_(self.text_projection.bias)
        nn.init.normal_(self.prompt_encoder.not_a_point_embed.weight, std=0.02)
        self.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(6)
        self.image_encoder.patch_embed.proj.weight.mul_(0.4)

    def _freeze(self, image_encoder: bool, projections: bool, mask_decoder: bool) -> None:
        """What stays trainable gets a gradient in every step, as ZeRO-3 needs."""
        self.prompt_encoder.requires_grad_(False)
        if not mask_decoder:
            self.prompt_encoder.no_mask_embed.requires_grad_(True)
            self.prompt_encoder.not_a_point_embed.requires_grad_(self.mask_padding)
        self.mask_decoder.requires_grad_(not mask_decoder)
        for p in self.mask_decoder.unused_parameters():
            p.requires_grad_(False)
        if image_encoder:
            self.image_encoder.requires_grad_(False)
            for module in (self.image_encoder.instruction, self.image_encoder.static_tokens):
                if module is not None:
                    module.requires_grad_(not projections)

    def _train_prompts(self, kinds: Sequence[str]) -> None:
        """Train the embeddings of the kinds of prompts that are used, and nothing that only text needs without text."""
        self.prompt_encoder.train_points(kinds)
        if "text" not in kinds:
            modules = (self.image_encoder.instruction, self.image_encoder.static_tokens)
            for part in (self.text_encoder, self.text_projection, *modules):
                if part is not None:
                    part.requires_grad_(False)

    def forward(
        self,
        image: Tensor,
        size: Tensor,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """As `Segmenter.forward`: (B, 4S/patch, 4S/patch) fp32 logits over the padded square, in training, too.

        Args:
            tokens, token_mask: None where no sample has text; a sample whose mask is all False has none.
            points, labels: (B, P, 2) and (B, P), see `TextPromptEncoder.embed_points`; None where no sample has any.
                They meet the image in the mask decoder only (paper Table 6, footnote 2).
        """
        text = projected = real = attended = None
        if tokens is not None:
            assert token_mask is not None
            text, real, attended = self._read(tokens, token_mask, some_without_text=points is not None)
        x = self.image_encoder(self.preprocess(image, size), text, attended)
        if text is not None:
            projected = self.text_projection(text)  # (B, T, C)
        sparse, dense, positions = self.prompt_encoder(projected, real, points, labels)
        return self.mask_decoder(x, positions, sparse, dense).float()

    def _read(
        self, tokens: Tensor, token_mask: Tensor, some_without_text: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text features (B, T, text_dim); which are no padding (B, T); and those for the ViT, None for all."""
        if not some_without_text:
            text = self.text_encoder(tokens, token_mask)
            return (text, token_mask, token_mask) if self.mask_padding else (text, torch.ones_like(token_mask), None)
        real = token_mask if self.mask_padding else token_mask.any(1, keepdim=True).expand_as(token_mask)
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        text = self.text_encoder(tokens, token_mask | first)  # softmax over no key at all would be NaN
        return text * real[..., None], real, real

    def loss(self, output: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """See `segmentation_loss`."""
        return segmentation_loss(output, mask, weight, self.dice_weight, self.align_corners)

    def checkpoint_activations(self, policy: str) -> None:
        """See `ImageEncoder.checkpoint_activations`."""
        self.image_encoder.checkpoint_activations(policy)

    def compile_blocks(self) -> None:
        """See `ImageEncoder.compile_blocks`."""
        self.image_encoder.compile_blocks()

    def load_pretrained(self, path: str | Path) -> dict[str, list[str]]:
        """See `load_sam_checkpoint`; a checkpoint of DIT's released code, of this network, is loaded whole."""
        return authors.load(self, path, self.scheme) or load_sam_checkpoint(self, path)
