"""The names of tensors in the authors' code, and ours: rules by which `authors` translates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_ds.errors import UserError
from dit_ds.models import sam, swin_sizes

Rules = list[
    tuple[str, str]
]  # a pattern of a name, and ours; TARGET<PIECE for a part of one or several, !REASON for none

NAMES = {"dit": "DIT's released code", "lavt": "LAVT", "rela": "ReLA"}
_UNUSED = "made by the authors' code, which computes nothing with it"
_BERT_REST = "of BERT, and not read by the authors' code"
_BUFFER = "a constant that is computed anew"


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- DIT's released code ----------------------------------------------------------------------------------------------


def _size(width: int, depth: int, path: str | Path) -> str:
    found = [name for name, s in sam.SIZES.items() if (s.embed_dim, s.depth) == (width, depth)]
    if not found:
        raise UserError(f"{path} is {width} wide with {depth} layers, which none of SAM's sizes is: "
                        + ", ".join(f"{n} {s.embed_dim} and {s.depth}" for n, s in sam.SIZES.items()))  # fmt: skip
    return found[0]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers: one more than the largest number in names that begin so."""
    return max((int(m[1]) + 1 for n in weights if (m := re.match(pattern, n))), default=0)


def _dit(weights: dict[str, Tensor], path: str | Path, scheme: str | None) -> tuple[Rules, dict[str, Any]]:
    depth = _count(weights, r"visual_encoder\.blocks\.(\d+)\.")
    width = len(weights["visual_encoder.patch_embed.proj.weight"])
    model: dict[str, Any] = {"name": "dit_sam", "size": _size(width, depth, path), "scheme_form": "released"}
    model["decoder_layers"] = _count(weights, r"mask_decoder\.transformer\.layers\.(\d+)\.")
    named, rules = _dit_scheme(weights, path, scheme)
    if scheme and scheme != named:
        raise UserError(
            f"{path} is of the scheme {named}, not {scheme}: leave --scheme out, or set model.scheme {named}"
        )
    tokens = weights.get("visual_encoder.tokens")
    if tokens is not None:
        model |= {"static_tokens": tokens.shape[1], "static_form": "add"}
    if named == "end_to_end":
        model["adapters"] = "never" if tokens is not None else "always"
    if "visual_encoder.prob_text.weight" in weights:
        _merge_projections(weights, named, path)
    last = r"encoder\.layer\.0\."
    common = [
        (r"visual_encoder\.tokens", r"image_encoder.static_tokens.tokens"),
        *rules,
        (r"visual_encoder\.((?:pos_embed|patch_embed|blocks|neck).*)", r"image_encoder.\1"),
        (r"((?:prompt_encoder|mask_decoder)\..*)", r"\1"),
        (r"text_proj\.(.*)", r"text_projection.\1"),
        (r"lang_encoder\.bert\.embeddings\.position_ids", f"!{_BUFFER}"),
        (rf"lang_encoder\.bert\.(embeddings\..*|{last}.*)", r"text_encoder.bert.\1"),
        (r"lang_encoder\.bert\.(pooler|encoder\.layer\.\d+)\..*", f"!{_BERT_REST}"),
        (r"query_embeddings|self_attention\..*", f"!{_UNUSED}"),
    ]
    return common, model | {"scheme": named}


