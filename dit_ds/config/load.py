"""The run configuration: typed, from YAML files that inherit from one another, with dotted overrides.

The run's YAML owns batch size, learning rate, schedule and epochs; the DeepSpeed JSON that it names owns sharding,
precision, offload and the micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dit_ds.config.installed_files import find_file, installed_names, short_name
from dit_ds.config.schema import RunConfig
from dit_ds.config.suggestions import did_you_mean, unknown_key
from dit_ds.config.validation import validate_combinations
from dit_ds.config.yaml_text import RESOLVED, Plain, all_by_form, load_yaml
from dit_ds.errors import UserError
from dit_ds.files import is_url

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
# keys that name a file or folder to read: in a YAML file, what lies beside that file comes first
INPUT_PATHS = ("data.root", "model.checkpoint", "text.name", "text.tokenizer", "deepspeed.config")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, the files it is based on (`base: other.yaml`), and overrides `--a.b value` or `--a.b=value`.

    Each value is read by its key's type: text as it is written. Of several overrides of a key the last counts.

    Paths: `base` is relative to the file that names it. The keys `INPUT_PATHS` in a file mean what lies beside that file;
    where nothing does, they are relative to the working directory, as all paths in overrides and all outputs (`run_dir`)
    are. A run's own config.yaml, which `RunConfig.save` wrote, has paths relative to the working directory alone.

    Args:
        path: of the file, or the name of one of the package's, as `base`: see `find_file`. So may `base` in a file be.
    Raises:
        UserError: a missing or malformed file, a former or unknown key (with the present or nearest one), a value of the
            wrong type, settings that do not go together.
    """
    path = find_file(path, ".yaml")
    try:
        values = _read_yaml(path, seen=())
        for key, value in _parse_overrides(overrides or []):
            _set(values, key, value)
        values = _any_by_form(values)
    except RecursionError:  # an anchor within itself
        raise UserError(f"{path} is nested too deeply: write it out") from None
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
        return unknown_key(key, field_names(), error["input"])
    near = ""
    if error["type"] == "literal_error":
        options = [o.strip(" '") for o in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = did_you_mean(str(error["input"]), options)
    value = repr(error["input"])
    value = value if len(value) <= 80 else f"{value[:77]}..."
    return f"{key} = {value}: {error['msg'][0].lower()}{error['msg'][1:]}{near}"


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path} is based on itself: remove the 'base' that closes the circle")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = load_yaml(text) or {}
    except OSError as e:
        near = did_you_mean(str(path), installed_names(".yaml"))
        raise UserError(f"cannot read the configuration {path}: {e.strerror}{near}") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, as configs/base.yaml does")
    try:
        _refuse_former_keys(values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    if not text.startswith(RESOLVED):
        values = _with_paths_beside(values, path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {base!r}: it is the name of a file")
    return merge(_read_yaml(find_file(base, ".yaml", path.parent), (*seen, path)), values)


def _with_paths_beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a file in `folder`, those of `INPUT_PATHS` that lie there relative to the working directory."""
    values = dict(values)
    for key in INPUT_PATHS:
        section, _, name = key.partition(".")
        inner: Any = values.get(section)
        value = inner.get(name) if isinstance(inner, dict) else None
        if not isinstance(value, str) or not value or is_url(value) or os.path.isabs(value):
            continue
        path = os.path.join(folder, value)
        if os.path.exists(path):
            plain = os.path.normpath(path)  # another path where a link is before a `..`
            path = plain if os.path.exists(plain) and os.path.samefile(plain, path) else path
            values[section] = inner | {name: short_name(Path(path))}
    return values


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
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{option} has no value: overrides read --section.key value, or --section.key=value")
            text = rest.pop(0)
        yield key, _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    """A value from the command line: of keys that hold text or one number as it is typed, of others as YAML."""
    kind = _annotation(key)
    if kind is None:  # there is no such key, as will be said
        return Plain(text)
    if not _is_structured(kind):
        return None if text == "null" and NoneType in get_args(kind) else Plain(text)
    try:
        return load_yaml(text)
    except ValueError:
        raise UserError(f"--{key}: '{text}' is not a YAML value") from None


def _annotation(key: str) -> Any:
    """The type of a key's value; `Any` within a key that holds anything, None where there is no such key."""
    kind: Any = RunConfig
    for name in key.split("."):
        if section := _section(kind):
            info = section.model_fields.get(name)
            kind = info.annotation if info else None
        else:
            kind = Any if _holds_anything(kind) else None
    return kind


def _section(kind: Any) -> type[BaseModel] | None:
    """The section that a value of that type is, or may be where it is not none."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _holds_anything(kind: Any) -> bool:
    return kind is Any or Any in get_args(kind)


def _is_structured(kind: Any) -> bool:
    """Whether values of that type are sections, lists or dicts, or can be."""
    if _section(kind) or _holds_anything(kind):
        return True
    return get_origin(kind) in (list, dict, tuple) or any(
        _is_structured(k) for k in get_args(kind) if get_origin(kind) is not Literal
    )


def _any_by_form(values: dict[str, Any], section: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """The values, those that may be anything by their form; the others are read by the schema."""
    found = {}
    for name, value in values.items():
        info = section.model_fields.get(str(name))
        kind = info.annotation if info else None
        if (inner := _section(kind)) and isinstance(value, dict):
            value = _any_by_form(value, inner)
        elif _holds_anything(kind):
            value = all_by_form(value)
        found[str(name)] = value
    return found


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:  # an optional section, which a file has as null
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"unknown key '{key}': '{section}' has no keys of its own")
        values = inner
    both = isinstance(value, dict) and isinstance(values.get(last), dict) and _is_section(key)
    values[last] = merge(values[last], value) if both else value


def _is_section(key: str) -> bool:
    return _section(_annotation(key)) is not None


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(dotted name, default, type, description) of every field."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        inner, default = _section(kind), info.get_default(call_default_factory=True)
        if inner is None or default is None:
            yield f"{prefix}{name}", default, "section | None" if inner else _label(kind), info.description or ""
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def _label(kind: Any) -> str:
    """A type as it is written, without its constraints."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _label(inner[0])
    if origin is Union or origin is UnionType:
        return " | ".join(map(_label, inner))
    if not inner or origin is Literal:
        return "None" if kind is NoneType else str(kind if inner else kind.__name__).replace("typing.", "")
    return f"{origin.__name__}[{', '.join(map(_label, inner))}]"


def field_names() -> list[str]:
    """All dotted names, and those of the sections."""
    names = [name for name, *_ in fields()]
    return names + sorted({n.rpartition(".")[0] for n in names if "." in n})


def help_text() -> str:
    """Every field with its type, default and description, by section, for `--help`."""
    sections: dict[str, list[str]] = {}
    for name, default, kind, meaning in fields():
        of = sections.setdefault(name.rpartition(".")[0], [])
        of.append(f"  --{name}  [{kind}; default {default}]\n        {meaning}")
    lines = ["configuration keys (in YAML, or as --key value), by section:"]
    for section, keys in sections.items():
        lines += ["", f"{section or 'the run'}: {_what(section)}", *keys]
    return "\n".join(lines)


def _what(section: str) -> str:
    """The first sentence about a section."""
    of = _section(_annotation(section)) if section else RunConfig
    return (of.__doc__ or "").partition("\n")[0] if of else ""
