"""The weights of a model: its frozen part in a file of its own, a checkpoint's weights, and a checkpoint's model."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.integrity import damage_is_user_error, require_readable
from dit_ds.checkpointing.meta import read_meta
from dit_ds.config.load import load_config, merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batchnorm import running_statistics
from dit_ds.engine.zero_state import MASTER
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error, is_url, replace_on_success
from dit_ds.models.build import build_model
from dit_ds.models.positions import is_other_length
from dit_ds.models.sam_checkpoint import describe
from dit_ds.models.segmenter import Segmenter

_log = logging.getLogger("dit_ds")


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters and saved buffers, by name, on the CPU; not the running statistics of BatchNorm."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad} | running_statistics(model).keys()
    return {n: x.detach().cpu().contiguous() for n, x in model.state_dict().items() if n not in trained}


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of `frozen_state`."""
    return _digest(frozen_state(model))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters and saved buffers."""
    return _digest({n: x.detach().cpu().contiguous() for n, x in model.state_dict().items()})


def _digest(state: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(name.encode())
        sha.update(value.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def store_frozen(model: nn.Module, digest: str, run_dir: str | Path) -> Path:
    """Write `frozen_state` as `frozen/DIGEST.safetensors` in the run's folder, unless it is there.

    Raises:
        UserError: the disk is full.
    """
    path = Path(run_dir) / f"frozen/{digest}.safetensors"
    if not path.exists():
        save_tensors(frozen_state(model), path)
    return path


def save_tensors(state: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    with full_disk_is_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_on_success(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask, or the folder's access list, has it; safetensors gives 0600
            try:
                save_file(state, temporary, header)
            except SafetensorError as e:  # wraps the operating system's errors as text
                if "No space left" in str(e) or "os error 28" in str(e):
                    raise OSError(errno.ENOSPC, "No space left on device") from e
                raise
            temporary.chmod(mode)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())


def load_weights(model: nn.Module, path: Path, kind: str = MASTER) -> None:
    """Load a checkpoint's weights into a model of the same configuration, whatever its image size.

    Args:
        path: a checkpoint's folder, or an exported file; of an adapter, `model` has its base's weights.
        kind: which values of the trained parameters: `master`, or `ema` for their moving average.
    Raises:
        UserError: the checkpoint is of another model or damaged, or it was saved without its frozen weights and those of
            `model` differ.
    """
    meta = read_meta(path)
    left_out = not is_whole(path, meta)
    with damage_is_user_error(path):
        if path.is_file():
            state = load_file(path)
        else:
            frozen = {} if left_out else _load_frozen(path)
            statistics = path / checkpoint.STATISTICS
            state = (
                frozen | (load_file(statistics) if statistics.exists() else {}) | checkpoint.Reader(path).whole(kind)
            )
    target = model.state_dict()
    if left_out:  # the model's own frozen weights are used; their digest is compared below
        state = {n: x for n, x in frozen_state(model).items() if n not in state} | state
    for name in sorted(state.keys() | target.keys()):
        both = name in state and name in target
        if not both or not (
            state[name].shape == target[name].shape or is_other_length(name, state[name], target[name])
        ):
            have = tuple(state[name].shape) if name in state else "absent"
            want = tuple(target[name].shape) if name in target else "absent"
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {have}, here {want}: use its own model.* keys"
            )
    model.load_state_dict(state)
    if not (path.is_dir() or left_out) or frozen_digest(model) == meta["frozen"]:
        return
    if left_out:
        text, sam = meta["config"]["text"]["name"], meta["config"]["model"]["checkpoint"]
        remedy = "set both to the former files" if path.is_dir() else "give the former file with dit-ds export --base"
        raise UserError(
            f"{path} has no whole file of its frozen weights, and those of text.name {text} and model.checkpoint {sam} "
            f"are not the ones it was trained with: {remedy}"
        )
    raise _frozen_damage(path / checkpoint.FROZEN, "its digest differs")


def is_whole(path: Path, meta: dict[str, Any]) -> bool:
    """Whether the frozen weights are with the trained ones: not of an adapter, nor where they were left out."""
    return meta.get("frozen") is None if path.is_file() else (path / checkpoint.FROZEN).exists()


def _load_frozen(path: Path) -> dict[str, Tensor]:
    file = path / checkpoint.FROZEN
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        require_readable(path)
        raise _frozen_damage(file, e) from None


def _frozen_damage(file: Path, what: object) -> UserError:
    return UserError(
        f"{file} is damaged ({what}), the trained weights beside it are another file: remove it, and model.checkpoint and "
        "text.name are read in its place, or restore it with dit-ds train --resume"
    )


class LoadedModel(NamedTuple):
    """A checkpoint's model.

    Attributes:
        model: in evaluation mode, on the CPU.
        config: of the run.
        meta: the checkpoint's meta data, see `reader.read_meta`.
    """

    model: Segmenter
    config: RunConfig
    meta: dict[str, Any]


def load_model(path: str | Path, overrides: dict[str, Any] | None = None) -> LoadedModel:
    """Load a checkpoint's model, with the moving average of the weights where the run kept one.

    Args:
        path: a run's folder, a checkpoint's, an exported file; or a configuration in YAML, whose model then has the
            weights of `model.checkpoint` and was not tuned.
        overrides: of the configuration's keys, as a nested dict.
    Raises:
        UserError: there is no checkpoint, it is damaged, or the configuration names no checkpoint.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        return _untuned(path, overrides or {})
    path = checkpoint.find(path)
    meta = read_meta(path)
    config = _config_of(path, meta, overrides or {})
    complete = is_whole(path, meta)
    model = build_model(config, text_weights=not complete)
    if not complete and config.model.checkpoint:
        model.load_pretrained(config.model.checkpoint)
    load_weights(model, path, "" if path.is_file() else checkpoint.best_kind(meta))
    return LoadedModel(model.eval(), config, meta)


