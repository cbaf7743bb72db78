"""The result of `dit-ds compare` as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dit_ds.errors import UserError
from dit_ds.files import atomic_write
from dit_ds.paper.tables import Column

_ENDINGS = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".json": "json"}
_NAMES = {"oiou": "oIoU", "miou": "mIoU", "ms": "ms", "gb": "GB"}
LEGEND = "best and second best of a column; in brackets: minus the paper's row above; >: your runs"


def format_of(path: str | None) -> str:
    """The format by a file's suffix; text by default."""
    return _ENDINGS.get(Path(path).suffix.lower(), "text") if path else "text"


def render(result: dict[str, Any], form: str) -> str:
    """The result of `compare.compare` in a format.

    Args:
        form: text, markdown, csv or json.
    """
    if form == "json":
        return json.dumps(result) + "\n"
    if form == "csv":
        return _csv(result)
    return "\n".join((_markdown if form == "markdown" else _text)(table) for table in result["tables"])


def write(result: dict[str, Any], form: str, path: str) -> str:
    """Write the result atomically; return the path.

    Args:
        form: as in `render`.
    Raises:
        UserError: the file can't be written.
    """
    if Path(path).is_dir():
        raise UserError(f"--out {path} is a folder: name a file, as {path}/tables.md")
    with atomic_write(path) as f:
        f.write(render(result, form).encode())
    return path


def title(table: dict[str, Any]) -> str:
    """A table's number, title and note."""
    name = f"Table {table['table']}: {table['title']}" if table["table"] else table["title"]
    return name + (f" ({table['note']})" if table["note"] else "")


def heads(table: dict[str, Any]) -> list[str]:
    """The columns' names, of the labels and of the figures."""
    columns = table["columns"]
    several = len({c["dataset"] for c in columns}) > 1
    figures = [f"{c['dataset'] + ' ' if several else ''}{c['split']} {_metric(c['metric'])}" for c in columns]
    return table["labels"] + figures


def _metric(name: str) -> str:
    return _NAMES.get(name, name.upper())


def label(row: dict[str, Any]) -> list[str]:
    """A row's leading cells, with the numbers of its footnotes."""
    first, *rest = row["label"]
    return [first + "".join(f" [{n}]" for n in row["notes"]), *rest]


def number(row: dict[str, Any], i: int, column: dict[str, str]) -> tuple[str, str]:
    """A cell's figure, and its spread and its difference from the paper."""
    value, delta, spread = row["values"][i], row["deltas"][i], row["spread"][i]
    if value is None:
        return "-", ""
    behind = f" ±{spread:.2f}" if spread is not None else ""
    figure = f"{value:.2f}" if Column(**column).is_score else f"{value:g}"
    return figure, behind + (f" ({delta:+.2f})" if delta is not None else "")


def _text(table: dict[str, Any]) -> str:
    """Aligned columns under two header lines, split and metric."""
    columns = table["columns"]
    several = len({c["dataset"] for c in columns}) > 1
    splits = [f"{c['dataset']} {c['split']}" if several else c["split"] for c in columns]
    above = ["" if i and x == splits[i - 1] else x for i, x in enumerate(splits)]
    grid = [[""] * len(table["labels"]) + above, table["labels"] + [_metric(c["metric"]) for c in columns]]
    signs = {"best": "*", "second": "°", None: ""}
    for row in table["rows"]:
        cells = [number(row, i, c) for i, c in enumerate(columns)]
        grid.append(label(row) + [v + signs[m] + behind for (v, behind), m in zip(cells, row["marks"])])
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in grid]
    lines.insert(2, "-" * max(map(len, lines)))
    notes = [f"[{i}] {note}" for i, note in enumerate(table["notes"], 1)]
    return "\n".join([title(table), *lines, f"*, °: {LEGEND}", *notes]) + "\n"


def _markdown(table: dict[str, Any]) -> str:
    """The best in bold and the second best underlined, as in the paper."""
    columns = table["columns"]
    signs = {"best": "**{}**", "second": "<u>{}</u>", None: "{}"}
    lines = [
        "| " + " | ".join(x.replace("|", "\\|") for x in heads(table)) + " |",
        "|" + "---|" * len(table["labels"]) + "---:|" * len(columns),
    ]
    for row in table["rows"]:
        cells = [number(row, i, c) for i, c in enumerate(columns)]
        figures = [signs[m].format(v) + behind for (v, behind), m in zip(cells, row["marks"])]
        labels = [x.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_") for x in label(row)]
        lines.append("| " + " | ".join(labels + figures) + " |")
    notes = [f"- [{i}] {note}" for i, note in enumerate(table["notes"], 1)]
    text = [f"## {title(table)}".replace("*", "\\*"), "", *lines, "", f"Bold, underlined: {LEGEND}."]
    return "\n".join([*text, *(["", *notes] if notes else [])]) + "\n"


def _csv(result: dict[str, Any]) -> str:
    """One line per figure, for spreadsheets and data frames."""
    sheet = io.StringIO()
    out = csv.writer(sheet, lineterminator="\n")
    out.writerow(["table", "row", "kind", "runs", "dataset", "split", "metric", "value", "delta", "spread", "mark",
                  "comparable"])  # fmt: skip
    for table in result["tables"]:
        for row in table["rows"]:
            name = ", ".join(x for x in row["label"] if x)
            for i, c in enumerate(table["columns"]):
                if row["values"][i] is not None:
                    figures = [row[k][i] for k in ("values", "deltas", "spread", "marks")]
                    out.writerow([table["table"], name, row["kind"], " ".join(row["runs"]), *c.values(), *figures,
                                  row["comparable"]])  # fmt: skip
    return sheet.getvalue()
