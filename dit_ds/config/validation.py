"""Refuses combinations of settings that the schema alone allows."""

from __future__ import annotations

from dit_ds.config.lora import LoraConfig
from dit_ds.config.schema import TRITON_COLUMNS, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from dit_ds.errors import UserError
from dit_ds.files import is_url

_DIT_SAM_ONLY = {
    "data": ("prompts",),
    "model": (
        "scheme", "scheme_form", "word_init", "adapters", "static_tokens", "static_form", "decoder_layers", "freeze_image_encoder",
        "freeze_mask_decoder", "freeze_projections", "mask_padding", "align_corners", "window_size", "word_dropout", "lora",
    ),
    "train": ("dice_weight", "layer_decay"),
}  # fmt: skip


def validate_combinations(config: RunConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        UserError: names the first such settings, and what to set.
    """
    _check_data(config)
    _check_rates(config.train)
    if config.checkpoint.local is not None and not config.checkpoint.asynchronous:
        raise UserError(
            "checkpoint.local is written in the background, and checkpoint.asynchronous is false: set it true, or leave "
            "checkpoint.local out"
        )
    swin = config.model.size.startswith("swin")
    if swin == (config.model.name == "dit_sam"):
        fitting = "vit_t, vit_b, vit_l or vit_h" if swin else "swin_b or swin_t_tiny"
        raise UserError(f"model.name {config.model.name} has no size {config.model.size}: set model.size {fitting}")
    if swin:
        _check_other_method(config)
    else:
        _check_scheme(config)
        _check_grid(config)


def _check_grid(config: RunConfig) -> None:
    m, columns = config.model, -(-config.data.image_size // 16)
    if m.attention == "triton" and max(m.window_size, columns) > TRITON_COLUMNS:
        raise UserError(
            f"model.attention triton takes grids of at most {TRITON_COLUMNS} columns, images of {16 * TRITON_COLUMNS} px: "
            "set model.attention auto, or a smaller data.image_size or model.window_size"
        )


def _check_data(config: RunConfig) -> None:
    d = config.data
    for key in ("dataset", "split_by"):
        if "/" in getattr(d, key):
            raise UserError(
                f"data.{key} '{getattr(d, key)}' has a slash: dataset and split_by are two keys, as refcoco, unc"
            )
    if len(set(d.prompts)) < len(d.prompts):
        raise UserError(f"data.prompts {d.prompts} names one twice: leave it out")
    wrong = [s for s in d.scales if not 16 <= s <= d.image_size]
    if wrong:
        raise UserError(f"data.scales: {wrong[0]} is not from 16 to data.image_size, {d.image_size}: leave it out")
    if d.scales and d.resize == "stretch":
        raise UserError("data.scales change the longer side, and data.resize stretch has none: set data.resize pad")
    if is_url(d.root) and not d.streamed:
        raise UserError(f"data.root {d.root} can only be read as a stream: set data.reader auto")
    if d.streamed and d.sample_order == "global":
        raise UserError("data.order global reads anywhere, which a stream can't: set data.order auto")
    if d.unit == "image" and d.sample_order == "shards":
        raise UserError("data.unit image goes with data.order global only: set data.unit ref")
    if d.val_fraction and (d.mixture or d.val_dataset or d.val_split_by):
        raise UserError(
            "data.val_fraction holds a part of one training set out, and data.mixture, data.val_dataset and "
            "data.val_split_by name others: set data.val_fraction 0, or leave them out"
        )
    if d.val_fraction and d.val_split == d.train_split:
        raise UserError(
            f"data.val_fraction holds a part of {d.train_split} out: give it another name, as data.val_split val"
        )
    _check_mixture(d)


_FREEZE = {
    "image_encoder": "set model.freeze_image_encoder true",
    "text_encoder": "set text.freeze true",
    "mask_decoder": "set model.freeze_mask_decoder true",
    "projections": "set model.freeze_projections true",
}


def _check_rates(t: TrainConfig) -> None:
    for part, scale in t.lr_scale.model_dump().items():
        if scale == 0:
            raise UserError(f"train.lr_scale.{part} is 0, which computes gradients for nothing: {_FREEZE[part]}")


def _check_mixture(d: DataConfig) -> None:
    for name, weight in d.mixture.items():
        if name.count("/") != 1 or not all(name.split("/")):
            raise UserError(f"data.mixture names '{name}', which does not read DATASET/SPLIT_BY, as refcoco/unc")
        if d.unit == "image" and weight != int(weight):
            raise UserError(f"data.unit image takes whole weights in data.mixture, {name} has {weight:g}: round it")


def _check_scheme(config: RunConfig) -> None:
    m = config.model
    if m.static_tokens and m.scheme == "default":
        raise UserError(
            "model.static_tokens go beside the words in the ViT, and model.scheme default has none there: "
            "set model.scheme layer_wise or end_to_end"
        )
    if m.static_form == "add" and m.static_tokens != config.data.tokens:
        raise UserError(
            f"model.static_form add wants a static token for each of data.tokens: set model.static_tokens {config.data.tokens}"
        )
    if m.adapters != "frozen" and m.scheme != "end_to_end":
        raise UserError(f"model.adapters are of model.scheme end_to_end, not of {m.scheme}: leave them out")
    if m.scheme_form == "released":
        _check_released(m)
    if m.freeze_projections and not m.image_encoder_frozen:
        raise UserError("model.freeze_projections goes with model.freeze_image_encoder: set both, or neither")
    if m.lora is not None:  # which always trains
        return _check_lora(config, m.lora)
    has_text = "text" in config.data.prompts
    text_enters = has_text and m.scheme != "default" and not m.freeze_projections
    text_trains = has_text and not config.text.freeze
    if m.freeze_image_encoder and m.freeze_mask_decoder and not text_trains and not text_enters:
        raise UserError(
            "nothing is left to train: set one of model.freeze_image_encoder, model.freeze_mask_decoder and "
            "text.freeze to false, or model.scheme to layer_wise"
        )


def _check_lora(config: RunConfig, lora: LoraConfig) -> None:
    if len(set(lora.targets)) < len(lora.targets):
        raise UserError(f"model.lora.targets {lora.targets} names one twice: leave it out")
    if lora.of_text and "text" not in config.data.prompts:
        raise UserError("model.lora.targets text needs words to train on: add text to data.prompts, or leave it out")
    if lora.of_text and config.text.cache:
        raise UserError(
            "text.cache remembers features that don't change, and model.lora.targets text trains them: set text.cache 0"
        )


def _check_released(m: ModelConfig) -> None:
    """What the paper's released code does not have."""
    if m.scheme == "cascade":
        raise UserError("model.scheme cascade was not released: set model.scheme_form paper")
    if m.static_tokens and m.scheme not in ("layer_wise", "end_to_end"):
        raise UserError(
            f"model.scheme {m.scheme} was not released with static tokens: set model.static_tokens 0, or "
            "model.scheme_form paper"
        )
    if m.static_tokens and m.static_form != "add":
        raise UserError("static tokens were released as added ones: set model.static_form add")
    wanted = "never" if m.static_tokens else "always"
    if m.scheme == "end_to_end" and m.adapters != wanted:
        beside = "beside static tokens " if m.static_tokens else ""
        raise UserError(
            f"model.scheme end_to_end was released {beside}with adapters {wanted}: set model.adapters {wanted}, or "
            "model.scheme_form paper"
        )


def _check_other_method(config: RunConfig) -> None:
    m, policy = config.model, config.train.activation_checkpointing
    if config.data.train_mask_rule == "soft":
        raise UserError(f"model.name {m.name} learns masks of 0 and 1: set data.train_mask_rule half or any")
    if m.attention not in ("auto", "eager", "sdpa"):
        raise UserError(f"model.name {m.name} has no attention {m.attention}: set model.attention auto, eager or sdpa")
    if policy not in ("none", "block"):
        raise UserError(
            f"model.name {m.name} can't recompute {policy}: set train.activation_checkpointing none or block"
        )
    if m.has_no_target_head and config.eval.no_target_pixels != EvalConfig().no_target_pixels:
        raise UserError(f"model.name {m.name} says by itself that there is no target: leave out eval.no_target_pixels")
    for section, keys in _DIT_SAM_ONLY.items():
        for key in keys:
            values = getattr(config, section)
            if getattr(values, key) != type(values).model_fields[key].default:
                raise UserError(f"model.name {m.name} knows no {section}.{key}: leave it out")
