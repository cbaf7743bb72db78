"""The learning rate of each trained parameter, as a factor of the run's: `train.lr_scale` and `train.layer_decay`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from dit_ds.config.train_schema import LRScale, TrainConfig
from dit_ds.errors import UserError

# what a parameter's name begins with: the part, of DIT-SAM, LAVT and ReLA; the first that fits counts
_PARTS = {
    "image_encoder.instruction": "projections",
    "image_encoder.static_tokens": "projections",
    "text_projection": "projections",
    "backbone.pwams": "projections",
    "backbone.gates": "projections",
    "image_encoder": "image_encoder",
    "backbone": "image_encoder",
    "text_encoder": "text_encoder",
    "mask_decoder": "mask_decoder",
    "prompt_encoder": "mask_decoder",
    "decoder": "mask_decoder",
    "pixel_decoder": "mask_decoder",
    "predictor": "mask_decoder",
}
PARTS = tuple(LRScale.model_fields)
_BLOCK = re.compile(r"image_encoder\.blocks\.(\d+)\.")
_EMBEDDING = ("image_encoder.patch_embed.", "image_encoder.pos_embed")


def part_of(name: str) -> str | None:
    """The part of the model, one of `PARTS`, that a parameter belongs to by its name; None of a model that has none."""
    return next((part for start, part in _PARTS.items() if name == start or name.startswith(f"{start}.")), None)


def depth_of(names: Iterable[str]) -> int:
    """The number of the ViT's layers, by the names of a model's parameters; 0 without a ViT."""
    return max((int(found[1]) + 1 for n in names if (found := _BLOCK.match(n))), default=0)


def layer_factor(name: str, depth: int, decay: float) -> float:
    """What `train.layer_decay` makes of a parameter's rate, by BEiT's and MAE's rule: decay^(L - i) in block i of L, from 0,
    decay^(L + 1) of the embeddings, and 1 of all else, the neck included."""
    if found := _BLOCK.match(name):
        return decay ** (depth - int(found[1]))
    return decay ** (depth + 1) if name.startswith(_EMBEDDING) else 1.0


def rate_factors(model: nn.Module, t: TrainConfig) -> dict[str, float]:
    """By what the run's learning rate is multiplied, for each trained parameter by name.

    Raises:
        UserError: a factor is set for what the model lacks or does not train.
    """
    names = [n for n, _ in model.named_parameters()]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    scales, depth = t.lr_scale.model_dump(), depth_of(names)
    parts = {part_of(n) for n in trained}
    for part, scale in scales.items():
        if scale != 1 and part not in parts:
            raise UserError(f"train.lr_scale.{part} is {scale:g}, and nothing trains there in this run: leave it out")
    if t.layer_decay != 1 and not depth_of(trained):
        why = "the ViT does not train" if depth else "the model has no ViT"
        raise UserError(f"train.layer_decay is {t.layer_decay:g}, and {why} in this run: leave it out")
    return {n: scales.get(part_of(n) or "", 1.0) * layer_factor(n, depth, t.layer_decay) for n in trained}


def part_rates(factors: dict[str, float]) -> dict[str, float]:
    """The highest factor of each part, for the log; where a part has several, the lowest as PART_lowest, too."""
    found: dict[str, list[float]] = {}
    for name, factor in factors.items():
        if part := part_of(name):
            found.setdefault(part, []).append(factor)
    rates = {}
    for part in PARTS:
        if part in found:
            rates[part] = max(found[part])
            if min(found[part]) < max(found[part]):
                rates[f"{part}_lowest"] = min(found[part])
    return rates