def _dit_scheme(weights: Mapping[str, Tensor], path: str | Path, scheme: str | None) -> tuple[str, Rules]:
    v = r"visual_encoder\."
    linear = [(rf"{v}prob_text\.(.*)", r"image_encoder.instruction.shared.\1")]
    if any(n.startswith("visual_encoder.cross.0.mhatt.") for n in weights):
        return "cross_attention_ffn", linear + [
            *_attention(rf"{v}cross\.(\d+)\.mhatt\."),
            (rf"{v}cross\.(\d+)\.norm1\.(.*)", r"image_encoder.instruction.attend.\1.norm.\2"),
            (rf"{v}cross\.(\d+)\.ffn\.mlp\.fc\.linear\.(.*)", r"image_encoder.instruction.feed_forward.\1.layers.0.\2"),
            (rf"{v}cross\.(\d+)\.ffn\.mlp\.linear\.(.*)", r"image_encoder.instruction.feed_forward.\1.layers.3.\2"),
            (rf"{v}cross\.(\d+)\.norm2\.(.*)", r"image_encoder.instruction.feed_forward.\1.norm.\2"),
            (rf"{v}ln\.(\d+)\.(.*)", r"image_encoder.instruction.norms.\1.\2"),
        ]
    every = [(rf"{v}probs\.(\d+)\.(.*)", r"image_encoder.instruction.projections.\1.\2")]
    if any(n.startswith("visual_encoder.cross.0.") for n in weights):
        return "cross_attention", [
            *every,
            *_attention(rf"{v}cross\.(\d+)\."),
            (rf"{v}ln\.(\d+)\.(.*)", r"image_encoder.instruction.attend.\1.norm.\2"),
        ]
    if "visual_encoder.probs.weight" in weights:
        return "end_to_end", [(rf"{v}probs\.(weight|bias)", r"image_encoder.instruction.projection.\1")]
    if "visual_encoder.tokens" in weights:
        return "layer_wise", linear
    count = _count(weights, r"visual_encoder\.probs\.(\d+)\.")
    if not count:
        return "default", []
    if scheme not in ("end_to_end", "layer_wise"):
        raise UserError(f"{path} may be E-DIT or L-DIT, whose tensors have the same names: say which with --scheme "
                        "end_to_end or --scheme layer_wise" + (f", not {scheme}" if scheme else ""))  # fmt: skip
    if scheme == "layer_wise":
        return scheme, every
    first = [(rf"{v}probs\.0\.(.*)", r"image_encoder.instruction.projection.\1")]
    later = [(rf"{v}probs\.{i}\.(.*)", rf"image_encoder.instruction.adapters.{i - 1}.\1") for i in range(1, count)]
    return scheme, first + later


def _attention(prefix: str) -> Rules:
    to = r"image_encoder.instruction.attend.\1"
    return [
        (rf"{prefix}linear_q\.(.*)", rf"{to}.query.\2"),
        (rf"{prefix}linear_([kv])\.(.*)", rf"{to}.key_value.\3<\2"),
        (rf"{prefix}linear_merge\.(.*)", rf"{to}.out.\2"),
    ]


def _merge_projections(weights: dict[str, Tensor], scheme: str, path: str | Path) -> None:
    """ViT-H's text goes through two linear layers with nothing between them: W_i (W_t y + b_t) + b_i. They become one."""
    if scheme in ("cross_attention", "default"):
        raise UserError(
            f"{path} has a projection of the text (prob_text) that the scheme {scheme} is not known to have"
        )
    if "visual_encoder.tokens" in weights and scheme == "layer_wise" or scheme == "cross_attention_ffn":
        return  # the only projection
    shared, offset = (weights.pop(f"visual_encoder.prob_text.{n}").double() for n in ("weight", "bias"))
    only_first = r"0\." if scheme == "end_to_end" else r"\d+\."
    for name in [n for n in weights if re.fullmatch(rf"visual_encoder\.probs\.({only_first})?weight", n)]:
        bias = name.removesuffix("weight") + "bias"
        if bias not in weights:
            raise UserError(f"{path} lacks {bias}")
        own = weights[name].double()
        weights[bias] = (own @ offset + weights[bias].double()).to(weights[bias].dtype)
        weights[name] = (own @ shared).to(weights[name].dtype)


# --- LAVT and ReLA ----------------------------------------------------------------------------------------------------


def _swin_size(weights: Mapping[str, Tensor], path: str | Path) -> str:
    width = len(weights["backbone.patch_embed.proj.weight"])
    depths = tuple(_count(weights, rf"backbone\.layers\.{i}\.blocks\.(\d+)\.") for i in range(4))
    found = [name for name, s in swin_sizes.SIZES.items() if (s.embed_dim, s.depths) == (width, depths)]
    if not found:
        known = ", ".join(f"{n} {s.embed_dim} and {s.depths}" for n, s in swin_sizes.SIZES.items())
        raise UserError(f"{path} has a Swin {width} wide with layers {depths}, which is none of {known}")
    return found[0]


