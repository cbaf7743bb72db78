"""DIT-SAM, the whole: text encoder, image encoder that reads words, prompt encoder, mask decoder, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.instruction import Options, StaticTokens, make_instruction
from dit_ds.models.losses import segmentation_loss
from dit_ds.models.sam import SIZES, BatchedMaskDecoder, WordPromptEncoder, load_sam_checkpoint
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.text_encoder import TextEncoder


class DITSAM(Segmenter):
    """SAM that reads words in every layer (paper equation 3): M = F_d(F_v(I, phi(F_t(T))), F_t(T) W_o).

    Args:
        text_encoder: F_t.
        size: a key of `sam.SIZES`.
        image_size: side of the square input.
        scheme: how words enter the image encoder, a key of `instruction.SCHEMES`.
        zero_words: they enter as blank tokens at first, see `instruction.Options`.
        adapters: `end_to_end` has linear layers between the ViT's.
        static_tokens: learnable tokens beside the words in each layer (paper Table 2).
        add_static: onto the words instead.
        decoder_layers: depth of the mask decoder's transformer; SAM's is 2.
        freeze_image_encoder: train nothing of SAM's ViT; the words' way into it still trains.
        freeze_projections: that neither, as in the paper's released code.
        freeze_mask_decoder: train neither the mask decoder nor the prompts' embeddings.
        mask_padding: padding is no word: not attended to in the image encoder, `not_a_point` in the mask decoder.
        attention: one of `attention.BACKENDS`, or naive for `naive.naive_block`.
        window_size: of the ViT's attention; 0 attends globally in every layer, 14 as SAM in all but four.
        word_dropout: of the words that enter the image encoder.
        dice_weight: of a Dice loss beside BCE.
        align_corners: of the logits' upsampling in the loss.
        prompts: the kinds to train for: text, point, box.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        size: str = "vit_b",
        image_size: int = 512,
        scheme: str = "layer_wise",
        *,
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
        self.image_size, self.mask_padding = image_size, mask_padding
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
        )
        options = Options(zero_words, adapters, word_dropout)
        self.image_encoder.instruction = make_instruction(scheme, text_encoder.dim, s.embed_dim, s.depth, options)
        if static_tokens:
            self.image_encoder.static_tokens = StaticTokens(static_tokens, s.embed_dim, s.depth, add_static)
        self.prompt_encoder = WordPromptEncoder(s, image_size)
        self.mask_decoder = BatchedMaskDecoder(s, decoder_layers)
        self.text_projection = nn.Linear(text_encoder.dim, s.prompt_dim)  # W_o of equation 7
        self._initialize()
        self._freeze(freeze_image_encoder, freeze_projections, freeze_mask_decoder)
        self._train_prompts(prompts)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Scales that let training from random weights begin; SAM's checkpoint replaces all but the projection's.

        By default words come out of the projection several times smaller than SAM's prompt embeddings, padding drowns
        them, and the product that makes a mask is so small that hundreds of steps go by before words can move it.
        """
        nn.init.normal_(self.text_projection.weight, std=3 * self.text_projection.in_features**-0.5)
        nn.init.zeros_(self.text_projection.bias)
        nn.init.normal_(self.prompt_encoder.not_a_point_embed.weight, std=0.02)
        self.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(6)
        self.image_encoder.patch_embed.proj.weight.mul_(0.4)

    def _freeze(self, image_encoder: bool, projections: bool, mask_decoder: bool) -> None:
        """Every trainable parameter gets a gradient in every step: ZeRO-3 counts on it."""
        self.prompt_encoder.requires_grad_(False)
        if not mask_decoder:
            self.prompt_encoder.no_mask_embed.requires_grad_(True)
            self.prompt_encoder.not_a_point_embed.requires_grad_(self.mask_padding)
        self.mask_decoder.requires_grad_(not mask_decoder)
        for p in self.mask_decoder.unused_parameters():
            p.requires_grad_(False)
        if image_encoder:
            self.image_encoder.requires_grad_(False)
            for words_way in (self.image_encoder.instruction, self.image_encoder.static_tokens):
                if words_way is not None:
                    words_way.requires_grad_(not projections)

    def _train_prompts(self, kinds: Sequence[str]) -> None:
        """Train what embeds points and boxes where there are any, and no word's way where there are none."""
        self.prompt_encoder.train_points(kinds)
        if "text" not in kinds:
            way = (self.image_encoder.instruction, self.image_encoder.static_tokens)
            for part in (self.text_encoder, self.text_projection, *way):
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
            tokens, token_mask: None where no sample has words; a sample whose mask is all False has none.
            points, labels: (B, P, 2) and (B, P), see `WordPromptEncoder.embed_points`; None where no sample has any.
                They meet the image in the mask decoder only (paper Table 6, footnote 2).
        """
        words = projected = real = attended = None
        if tokens is not None:
            words, real, attended = self._read(tokens, token_mask, some_have_none=points is not None)
        x = self.image_encoder(self.preprocess(image, size), words, attended)
        if words is not None:
            projected = self.text_projection(words)  # (B, T, C)
        sparse, dense, positions = self.prompt_encoder(projected, real, points, labels)
        return self.mask_decoder(x, positions, sparse, dense).float()

    def _read(self, tokens: Tensor, token_mask: Tensor, some_have_none: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of the words (B, T, text_dim), what of them are words (B, T), and the same for the ViT; None: all."""
        if not some_have_none:
            words = self.text_encoder(tokens, token_mask)
            return (words, token_mask, token_mask) if self.mask_padding else (words, torch.ones_like(token_mask), None)
        real = token_mask if self.mask_padding else token_mask.any(1, keepdim=True).expand_as(token_mask)
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        words = self.text_encoder(tokens, token_mask | first)  # attention over no words at all would be NaN
        return words * real[..., None], real, real

    def loss(self, output: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """See `segmentation_loss`."""
        return segmentation_loss(output, mask, weight, self.dice_weight, self.align_corners)

    def checkpoint_activations(self, policy: str) -> None:
        """See `image_encoder.CHECKPOINTING`."""
        self.image_encoder.checkpoint_activations(policy)

    def compile_blocks(self) -> None:
        """See `ImageEncoder.compile_blocks`."""
        self.image_encoder.compile_blocks()

    def load_pretrained(self, path: str | Path) -> dict[str, list[str]]:
        """See `load_sam_checkpoint`; `missing` is of SAM's own parts."""
        report = load_sam_checkpoint(self, path)
        added = ("text_encoder.", "text_projection.", "image_encoder.instruction.", "image_encoder.static_tokens.")
        return report | {"missing": [n for n in report["missing"] if not n.startswith(added)]}
