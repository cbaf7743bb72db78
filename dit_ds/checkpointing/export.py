"""A checkpoint as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dit_ds.checkpointing.integrity import damage_is_user_error
from dit_ds.checkpointing.weights import load_model, save_tensors
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.errors import UserError
from dit_ds.files import refuse_overwriting
from dit_ds.models.sam import DensePositions


def export(path: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a checkpoint's model as one safetensors file: every tensor by its name, the text encoder's, too.

    SAM's parts keep SAM's names. The header holds the configuration, so that `load_model` needs nothing else but the
    text encoder's architecture and tokenizer. The file is read back and compared.

    Args:
        dtype: of the floating-point tensors; the dense positions' frequencies stay fp32, as bf16 would move them, and
            BatchNorm's running statistics.
    Returns:
        `file`, `tensors`, `parameters`, `bytes`, `step`, and `next`, what to do with the file.
    Raises:
        UserError: `out` is what is read, or in a checkpoint's folder; or the checkpoint, or the file written, is damaged.
    """
    refuse_overwriting(out, path)
    model, config, meta = load_model(path)
    positions = {n for n, m in model.named_modules() if isinstance(m, DensePositions)}
    exact = {n for n in model.state_dict() if n.rpartition(".")[0] in positions} | running_statistics(model).keys()
    state = {
        name: (x.to(dtype) if x.is_floating_point() and name not in exact else x).contiguous()
        for name, x in model.state_dict().items()
    }
    out = Path(out)
    save_tensors(state, out, {"dit_ds": header(config, meta), "format": "pt"})
    with damage_is_user_error(out):
        back = load_file(out)
    if back.keys() != state.keys() or not all(torch.equal(back[n], x) for n, x in state.items()):
        raise UserError(f"{out} could not be read back as written: check the disk")
    parameters = sum(p.numel() for p in model.parameters())
    size = out.stat().st_size
    made = {"file": str(out), "tensors": len(state), "parameters": parameters, "bytes": size, "step": meta["step"]}
    return made | {"next": f"dit-ds eval {out}"}


def header(config: RunConfig, meta: dict[str, Any]) -> str:
    """What an exported file says of itself, as JSON: `step`, `epoch`, `val_manifest_sha`, `config`."""
    known: dict[str, Any] = {k: meta[k] for k in ("step", "epoch", "val_manifest_sha") if k in meta}
    return json.dumps(known | {"config": config.model_dump(mode="json")})
