"""A run's SAM as a folder that `transformers.SamModel.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ds.checkpointing.weights import load_model
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, refuse_overwriting, write_json
from dit_ds.models.sam import SIZES, resize_positions
from dit_ds.models.sam_checkpoint import names_of_transformers
from dit_ds.models.segmenter import PIXEL_MEAN, PIXEL_STD

_TEXT = ("text_encoder.", "text_projection.")
_FREQUENCIES = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def export_transformers(path: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a run's ViT, prompt encoder and mask decoder as a SamModel of transformers, at the run's image size.

    A SamModel reads no text: the text encoder and its projection are left out.

    Args:
        path: as for `load_model`.
        out: a folder, new or empty.
        dtype: of the weights, but for the dense positions' frequencies.
    Returns:
        `folder`, `tensors`, `parameters`, `image_size`, `left_out` (part: how many tensors) and `next`.
    Raises:
        UserError: the run's model is no SAM of transformers, or the folder is not empty or can't be written.
    """
    out = Path(out)
    refuse_overwriting(out, path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there, and no empty folder: choose another")
    model, config, _ = load_model(path)
    _require_plain(path, config)
    from transformers import SamModel

    sam_config = _sam_config(config)
    with torch.device("meta"):
        theirs: Any = SamModel(sam_config)
    state = _state(path, model.state_dict(), theirs.state_dict())
    state = {n: x.to(dtype) if n not in _frequencies(state) else x for n, x in state.items()}
    theirs.load_state_dict(state, assign=True)
    with full_disk_is_user_error(out):
        theirs.save_pretrained(out)
    write_json(out / "preprocessor_config.json", _preprocessing(config.data.image_size))
    back = SamModel.from_pretrained(out).state_dict()
    if back.keys() != state.keys() or not all(torch.equal(back[n], x) for n, x in state.items()):
        raise UserError(f"{out} could not be read back as written: check the disk")
    left_out = {part.rstrip("."): sum(n.startswith(part) for n in model.state_dict()) for part in _TEXT}
    return {
        "folder": str(out), "tensors": len(state), "parameters": sum(p.numel() for p in theirs.parameters()),
        "image_size": config.data.image_size, "left_out": left_out,
        "next": f"transformers.SamModel.from_pretrained({str(out)!r}); it takes points and boxes, no text",
    }  # fmt: skip


def _require_plain(path: str | Path, config: RunConfig) -> None:
    m = config.model
    if m.name != "dit_sam":
        raise UserError(
            f"{path} is of model.name {m.name}, and a SamModel of transformers holds a SAM: leave out --format"
        )
    if m.scheme != "default":
        raise UserError(
            f"{path} is of model.scheme {m.scheme}: text enters its ViT, for which a SamModel of transformers has no place: "
            "only model.scheme default can be one; leave out --format"
        )


def _sam_config(config: RunConfig) -> Any:
    """SamConfig of the same network; a ViT that attends globally everywhere has no windows there, either."""
    from transformers import SamConfig

    s, m, side = SIZES[config.model.size], config.model, config.data.image_size
    everywhere = not m.window_size
    vision = {
        "hidden_size": s.embed_dim, "num_hidden_layers": s.depth, "num_attention_heads": s.num_heads, "image_size": side,
        "patch_size": s.patch_size, "output_channels": s.prompt_dim, "num_pos_feats": s.prompt_dim // 2,
        "mlp_dim": 4 * s.embed_dim, "window_size": m.window_size or 14,
        "global_attn_indexes": list(range(s.depth) if everywhere else s.global_layers),
    }  # fmt: skip
    prompt = {"hidden_size": s.prompt_dim, "image_size": side, "patch_size": s.patch_size}
    decoder = {
        "hidden_size": s.prompt_dim, "mlp_dim": s.decoder_mlp_dim, "num_hidden_layers": m.decoder_layers,
        "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _state(path: str | Path, ours: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by transformers' names, position tables interpolated to the image as in the forward pass."""
    names = names_of_transformers(target)
    more = sorted(n for n in ours.keys() - set(names.values()) if not n.startswith(_TEXT))
    absent = sorted(set(names.values()) - ours.keys())
    if more or absent:
        raise UserError(
            f"{path} is no plain SAM: {len(more)} tensors have no place in a SamModel, {len(absent)} are not there "
            f"({(more + absent)[0]}, ..): merge adapters first, or leave out --format"
        )
    fitted = resize_positions(ours, {names[n]: x for n, x in target.items()})
    return {n: fitted[ours_name].contiguous() for n, ours_name in names.items()}


def _frequencies(state: dict[str, Tensor]) -> set[str]:
    return {n for n, ours in names_of_transformers(state).items() if ours == _FREQUENCIES}


def _preprocessing(side: int) -> dict[str, Any]:
    """SamImageProcessor's settings: the longer side to `side`, then padded to the square, as here."""
    return {
        "image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"longest_edge": side}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [x / 255 for x in PIXEL_MEAN], "image_std": [x / 255 for x in PIXEL_STD],
        "do_pad": True, "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": side // 4}, "mask_pad_size": {"height": side // 4, "width": side // 4},
    }  # fmt: skip
