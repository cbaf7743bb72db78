"""Checkpoints: saved by all ranks together, whole or not at all; loaded to go on, or as weights alone.

A checkpoint is a folder `checkpoints/step_00001200/` with `meta.json`, `model.safetensors` (every tensor but a frozen
text encoder's, which is recorded by name and digest) and `deepspeed/` (optimizer states).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dit_ds.config import RunConfig, merge, validate
from dit_ds.distributed import World, all_or_none
from dit_ds.engine import gathered_state
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, read_json, write_json
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.sam import DensePositions
from dit_ds.models.text_encoder import TextEncoder

_TEXT = "text_encoder."


def build_model(config: RunConfig, text_weights: bool = True) -> DITSAM:
    """The configuration's model on the CPU, SAM's checkpoint not yet loaded.

    Args:
        text_weights: False skips reading pretrained text weights that a checkpoint is about to replace.
    """
    m, t = config.model, config.text
    torch.manual_seed(config.seed)
    text = TextEncoder(t.name, t.layers, t.random_init or not text_weights, t.freeze, t.cache)
    return DITSAM(
        text,
        m.size,
        config.data.image_size,
        m.scheme,
        m.decoder_layers,
        m.freeze_image_encoder,
        m.mask_padding,
        m.attention,
        m.window_size,
        m.word_dropout,
    )


def _saved_names(model: nn.Module, config: RunConfig) -> set[str]:
    names = {n for n, _ in model.named_parameters()} | set(model.state_dict())
    if config.text.freeze and not config.text.random_init:
        names = {n for n in names if not n.startswith(_TEXT)}
    return names


def text_digest(model: DITSAM) -> str:
    """SHA-256 over the text encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.text_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def save(engine: Any, config: RunConfig, world: World, meta: dict[str, Any]) -> Path:
    """Save collectively as `checkpoints/step_NNNNNNNN` and return it.

    Raises:
        UserError: on every rank, if any rank couldn't write; nothing half-written stays.
    """
    folder = Path(config.run_dir) / "checkpoints"
    final, temporary = folder / f"step_{meta['step']:08d}", folder / f".step_{meta['step']:08d}.tmp"
    state = gathered_state(engine, _saved_names(engine.module, config), world.main)
    error: Exception | None = None
    try:
        if world.main:
            with full_disk_is_user_error(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                _save_tensors(state, temporary / "model.safetensors")
    except UserError as e:
        error = e
    _finish_or_remove(error, temporary, world)
    try:
        with full_disk_is_user_error(temporary):
            engine.save_checkpoint(
                str(temporary / "deepspeed"), tag="state", save_latest=False, exclude_frozen_parameters=True
            )
            if world.main:
                write_json(temporary / "meta.json", meta)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
    except (UserError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        error = e
    _finish_or_remove(error, temporary, world)
    return final


def _save_tensors(state: dict[str, Any], path: Path, header: dict[str, str] | None = None) -> None:
    try:
        save_file(state, path, header)
    except SafetensorError as e:  # wraps the operating system's error as text
        if "No space left" in str(e) or "os error 28" in str(e):
            raise OSError(28, "No space left on device") from e
        raise


def _finish_or_remove(error: Exception | None, temporary: Path, world: World) -> None:
    try:
        all_or_none(error)
    except UserError as e:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"checkpoint not saved: {e}") from None


def prune(config: RunConfig, best_step: int | None) -> None:
    """Remove all but the newest `checkpoint.keep` and the best."""
    newest = all_checkpoints(config.run_dir)[-config.checkpoint.keep :]
    for path in all_checkpoints(config.run_dir):
        if path not in newest and path.name != f"step_{best_step or 0:08d}":
            shutil.rmtree(path)


def all_checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p.parent for p in Path(run_dir).glob("checkpoints/step_*/meta.json"))


