"""A checkpoint as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.integrity import damage_is_user_error
from dit_ds.checkpointing.meta import read_meta
from dit_ds.checkpointing.weights import frozen_digest, frozen_state, is_whole, load_model, save_tensors
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.errors import UserError
from dit_ds.files import refuse_overwriting
from dit_ds.models.lora import merge_lora
from dit_ds.models.sam import DensePositions
from dit_ds.models.segmenter import Segmenter


def export(
    path: str | Path,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    adapter: bool = False,
    merge: bool = False,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Write a checkpoint's model as one safetensors file: every tensor by its name, the text encoder's, too.

    SAM's parts keep SAM's names. The header holds the configuration, so that `load_model` needs nothing else but the
    text encoder's architecture and tokenizer. The file is read back and compared.

    Args:
        dtype: of the floating-point tensors; the dense positions' frequencies stay fp32, as bf16 would move them, and
            BatchNorm's running statistics.
        adapter: only what was trained; the header has the digest of the other weights, which `load_model` then reads
            from `model.checkpoint` and `text.name`.
        merge: LoRA's updates are added to the weights, and the file's configuration has no `model.lora`.
        base: where `model.checkpoint` is now, of an adapter or a checkpoint without its frozen weights.
    Returns:
        `file`, `tensors`, `parameters` of those in it, `bytes`, `step`; of a run with LoRA that is not merged
        `lora_bytes`; of an adapter `base`, the file that it needs; `next`, what it is for.
    Raises:
        UserError: `out` is what is read, or in a checkpoint's folder; the checkpoint, or the file written, is damaged;
            there is no LoRA to merge, or all weights are there and `base` is given.
    """
    refuse_overwriting(out, path)
    path = checkpoint.find(path)
    if base is not None and is_whole(path, read_meta(path)):
        raise UserError(f"{path} holds all of its weights: leave out --base")
    model, config, meta = load_model(path, {"model": {"checkpoint": str(base)}} if base else None)
    if merge:
        config = _merged(model, config, path)
    left_out, more = set(frozen_state(model) if adapter else ()), {"frozen": frozen_digest(model)} if adapter else {}
    exact = _exact(model)
    state = {
        name: (x.to(dtype) if x.is_floating_point() and name not in exact else x).contiguous()
        for name, x in model.state_dict().items()
        if name not in left_out
    }
    out = Path(out)
    save_tensors(state, out, {"dit_ds": header(config, meta, **more), "format": "pt"})
    with damage_is_user_error(out):
        back = load_file(out)
    if back.keys() != state.keys() or not all(torch.equal(back[n], x) for n, x in state.items()):
        raise UserError(f"{out} could not be read back as written: check the disk")
    parameters = sum(p.numel() for n, p in model.named_parameters() if n not in left_out)
    said = {"file": str(out), "tensors": len(state), "parameters": parameters, "bytes": out.stat().st_size}
    said |= {"step": meta["step"]} | ({"base": config.model.checkpoint} if adapter else {})
    if config.model.lora is not None:
        said["lora_bytes"] = sum(x.nbytes for n, x in state.items() if ".lora." in n)
    return said | {"next": f"dit-ds eval {out} --split val"}


def _exact(model: Segmenter) -> set[str]:
    """Names of the tensors that stay fp32."""
    positions = {n for n, m in model.named_modules() if isinstance(m, DensePositions)}
    return {n for n in model.state_dict() if n.rpartition(".")[0] in positions} | running_statistics(model).keys()


def _merged(model: Segmenter, config: RunConfig, path: str | Path) -> RunConfig:
    """The configuration of the model that a merge of LoRA's updates, made here, leaves.

    Raises:
        UserError: there are none.
    """
    lora = config.model.lora
    if lora is None:
        raise UserError(f"{path} has no model.lora to merge: leave out --merge")
    merge_lora(model)
    frozen = config.model.image_encoder_frozen  # as the form of end_to_end depends on it
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"lora": None, "freeze_image_encoder": frozen}),
            "text": config.text.model_copy(update={"freeze": config.text.freeze or lora.of_text}),
        }
    )


def header(config: RunConfig, meta: dict[str, Any], **more: Any) -> str:
    """What an exported file says of itself, as JSON: `step`, `epoch`, `val_manifest_sha`, `config`, and `more`."""
    known: dict[str, Any] = {k: meta[k] for k in ("step", "epoch", "val_manifest_sha") if k in meta}
    return json.dumps(known | {"config": config.model_dump(mode="json")} | more)
