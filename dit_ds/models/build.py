"""A model from a run's configuration."""

from __future__ import annotations

import torch

from dit_ds.config.schema import RunConfig
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.lavt import LAVT
from dit_ds.models.lora import add_lora
from dit_ds.models.rela import ReLA
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.text_encoder import TextEncoder, text_config


def build_model(config: RunConfig, text_weights: bool = True) -> Segmenter:
    """The configuration's model on the CPU, `model.checkpoint` not yet loaded.

    Args:
        text_weights: False skips reading pretrained text weights that a checkpoint is about to replace.
    """
    m, t, lora = config.model, config.text, config.model.lora
    torch.manual_seed(config.seed)
    text_config(t.name, t.layers, config.data.tokens)
    frozen = t.freeze and not (lora is not None and lora.of_text)
    text = TextEncoder(
        t.name, t.layers, t.random_init or not text_weights, frozen=frozen, cache=t.cache, zero_padding=m.mask_padding
    )
    if m.name != "dit_sam":
        windows = "eager" if m.attention == "eager" else "sdpa"
        return {"lavt": LAVT, "rela": ReLA}[m.name](text, m.size, config.data.image_size, windows)
    model = DITSAM(
        text,
        m.size,
        config.data.image_size,
        m.scheme,
        zero_words=m.word_init == "zero" or (m.word_init == "auto" and m.checkpoint is not None),
        released=m.scheme_form == "released",
        adapters=m.adapters == "always" or (m.adapters == "frozen" and m.image_encoder_frozen),
        static_tokens=m.static_tokens,
        add_static=m.static_form == "add",
        decoder_layers=m.decoder_layers,
        freeze_image_encoder=m.image_encoder_frozen,
        freeze_projections=m.freeze_projections,
        freeze_mask_decoder=m.freeze_mask_decoder,
        mask_padding=m.mask_padding,
        attention=m.attention,
        window_size=m.window_size,
        word_dropout=m.word_dropout,
        dice_weight=config.train.dice_weight,
        align_corners=m.align_corners,
        prompts=config.data.prompts,
    )
    if lora is not None:
        add_lora(model, lora)
    return model
