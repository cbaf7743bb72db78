"""`dit-ds report`: one HTML file about one or more runs that needs no network."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_ds import __version__
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, refuse_overwriting
from dit_ds.pages.html import render_report
from dit_ds.pages.run_folder import RunFolder, cut, flatten, read_run_folder, short_names
from dit_ds.paper import compare, compare_report
from dit_ds.visualize.titles import title_of

if TYPE_CHECKING:
    from dit_ds.pages.examples import Gallery

_MAIN_TABLE = 1  # of the paper, for runs with settings that none of its rows has


def write_report(
    paths: list[str],
    out: str,
    *,
    split: str | None = None,
    data_root: str | None = None,
    looked_at: int = 128,
    shown: int = 6,
    table: int | None = None,
    configs: str | Path | None = None,
) -> dict[str, Any]:
    """Write a page with curves, the paper's tables, predictions, throughput, memory and configuration of runs.

    What is missing of a run is said in the page: predictions need its checkpoint and its shards, tables an evaluation.

    Args:
        paths: runs' folders.
        out: HTML file.
        split, data_root, looked_at, shown: as for `make_galleries`; no predictions where `looked_at` is 0.
        table: of the paper; by default those that have a row of a run's settings, or Table 1.
        configs: the paper's configurations; by default the package's.
    Returns:
        `out`, `bytes`, `runs`, and `missing`, a line for each thing that the page lacks.
    Raises:
        UserError: a folder is no run's, or `out` can't be written.
    """
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} is no page's name: let it end in .html")
    refuse_overwriting(out)
    paths = list(dict.fromkeys(paths))
    runs = [read_run_folder(path, name) for path, name in zip(paths, short_names(paths))]
    tables, without_tables = _tables(paths, table, configs)
    galleries: list[Gallery] = []
    without_pictures: list[str] = []
    if looked_at:
        from dit_ds.pages.examples import make_galleries  # PyTorch, which nothing else of a report needs

        named = [(run.name, run.path) for run in runs]
        galleries, without_pictures = make_galleries(
            named, split, data_root=data_root, looked_at=looked_at, shown=shown
        )
    page = render_report(
        names=[run.name for run in runs],
        version=__version__,
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        facts=_facts(runs),
        curves=[{"name": run.name, "train": run.train, "eval": run.evaluated} for run in runs],
        thinned=[f"{run.name}: a point is the mean of {run.lines} lines" for run in runs if run.lines > 1],
        tables=tables,
        without_tables=without_tables,
        galleries=galleries,
        without_pictures=without_pictures,
        configuration=_rows([flatten(run.config.model_dump(mode="json")) for run in runs], _defaults()),
        environment=_rows([run.environment for run in runs]),
    ).encode()
    with atomic_write(out) as f:
        f.write(page)
    return {"out": out, "bytes": len(page), "runs": paths, "missing": without_tables + without_pictures}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result of `write_report` as lines for people."""
    lacks = [f"not in it: {line}" for line in result["missing"]]
    return [*lacks, f"wrote {result['out']} ({result['bytes'] / 1e6:.1f} MB): open it in a browser"]


def _tables(paths: list[str], number: int | None, configs: str | Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The tables that the template draws, and why there are none."""
    try:
        found = compare.compare(paths, number, configs)["tables"]
        if not number and not any(table["table"] for table in found):
            found = compare.compare(paths, _MAIN_TABLE, configs)["tables"] + found
    except UserError as e:
        return [], [str(e)]
    return [_table(table) for table in found], []


def _table(table: dict[str, Any]) -> dict[str, Any]:
    columns = range(len(table["columns"]))
    rows = [
        {
            "kind": row["kind"],
            "labels": compare_report.label(row),
            "cells": [(*compare_report.number(row, i, table["columns"][i]), row["marks"][i] or "") for i in columns],
        }
        for row in table["rows"]
    ]
    return {
        "title": compare_report.title(table),
        "labels": len(table["labels"]),
        "heads": compare_report.heads(table),
        "rows": rows,
        "notes": table["notes"],
        "legend": compare_report.LEGEND,
    }


def _facts(runs: list[RunFolder]) -> list[tuple[str, list[str]]]:
    """What a run is and how it went: a row's name, and each run's text."""
    rows = [(name, [cut(tell(run)) for run in runs]) for name, tell in _FACTS]
    return [(name, [text or "–" for text in texts]) for name, texts in rows if any(texts)]


def _best(metric: str) -> Callable[[RunFolder], str]:
    def tell(run: RunFolder) -> str:
        found = run.best(metric)
        return f"{100 * found[0]:.2f} % (step {found[1]:,})" if found else ""

    return tell


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _hardware(run: RunFolder) -> str:
    what = next((v for k in ("gpu", "cpu") if (v := run.environment.get(k, "null")) != "null"), "")
    return f"{run.environment.get('world_size', '?')} × {what}" if what else ""


def _data(run: RunFolder) -> str:
    d = run.config.data
    name = ", ".join(d.mixture) or f"{d.dataset}/{d.split_by}"
    return f"{name}, {d.image_size} pixels"


_FACTS: list[tuple[str, Callable[[RunFolder], str]]] = [
    ("folder", lambda run: run.path),
    ("model", lambda run: f"{title_of(run.config)}, {run.config.model.size}"),
    ("trained on", _data),
    ("batch, rate", lambda run: f"{run.config.train.batch_size}, {run.config.train.lr:g}"),
    ("ZeRO", lambda run: Path(run.config.deepspeed.config).stem),
    ("ranks", _hardware),
    ("steps", lambda run: _figure(run.last("step"), "{:,.0f}")),
    ("loss, at last", lambda run: _figure(run.last("loss"), "{:.4f}")),
    ("best mIoU", _best("miou")),
    ("best oIoU", _best("oiou")),
    ("best gIoU", _best("giou")),
    ("samples a second, median", lambda run: _figure(run.typical("samples_per_second"), "{:.1f}")),
    ("tokens a second, median", lambda run: _figure(run.typical("tokens_per_second"), "{:,.0f}")),
    ("MFU, median", lambda run: _figure(run.typical("mfu"), "{:.1%}")),
    ("seconds a step, median", lambda run: _figure(run.typical("step_seconds_p50"), "{:.3f}")),
    ("waiting for data, median", lambda run: _figure(run.typical("data_wait"), "{:.1%}")),
    ("peak memory of a rank", lambda run: _figure(run.largest("peak_memory_gib"), "{:.2f} GiB")),
    ("reserved", lambda run: _figure(run.largest("reserved_memory_gib"), "{:.2f} GiB")),
    ("steps skipped", lambda run: _figure(run.last("skipped_steps"), "{:.0f}")),
]


def _defaults() -> dict[str, str]:
    return flatten(RunConfig().model_dump(mode="json"))


def _rows(values: list[dict[str, str]], usual: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """A row for each key of any run.

    Args:
        usual: defaults.
    Returns:
        `key`, `values` of the runs, `differs` among the runs, `changed` from the default.
    """
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    rows = []
    for key in keys:
        texts = [of_run.get(key, "–") for of_run in values]
        changed = usual is not None and any(text != usual.get(key) for text in texts)
        rows.append({"key": key, "values": texts, "differs": len(set(texts)) > 1, "changed": changed})
    return rows
