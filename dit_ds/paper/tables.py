"""The paper's tables as data: *Deep Instruction Tuning for Segment Anything Model*. The figures are in published.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Column(NamedTuple):
    """A column: `oiou`, `miou` or `p@X` on a dataset's split, in percent; `ms` in Table 6, `gb` in Table 8."""

    dataset: str
    split: str
    metric: str

    @property
    def is_score(self) -> bool:
        """Whether it is a metric of `dit-ds eval`, of which more is better."""
        return self.metric not in ("ms", "gb")


@dataclass(frozen=True)
class Row:
    """A row as printed.

    Attributes:
        line: line number in the paper's text, as converted to Markdown.
        label: the leading cells.
        values: by column; no entry for an empty cell.
        configs: names of its configurations in configs/paper, by dataset; empty for methods that are not implemented.
        prompt: kind of prompt in the evaluation: text, point or box.
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
    """A table as printed; `section` is the paper's section about it."""

    number: int
    title: str
    section: str
    note: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Misprint(NamedTuple):
    """A place where the paper disagrees with itself or with the data, what it says, and what is correct."""

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
        line=entry["line"],
        label=tuple(str(x) for x in entry["label"]),
        values={c: float(x) for c, x in zip(columns, figures) if x != "-"},
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
        number=entry["table"],
        title=entry["title"],
        section=entry["section"],
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
    """A row of Table 8 (appendix A.1).

    Attributes:
        visual_frozen, text_frozen: which encoders are.
        batch: samples, as printed.
        gpu_gb: memory of the GPU in GB.
        config: name of its configuration in configs/paper.
    """

    method: str
    visual_frozen: bool
    text_frozen: bool
    batch: int
    gpu_gb: float
    config: str


def _memory_row(row: Row) -> MemoryRow:
    method, visual, text, batch = row.label
    (gb,), (config,) = row.values.values(), row.configs.values()
    return MemoryRow(
        method=method,
        visual_frozen=visual == "frozen",
        text_frozen=text == "frozen",
        batch=int(batch),
        gpu_gb=gb,
        config=config,
    )


TABLE_8 = tuple(_memory_row(row) for row in TABLES[8].rows)
