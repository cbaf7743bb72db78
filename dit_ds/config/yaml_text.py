"""YAML whose plain scalars stay as they are written, until the key that they belong to says what they are.

YAML 1.1 alone reads `no` as false, `0123` as 83, `2024-01-01` as a date and `1e-4` as text, whatever the key is for.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

# the first line of a run's config.yaml
RESOLVED = "# Resolved: all keys; paths are relative to the folder that dit-ds was started in\n"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LONGEST = 100  # characters of a number
_WORDS = {"true": True, "false": False, "null": None, "~": None}


class Plain(str):
    """A scalar without quotes. In messages it looks like the value it stands for."""

    def __repr__(self) -> str:
        return repr(by_form(self))


def by_form(text: str) -> Any:
    """What a plain scalar is by its form alone, as in JSON: true, false, null, a decimal number; else text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) < _LONGEST and _INTEGER.fullmatch(text):
        return int(text)
    if len(text) < _LONGEST and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return str(text)


def all_by_form(value: Any) -> Any:
    """The same nested value, its plain scalars by their form."""
    if isinstance(value, dict):
        return {str(k): all_by_form(v) for k, v in value.items()}
    if isinstance(value, list):
        return [all_by_form(v) for v in value]
    return by_form(value) if isinstance(value, Plain) else value


_BY_FORM = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")  # all that is known without the key


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [r for r in resolvers if r[0] in _BY_FORM]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    return text if node.style else Plain(text)


_Loader.add_constructor("tag:yaml.org,2002:str", _text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be something else without quotes, here or in YAML 1.1."""


def _represent(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quoted = "'" if not isinstance(by_form(text), str) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _represent)


def load_yaml(text: str) -> Any:
    """Nested dicts and lists of texts and None; texts without quotes are `Plain`.

    Raises:
        ValueError: it is not YAML, nests too deeply, or has a key twice; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """What `load_yaml` and the schema read back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
