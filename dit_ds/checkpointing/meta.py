"""What a checkpoint says of itself, checked before anything acts on it: a checkpoint may come from anyone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open

from dit_ds.checkpointing.integrity import checked, damage_is_user_error, damaged, require_readable
from dit_ds.engine.optimizer_states import MOMENTS
from dit_ds.engine.zero_state import MASTER
from dit_ds.errors import UserError
from dit_ds.files import parse_json, read_json

Count = Annotated[int, Field(ge=0, lt=2**53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # names a file in the run's frozen/, too
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Progress(_Checked):
    """The fields of `training.setup.Progress`."""

    step: Count
    epoch: Count
    batch: Count
    seconds: Finite
    best_score: Finite
    best_step: Count
    metrics: dict[str, Any]
    evaluated: Count
    bad_samples: list[str]


class _EngineCounters(_Checked):
    """The keys of `engine.counters`."""

    global_steps: Count
    global_samples: Count
    micro_steps: Count
    skipped_steps: Count
    loss_scale: dict[str, float | bool | None]


class _Exported(BaseModel):
    """The header of an exported file; with `frozen`, the digest of the weights that are not in it, of an adapter's."""

    model_config = ConfigDict(strict=True)
    step: Count
    epoch: Count
    config: dict[str, Any]
    val_manifest_sha: Sha256 | None = None
    frozen: Sha256 | None = None


class _Meta(_Exported):
    """meta.json; of further keys, `check_resumable` compares the values."""

    samples_seen: Count
    seed: Count
    manifest_sha: Sha256
    frozen: Sha256  # which a checkpoint always has
    world_size: Count
    zero_stage: Count
    adam_step: Annotated[Finite, Field(ge=0)]
    shapes: dict[str, list[Count]]
    digest: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]
    progress: _Progress
    engine: _EngineCounters


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; an exported file, in its header.

    Raises:
        UserError: it is damaged, or is not one of ours.
    """
    if path.is_file():
        return checked(path, _Exported, _header(path), "its header")
    require_readable(path)
    return check_meta(path, read_json(path / "meta.json", "checkpoint"), "meta.json")


def check_meta(path: Path, value: Any, where: str) -> dict[str, Any]:
    """The value, of the file `where` of a checkpoint, if a checkpoint says such of itself.

    Raises:
        UserError: it does not.
    """
    meta = checked(path, _Meta, value, where)
    if lacking := {MASTER, *MOMENTS} - meta["digest"].keys():
        raise damaged(path, f"its meta.json has no digest of {', '.join(sorted(lacking))}")
    return meta


def _header(path: Path) -> Any:
    with damage_is_user_error(path), safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("dit_ds")
    if text is None:
        raise UserError(
            f"{path} was not written by dit-ds export: give a run's folder or one of its checkpoints/step_*"
        )
    try:
        return parse_json(text)
    except ValueError as e:
        raise damaged(path, f"its header is not valid JSON: {e}") from None