_PWAM = {"vis_project.0": "vis.0", "image_lang_att.f_query.0": "q.0", "image_lang_att.f_key.0": "k",
         "image_lang_att.f_value.0": "v", "image_lang_att.W.0": "out.0", "project_mm.0": "mix.0"}  # fmt: skip


def _text_swin() -> Rules:
    b, to = r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", r"backbone.stages.\1.blocks.\2"
    split = ";".join(rf"{to}.attention.{x}_proj.\3" for x in "qkv")
    return [
        (r"backbone\.patch_embed\.proj\.(.*)", r"backbone.embeddings.patch_embeddings.projection.\1"),
        (r"backbone\.patch_embed\.norm\.(.*)", r"backbone.embeddings.norm.\1"),
        (rf"{b}attn\.qkv\.(.*)", f"{split}<thirds"),
        (rf"{b}attn\.proj\.(.*)", rf"{to}.attention.o_proj.\3"),
        (rf"{b}attn\.(relative_position_bias_table)", rf"{to}.attention.relative_position_bias.\3"),
        (rf"{b}attn\.relative_position_index", f"!{_BUFFER}"),
        (rf"{b}norm1\.(.*)", rf"{to}.layernorm_before.\3"),
        (rf"{b}norm2\.(.*)", rf"{to}.layernorm_after.\3"),
        (rf"{b}mlp\.(fc[12]\..*)", rf"{to}.mlp.0.\3"),
        (r"backbone\.layers\.(\d+)\.(downsample\..*)", r"backbone.stages.\1.\2"),
        (r"backbone\.layers\.(\d+)\.res_gate\.(.*)", r"backbone.gates.\1.\2"),
        (r"backbone\.norm(\d)\.(.*)", r"backbone.norms.\1.\2"),
        *(
            (rf"backbone\.layers\.(\d+)\.fusion\.{re.escape(theirs)}\.(weight|bias)", rf"backbone.pwams.\1.{ours}.\2")
            for theirs, ours in _PWAM.items()
        ),
        (r"text_encoder\.(?:bert\.)?embeddings\.position_ids", f"!{_BUFFER}"),
        (r"text_encoder\.(?:bert\.)?pooler\..*", f"!{_BERT_REST}"),
        (r"text_encoder\.(?:bert\.)?((?:embeddings|encoder)\..*)", r"text_encoder.bert.\1"),
    ]


def _lavt(weights: dict[str, Tensor], path: str | Path, scheme: str | None) -> tuple[Rules, dict[str, Any]]:
    if not any(n.startswith("text_encoder.") for n in weights):
        raise UserError(
            f"{path} has LAVT's network without its text encoder (bert_model, beside model): give the whole file"
        )
    rules = [
        *_text_swin(),
        (r"classifier\.conv1_1\.(.*)", r"decoder.classify.\1"),
        *(
            (rf"classifier\.{kind}{n}_{stage}\.(.*)", rf"decoder.steps.{4 - stage}.{3 * (n - 1) + at}.\1")
            for stage in (4, 3, 2)
            for n in (1, 2)
            for at, kind in enumerate(("conv", "bn"))
        ),
    ]
    return rules, {"name": "lavt", "size": _swin_size(weights, path)}


