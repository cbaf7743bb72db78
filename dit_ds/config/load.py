"""The run configuration: typed, from YAML files that inherit from one another, with dotted overrides.

The run's YAML owns batch size, learning rate, schedule and epochs; the DeepSpeed JSON that it names owns sharding,
precision, offload and the micro-batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dit_ds.config.schema import RunConfig
from dit_ds.config.validation import validate_combinations
from dit_ds.errors import UserError

# former name: present name; the former one is refused
RENAMED_KEYS = {
    "data.color": "data.color_jitter",
    "data.mask_rule": "data.train_mask_rule",
    "data.timeout": "data.worker_timeout",
    "train.decay": "train.lr_decay",
    "train.decay_norms": "train.weight_decay_norms",
    "train.ema": "train.ema_decay",
    "train.nonfinite": "train.on_nonfinite",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, the files it is based on (`base: other.yaml`), and overrides `--a.b value` or `--a.b=value`.

    Raises:
        UserError: a missing or malformed file, a former or unknown key (with the present or nearest one), a value of the
            wrong type, settings that do not go together.
    """
    values = _read_yaml(Path(path), seen=())
    for key, value in _parse_overrides(overrides or []):
        _set(values, key, value)
    return validate(values, source=None if overrides else path)


def validate(values: dict[str, Any], source: str | Path | None = None) -> RunConfig:
    """Check a nested dict against the schema, and which settings go together.

    Args:
        source: the file that the values were read from, which the message then names.
    Raises:
        UserError: the first error, in one line.
    """
    try:
        _refuse_former_keys(values)
        try:
            config = RunConfig.model_validate(values)
        except ValidationError as e:
            raise UserError(_message(e)) from None
        validate_combinations(config)
    except UserError as e:
        if source is None:
            raise
        raise UserError(f"{source}: {e}") from None
    return config


def _refuse_former_keys(values: dict[str, Any]) -> None:
    for key in _dotted(values):
        if key in RENAMED_KEYS:
            raise UserError(f"'{key}' is now '{RENAMED_KEYS[key]}': rename it")


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _message(errors: ValidationError) -> str:
    """The first error in one line, with the nearest key or value that exists."""
    error = errors.errors()[0]
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _did_you_mean(key, field_names(), cutoff=0.5)
        return f"unknown key '{key}'" + (near or ": see 'dit-ds train --help'")
    near = ""
    if error["type"] == "literal_error":
        options = [o.strip(" '") for o in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = _did_you_mean(str(error["input"]), options)
    return f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}{near}"


def _did_you_mean(text: str, options: list[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(text, options, 1, cutoff=cutoff)
    return f": did you mean '{near[0]}'?" if near else ""


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path} is based on itself: remove the 'base' that closes the circle")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as e:
        raise UserError(f"cannot read the configuration {path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, as configs/base.yaml does")
    try:
        _refuse_former_keys(values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(_read_yaml(path.parent / base, (*seen, path)), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged: the values of `above` override those of `below`, key by key."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def _parse_overrides(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise UserError(f"'{option}' has no key before it: overrides read --section.key value")
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{option} has no value: overrides read --section.key value")
            text = rest.pop(0)
        try:
            yield key, yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{option}: '{text}' is not a YAML value") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"unknown key '{key}': '{section}' has no keys of its own")
        values = inner
    values[last] = value


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(dotted name, default, type, description) of every field."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True)
            label = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            yield f"{prefix}{name}", default, label.replace("typing.", ""), info.description or ""


def field_names() -> list[str]:
    """All dotted names, and those of the sections."""
    names = [name for name, *_ in fields()]
    return names + sorted({n.rpartition(".")[0] for n in names if "." in n})


def help_text() -> str:
    """Every field with its type, default and description, for `--help`."""
    lines = ["configuration keys (in YAML, or as --key value):"]
    for name, default, kind, meaning in fields():
        lines.append(f"  --{name}  [{kind}; default {default}]\n        {meaning}")
    return "\n".join(lines)
