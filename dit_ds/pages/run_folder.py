"""What a report says of a run's folder. Its files may be a stranger's: whatever they hold is numbers or text here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import parse_json, read_json

POINTS = 800  # of a curve: as many as a plot is wide, so that a report of a long run stays small
_LONGEST_TEXT = 400  # characters of a value
_MOST_KEYS = 200  # of environment.json
METRICS = frozenset(
    "step epoch loss lr grad_norm samples_per_second tokens_per_second mfu data_wait step_seconds_p50 peak_memory_gib "
    "reserved_memory_gib skipped_steps miou oiou giou ciou p@0.5 p@0.6 p@0.7 p@0.8 p@0.9".split()
)  # that are read

Curve = dict[str, list[float | None]]  # a metric's name, or `step`: its values, None where there is none


@dataclass(frozen=True)
class RunFolder:
    """A run, as its folder tells it.

    Attributes:
        name: among the report's runs.
        train, evaluated: the lines of metrics.jsonl of that kind, as columns of equal length; empty without lines. Of
            more than `POINTS` lines, as many in a row as need be are one, with their means.
        lines: of metrics.jsonl that are one in `train`.
        environment: what environment.json says, by dotted name.
    """

    path: str
    name: str
    config: RunConfig
    train: Curve
    evaluated: Curve
    lines: int
    environment: dict[str, str]

    def last(self, metric: str) -> float | None:
        """The last value of a metric of training."""
        return next((x for x in reversed(self.train.get(metric, [])) if x is not None), None)

    def typical(self, metric: str) -> float | None:
        """The median of a metric of training."""
        values = [x for x in self.train.get(metric, []) if x is not None]
        return median(values) if values else None

    def largest(self, metric: str) -> float | None:
        """The largest value of a metric of training."""
        return max((x for x in self.train.get(metric, []) if x is not None), default=None)

    def best(self, metric: str) -> tuple[float, int] | None:
        """The largest value of a metric of evaluation, and its step."""
        pairs = zip(self.evaluated.get(metric, []), self.evaluated.get("step", []))
        found = [(value, int(step)) for value, step in pairs if value is not None and step is not None]
        return max(found, key=lambda pair: pair[0], default=None)


def read_run_folder(path: str, name: str) -> RunFolder:
    """Read a run's folder.

    Args:
        path: of the folder.
        name: to call it by.
    Raises:
        UserError: it is no run's, or its configuration can't be read.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; name a folder that dit-ds train made")
    config = load_config(folder / "config.yaml")
    train, lines = _thinned([x for kind, x in _metrics(folder) if kind == "train"])
    evaluated, _ = _thinned([x for kind, x in _metrics(folder) if kind == "eval"])
    environment = _environment(folder / "environment.json")
    return RunFolder(path, name, config, train=train, evaluated=evaluated, lines=lines, environment=environment)


def _environment(file: Path) -> dict[str, str]:
    try:
        read = flatten(read_json(file, "environment")) if file.is_file() else {}
    except RecursionError:
        raise UserError(f"the environment {file} is nested too deeply: remove it") from None
    return dict(itertools.islice(read.items(), _MOST_KEYS))


def short_names(paths: list[str]) -> list[str]:
    """The folders' own names, where they differ; else the paths as they were given."""
    names = [Path(p).resolve().name for p in paths]
    return names if len(set(names)) == len(names) else paths


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested dicts as one, of dotted names; other values as text, which is cut where it is long."""
    if isinstance(value, dict) and value:
        below: dict[str, str] = {}
        for key, inner in value.items():
            below |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return below
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        value = " ".join(value)
    return {prefix: cut(value if isinstance(value, str) else json.dumps(value))}


def cut(text: str) -> str:
    """A text, without its end where it is long."""
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"


def _metrics(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Kind and numbers of each line of metrics.jsonl that has a step."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return
    with open(path, errors="replace") as lines:
        for line in lines:
            try:
                entry = parse_json(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if isinstance(entry, dict) and isinstance(entry.get("kind"), str):
                numbers = {k: x for k in METRICS & entry.keys() if (x := _number(entry[k])) is not None}
                if "step" in numbers:
                    yield entry["kind"], numbers


def _number(value: Any) -> float | None:
    """A finite number of five digits, or of all where it is whole; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _thinned(lines: list[dict[str, float]]) -> tuple[Curve, int]:
    """Lines as columns, and how many lines are one."""
    together = max(1, math.ceil(len(lines) / POINTS))
    groups = [lines[i : i + together] for i in range(0, len(lines), together)]
    columns: Curve = {}
    for name in sorted({key for line in lines for key in line}):
        values = ([line[name] for line in group if name in line] for group in groups)
        columns[name] = [_number(sum(v) / len(v)) if len(v) > 1 else v[0] if v else None for v in values]
    if columns:
        columns["step"] = [group[-1]["step"] for group in groups]
    return columns, together