def read_config(path: str | Path) -> RunConfig:
    """The configuration of what `load_model` would load.

    Raises:
        UserError: there is no checkpoint, or its configuration can't be read.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        return load_config(path)
    path = checkpoint.find(path)
    return _config_of(path, read_meta(path), {})


def _config_of(path: Path, meta: dict[str, Any], overrides: dict[str, Any]) -> RunConfig:
    here = {"model": {"attention": "auto"}}  # the backend that the run was given need not exist on this machine
    return validate(merge(merge(meta["config"], here), overrides), source=path)


def with_data_root(path: str | Path, config: RunConfig, data_root: str | None) -> RunConfig:
    """The configuration with the root that shards are read from.

    A root that is a URL or a `pipe:` command is followed only if the user gave it, here or in a YAML of their own: a
    checkpoint may come from anyone, and must not make this machine run a command.

    Args:
        path, config: of `load_model`.
        data_root: what the user gave; None for the configuration's own.
    Raises:
        UserError: none was given, and the checkpoint records a URL or a command.
    """
    if data_root is not None:  # the run's reader may not support it
        data = config.data.model_copy(update={"root": data_root, "reader": "auto"})
        return config.model_copy(update={"data": data})
    if is_url(config.data.root) and Path(path).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{path} records {config.data.root!r} as its data.root, and a URL or command from a checkpoint is not "
            "followed: give the shards with --data-root"
        )
    return config


def _untuned(path: str | Path, overrides: dict[str, Any]) -> LoadedModel:
    config = validate(merge(load_config(path).model_dump(mode="json"), overrides))
    if config.model.checkpoint is None:
        raise UserError(f"{path} names no weights: set model.checkpoint, or give the folder of a run that was trained")
    model = build_model(config)
    for line in describe(model.load_pretrained(config.model.checkpoint)):
        _log.info(line)
    return LoadedModel(model.eval(), config, {"step": 0, "epoch": 0, "config": config.model_dump(mode="json")})
