"""The paper's tables as data: *Deep Instruction Tuning for Segment Anything Model*. The figures are in published.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Column(NamedTuple):
    """What a column holds: `oiou`, `miou`, `p@X` of a dataset's split, in percent; or Table 6's `ms`, Table 8's `gb`."""

    dataset: str
    split: str
    metric: str

    @property
    def is_score(self) -> bool:
        """Whether more is better, and `dit-ds eval` gives it."""
        return self.metric not in ("ms", "gb")


@dataclass(frozen=True)
class Row:
    """A row as printed.

    Attributes:
        line: where it stands in the paper's text, as converted to Markdown.
        label: its leading cells.
        values: by column; no entry where the paper has none.
        configs: by dataset, the names of its configurations in configs/paper; none for methods that aren't here.
        prompt: what it is evaluated with: text, point or box.
        trained: False for SAM as it was released.
    """

    line: int
    label: tuple[str, ...]
    values: dict[Column, float]
    configs: dict[str, str]
    prompt: str = "text"
    trained: bool = True

    @property
    def name(self) -> str:
        """The leading cells in one line."""
        return ", ".join(self.label)


@dataclass(frozen=True)
class Table:
    """A table as printed; `section` is where the paper speaks of it."""

    number: int
    title: str
    section: str
    note: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Misprint(NamedTuple):
    """Where the paper disagrees with itself or with the data, what it says there, and what is so."""

    where: str
    says: str
    but: str


def _row(entry: dict[str, Any], columns: tuple[Column, ...]) -> Row:
    figures = str(entry["values"]).split()
    if len(figures) != len(columns):
        raise ValueError(f"published.yaml: {entry['label']} has {len(figures)} figures for {len(columns)} columns")
    configs = entry.get("config", {})
    if isinstance(configs, str):
        configs = {columns[0].dataset: configs}
    return Row(
        entry["line"],
        tuple(str(x) for x in entry["label"]),
        {c: float(x) for c, x in zip(columns, figures) if x != "-"},
        configs=configs,
        prompt=entry.get("prompt", "text"),
        trained=entry.get("trained", True),
    )


def _table(entry: dict[str, Any]) -> Table:
    columns = []
    for line in entry["columns"]:
        dataset, split, *metrics = line.split()
        columns += [Column(dataset, split, metric) for metric in metrics]
    return Table(
        entry["table"],
        entry["title"],
        entry["section"],
        note=entry.get("note", ""),
        labels=tuple(entry["labels"]),
        columns=tuple(columns),
        rows=tuple(_row(row, tuple(columns)) for row in entry["rows"]),
    )


_DATA = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
TABLES: dict[int, Table] = {entry["table"]: _table(entry) for entry in _DATA["tables"]}
EXPRESSIONS: dict[str, dict[str, int]] = _DATA["expressions"]
MISPRINTS = tuple(Misprint(**entry) for entry in _DATA["misprints"])


class MemoryRow(NamedTuple):
    """A row of Table 8 (appendix A.1): which encoders are frozen, the batch it gives, the GPU's memory in GB, and the
    name of its configuration in configs/paper."""

    method: str
    visual_frozen: bool
    text_frozen: bool
    batch: int
    gpu_gb: float
    config: str


def _memory_row(row: Row) -> MemoryRow:
    method, visual, text, batch = row.label
    (gb,), (config,) = row.values.values(), row.configs.values()
    return MemoryRow(method, visual == "frozen", text == "frozen", batch=int(batch), gpu_gb=gb, config=config)


TABLE_8 = tuple(_memory_row(row) for row in TABLES[8].rows)
