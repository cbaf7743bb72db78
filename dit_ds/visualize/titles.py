"""A run's name in a figure."""

from __future__ import annotations

from dit_ds.config.schema import RunConfig

_TITLES = {
    "default": "default SAM",
    "end_to_end": "E-DIT",
    "layer_wise": "L-DIT",
    "cascade": "Cascade DIT",
    "cross_attention": "CrossAtt",
    "cross_attention_ffn": "CrossAtt + FFN",
}
_METHODS = {"lavt": "LAVT", "rela": "ReLA"}


def title_of(config: RunConfig) -> str:
    """A run's name in a figure: its scheme, as the paper's tables call it, and which encoders are frozen."""
    m = config.model
    name = _METHODS.get(m.name) or _TITLES.get(m.scheme, m.scheme)
    name += f" + {m.static_tokens} static" if m.static_tokens else ""
    name += " + LoRA" if m.lora is not None else ""
    frozen = [what for what, is_so in (("image", m.freeze_image_encoder), ("text", config.text.freeze)) if is_so]
    return f"{name} ({' and '.join(frozen)} frozen)" if frozen else name