def _rela(weights: dict[str, Tensor], path: str | Path, scheme: str | None) -> tuple[Rules, dict[str, Any]]:
    if "sem_seg_head.predictor.lang_weight" in weights:
        name = "sem_seg_head.predictor.lang_weight"
        weights[name] = weights[name].reshape(1)
    p, d, e = r"sem_seg_head\.predictor\.", r"sem_seg_head\.pixel_decoder\.", r"transformer\.encoder\.layers\.(\d+)\."
    layer, inner = r"predictor.layers.\1", r"pixel_decoder.encoder.layers.\1"

    def attention(theirs: str, ours: str) -> Rules:
        split = [";".join(f"{ours}.{x}.{kind}" for x in "qkv") + "<thirds" for kind in ("weight", "bias")]
        out = r"\2" if r"\1" in ours else r"\1"
        return [(rf"{theirs}in_proj_weight", split[0]), (rf"{theirs}in_proj_bias", split[1]),
                (rf"{theirs}out_proj\.(.*)", rf"{ours}.out.{out}")]  # fmt: skip

    rules = [
        *_text_swin(),
        (rf"{d}input_proj\.(.*)", r"pixel_decoder.input_projections.\1"),
        (rf"{d}transformer\.level_embed", "pixel_decoder.level_embed"),
        (rf"{d}{e}(self_attn\..*)", rf"{inner}.\2"),
        (rf"{d}{e}norm1\.(.*)", rf"{inner}.self_attn_layer_norm.\2"),
        (rf"{d}{e}norm2\.(.*)", rf"{inner}.final_layer_norm.\2"),
        (rf"{d}{e}linear([12])\.(.*)", rf"{inner}.fc\2.\3"),
        (rf"{d}mask_features\.(.*)", r"pixel_decoder.mask_projection.\1"),
        (rf"{d}(adapter_1|layer_1)\.(weight|bias)", r"pixel_decoder.\1.0.\2"),
        (rf"{d}(adapter_1|layer_1)\.norm\.(.*)", r"pixel_decoder.\1.1.\2"),
        (rf"{p}query_feat\.weight", "predictor.queries"),
        (rf"{p}query_embed\.weight", "predictor.positions"),
        (rf"{p}level_embed\.weight", "predictor.levels"),
        *attention(rf"{p}RIA_layers\.(\d+)\.multihead_attn\.", rf"{layer}.to_image"),
        (rf"{p}RIA_layers\.(\d+)\.norm\.(.*)", rf"{layer}.norms.0.\2"),
        *attention(rf"{p}RLA_vision\.(\d+)\.self_attn\.", rf"{layer}.to_regions"),
        (rf"{p}RLA_vision\.(\d+)\.norm\.(.*)", rf"{layer}.norms.1.\2"),
        *attention(rf"{p}RLA_lang_att\.multihead_attn\.", "predictor.layers.0.to_words"),
        (rf"{p}RLA_lang_att\.(norm\..*)", r"predictor.layers.0.to_words.\1"),
        (rf"{p}lang_proj\.(weight)", r"predictor.layers.0.to_words.words.\1"),
        (rf"{p}lang_weight", "predictor.layers.0.to_words.scale"),
        (rf"{p}transformer_ffn_layers\.(\d+)\.linear1\.(.*)", rf"{layer}.ffn.0.\2"),
        (rf"{p}transformer_ffn_layers\.(\d+)\.linear2\.(.*)", rf"{layer}.ffn.2.\2"),
        (rf"{p}transformer_ffn_layers\.(\d+)\.norm\.(.*)", rf"{layer}.norms.2.\2"),
        (rf"{p}decoder_norm\.(.*)", r"predictor.norm.\1"),
        (rf"{p}minimap_embed\.(.*)", r"predictor.minimap.\1"),
        *((rf"{p}mask_embed\.layers\.{i}\.(.*)", rf"predictor.mask_embed.{2 * i}.\1") for i in range(3)),
        *((rf"{p}nt_embed\.layers\.{i}\.(.*)", rf"predictor.no_target.{2 * i}.\1") for i in range(2)),
        (r"criterion\.empty_weight|pixel_mean|pixel_std", f"!{_BUFFER}"),
    ]  # fmt: skip
    return rules, {"name": "rela", "size": _swin_size(weights, path)}


RULES: dict[str, Callable[[dict[str, Tensor], str | Path, str | None], tuple[Rules, dict[str, Any]]]] = {
    "dit": _dit, "lavt": _lavt, "rela": _rela,
}  # fmt: skip