def find(path: str | Path) -> Path:
    """A checkpoint from its own folder, or from a run's: its best, else its newest. An exported file is one itself.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "meta.json").exists() or path.is_file():
        return path
    checkpoints = all_checkpoints(path)
    if not checkpoints:
        raise UserError(
            f"no checkpoint in {path}: give a run's folder, one of its checkpoints/step_*, or an exported file"
        )
    best = path / "best.json"
    if best.exists():
        chosen = path / "checkpoints" / f"step_{read_json(best, 'best score')['step']:08d}"
        if chosen in checkpoints:
            return chosen
    return checkpoints[-1]


def _load_tensors(path: Path) -> dict[str, Any]:
    with _damage_is_user_error(path):
        return load_file(path if path.is_file() else path / "model.safetensors")


@contextlib.contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise UserError(f"checkpoint {path} is damaged ({e}): use another of the run's") from None


def _load_into(model: DITSAM, path: Path, meta: dict[str, Any]) -> None:
    state = _load_tensors(path)
    target = {**dict(model.named_parameters()), **model.state_dict()}
    saved_text = any(name.startswith(_TEXT) for name in state)
    for name in sorted(state.keys() | target.keys()):
        if name.startswith(_TEXT) and not saved_text:
            continue
        if name not in state or name not in target or state[name].shape != target[name].shape:
            have = tuple(state[name].shape) if name in state else "absent"
            want = tuple(target[name].shape) if name in target else "absent"
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {have}, here {want}: use its own model.* keys"
            )
    if not saved_text and text_digest(model) != meta["text_digest"]:
        raise UserError(
            f"text encoder {meta['config']['text']['name']} is not the one {path} was trained with: set text.name"
        )
    model.load_state_dict(state, strict=False)


def load_model(path: str | Path, overrides: dict[str, Any] | None = None) -> tuple[DITSAM, RunConfig, dict[str, Any]]:
    """A checkpoint's model in evaluation mode, its run's configuration, and its meta data.

    Args:
        overrides: of the configuration, as a nested dict.
    """
    path = find(path)
    meta = read_meta(path)
    here = {"model": {"attention": "auto"}}  # the backend that the run was given need not exist on this machine
    config = validate(merge(merge(meta["config"], here), overrides or {}))
    holds_text = path.is_file() or not config.text.freeze or config.text.random_init
    model = build_model(config, text_weights=not holds_text)
    _load_into(model, path, meta)
    return model.eval(), config, meta


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; an exported file, in its header."""
    if not path.is_file():
        return read_json(path / "meta.json", "checkpoint")
    with _damage_is_user_error(path), safe_open(path, "pt") as f:
        meta = (f.metadata() or {}).get("dit_ds")
    if meta is None:
        raise UserError(
            f"{path} was not written by dit-ds export: give a run's folder or one of its checkpoints/step_*"
        )
    return json.loads(meta)


def export(path: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a checkpoint's model as one safetensors file: every tensor by its name, the text encoder's, too.

    SAM's parts keep SAM's names. The header holds the configuration, so that `load_model` needs nothing else but the
    text encoder's architecture and tokenizer. The file is read back and compared before it takes its name.

    Args:
        dtype: of the floating-point tensors; the dense positions' frequencies stay fp32, as bf16 would move them.
    Returns:
        `file`, `tensors`, `parameters`, `bytes`, `step`.
    """
    model, config, meta = load_model(path)
    exact = {n for n, m in model.named_modules() if isinstance(m, DensePositions)}
    state = {
        name: (x.to(dtype) if x.is_floating_point() and name.rpartition(".")[0] not in exact else x).contiguous()
        for name, x in ({**dict(model.named_parameters()), **model.state_dict()}).items()
    }
    header = {"config": config.model_dump(mode="json"), **{k: meta[k] for k in ("step", "epoch", "text_digest")}}
    out = Path(out)
    with full_disk_is_user_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        try:
            _save_tensors(state, temporary, {"dit_ds": json.dumps(header), "format": "pt"})
            back = _load_tensors(temporary)
            if back.keys() != state.keys() or not all(torch.equal(back[n], x) for n, x in state.items()):
                raise UserError(f"{out} could not be read back as written: check the disk")
            temporary.rename(out)
        finally:
            temporary.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    size = out.stat().st_size
    return {"file": str(out), "tensors": len(state), "parameters": parameters, "bytes": size, "step": meta["step"]}


def resume(engine: Any, path: Path) -> None:
    """Load trained weights and optimizer states into an engine. Collective.

    Raises:
        UserError: on every rank, if any rank's part is damaged.
    """
    error: Exception | None = None
    try:
        loaded, _ = engine.load_checkpoint(str(path / "deepspeed"), tag="state", load_module_strict=False)
        if loaded is None:
            raise FileNotFoundError("it has no DeepSpeed state")
    except Exception as e:  # a damaged file raises many kinds
        error = UserError(f"checkpoint {path} can't be loaded ({e}): remove it to resume from the one before")
    all_or_none(error)


def check_resumable(path: Path, expected: dict[str, Any]) -> None:
    """Compare what must not change between stop and start with what the checkpoint says."""
    meta = read_meta(path)
    for key, value in expected.items():
        if meta[key] != value:
            raise UserError(f"{path} was saved with {key} {meta[key]}, this run has {value}: resume with the same")


def load_weights(model: DITSAM, path: Path) -> None:
    """Put a checkpoint's weights, frozen ones too, into a model before it goes to the engine."""
    _load_into(model, path, read_meta(path))
