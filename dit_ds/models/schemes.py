"""The schemes by which words enter the image encoder, by name. Imports nothing heavy: the configuration reads it."""

from __future__ import annotations

import importlib

# Where each one's class is, see `instruction.Instruction`. A new scheme is its class and a line here.
SCHEMES = {
    "default": "",  # words meet the image in the mask decoder only
    "end_to_end": "dit_ds.models.instruction:EndToEnd",
    "layer_wise": "dit_ds.models.instruction:LayerWise",
    "cascade": "dit_ds.models.instruction:Cascade",
    "cross_attention": "dit_ds.models.instruction:CrossAttention",
    "cross_attention_ffn": "dit_ds.models.instruction:CrossAttentionFFN",
}


def scheme_class(name: str) -> type | None:
    """The scheme's class; None for `default`."""
    module, _, attribute = SCHEMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute) if module else None
