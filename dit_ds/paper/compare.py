"""The paper's tables with the user's runs in them: placed, ranked, and compared with the paper's figures."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.paper import experiments
from dit_ds.paper.experiments import Experiment
from dit_ds.paper.scored_runs import NoRun, NotEvaluated, ScoredRun, read_run
from dit_ds.paper.tables import TABLES, Column, Table

_log = logging.getLogger("dit_ds")
_PATHS = ("run_dir", "data.root")  # keys that say where a run lies, not what it is


@dataclass
class Line:
    """A row of a resulting table.

    Attributes:
        kind: paper, run, or mean (of runs with the same settings).
        label: the leading cells.
        values: percent, by column.
        scored: the runs that the figures are of.
        deltas: percentage points to the paper's row, by column.
        spread: sample standard deviation of a mean's runs, by column.
        marks: best or second, by column.
        comparable: whether the row is ranked, and the paper's figures subtracted from it.
        notes: footnotes.
    """

    kind: str
    label: list[str]
    values: dict[Column, float]
    scored: list[ScoredRun] = field(default_factory=list)
    deltas: dict[Column, float] = field(default_factory=dict)
    spread: dict[Column, float] = field(default_factory=dict)
    marks: dict[Column, str] = field(default_factory=dict)
    comparable: bool = True
    notes: list[str] = field(default_factory=list)


def compare(
    runs: list[str],
    number: int | None = None,
    folder: str | Path | None = None,
    *,
    manifest: str | None = None,
    skip_missing: bool = False,
) -> dict[str, Any]:
    """`dit-ds compare`: the tables that have a row with the settings of a run, or the one of a given number.

    A run follows the paper's row of the same settings; in a table given by number, a run without such a row is at the
    end. Without a number, if some run fits no table, another table lists all runs, without the paper's rows.

    Args:
        runs: run folders.
        number: of the paper's table.
        folder: of the paper's configurations; by default the package's.
        manifest: see `read_run`.
        skip_missing: of runs that are not there, and of those without a result, the tables' notes say so.
    Returns:
        `tables`, each with `table` (None for runs alone), `title`, `labels`, `columns`, `rows`, `notes`. A row's
        `values`, `deltas`, `spread` and `marks` (best, second) are in the columns' order, None where there is no value;
        its `steps` have, for each of its `runs`, the step that was evaluated on each split.
    Raises:
        UserError: no such table, no run, or no run that was evaluated.
    """
    if number == 8:
        raise UserError("Table 8 is about memory, not about figures of runs: see dit-ds memory table8")
    rows = [e for e in experiments.experiments(number, folder) if e.table.number != 8]
    scored, missing = _read(runs, manifest, skip_missing)
    fits = {id(s): [e for e in rows if e.settings == s.settings] for s in scored}
    numbers = [number] if number else sorted({e.table.number for fitting in fits.values() for e in fitting})
    tables = [_with_paper(TABLES[n], scored, fits, rows if number else []) for n in numbers]
    if not number and not all(fits.values()):
        tables.append(_runs_only(scored, fits, rows))
    for table in tables if skip_missing else ():
        table["notes"] += [f"left out: {error}" for error in missing.values()]
    return {"tables": tables}


def by_keys(runs: list[str], manifest: str | None = None, skip_missing: bool = False) -> dict[str, Any]:
    """`dit-ds compare --keys`: one table of all runs, with the configuration's keys in which they differ.

    A run without a result has a row, too. Runs are ranked among each other if the same expressions were evaluated.

    Args:
        runs, manifest, skip_missing: as of `compare`.
    Returns:
        What `compare` does.
    Raises:
        UserError: as of `compare`.
    """
    scored, missing = _read(runs, manifest, skip_missing)
    configs = {
        run: experiments.flat_config(load_config(run / "config.yaml"))
        for run in dict.fromkeys(map(Path, runs))
        if (run / "config.yaml").exists()
    }
    known = list(configs.values())
    keys = [key for key in known[0] if key not in _PATHS and any(c[key] != known[0][key] for c in known)]
    alike = all(s.expressions == scored[0].expressions for s in scored)
    lines = []
    for run in dict.fromkeys(map(Path, runs)):
        values = [_value(configs[run][key]) for key in keys] if run in configs else ["-"] * len(keys)
        if run in missing:
            lines.append(Line("run", [f"> {run}", *values], {}, notes=[str(missing[run])]))
        for s in (s for s in scored if s.run == str(run)):
            name = s.run + ("" if s.prompt == "text" else f" ({s.prompt})")
            notes = [f"{s.run}: {note}" for note in s.notes]
            lines.append(Line("run", [f"> {name}", *values], s.scores, [s], comparable=alike, notes=notes))
    note = "" if alike else "not ranked: not of the same expressions"
    columns = _columns(scored)
    return {"tables": [_as_dict(lines, number=None, title="Runs", labels=("Run", *keys), columns=columns, note=note)]}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(
    runs: list[str], manifest: str | None, skip_missing: bool
) -> tuple[list[ScoredRun], dict[Path, NotEvaluated | NoRun]]:
    """The runs that were evaluated; and of the others, each with a warning, why not.

    Raises:
        NotEvaluated, NoRun: none was.
        NoRun: a folder is no run's, and these are not skipped.
    """
    scored: list[ScoredRun] = []
    missing: dict[Path, NotEvaluated | NoRun] = {}
    for run in dict.fromkeys(map(Path, runs)):
        try:
            scored += read_run(run, manifest)
        except (NotEvaluated, NoRun) as e:
            if isinstance(e, NoRun) and not skip_missing:
                raise
            missing[run] = e
    if not scored:
        raise next(iter(missing.values()))
    for error in missing.values():
        _log.warning(f"warning: left out: {error}")
    return scored, missing


def _with_paper(
    table: Table, scored: list[ScoredRun], fits: dict[int, list[Experiment]], others: list[Experiment]
) -> dict[str, Any]:
    """A table of the paper with the runs that fit it.

    Args:
        fits: the experiments with a run's settings, by the run's `id`.
        others: the table's experiments; given these, runs that fit no experiment are at the end, with the nearest named.
    """
    lines = []
    for row in table.rows:
        lines.append(paper := Line("paper", list(row.label), dict(row.values)))
        same = [(s, e) for s in scored for e in fits[id(s)] if e.table is table and e.row is row]
        runs = [_line(group, table.columns) for group in _by_row(same)]
        runs += _means(runs)
        for line in runs:
            if line.comparable:
                line.deltas = {c: round(v - paper.values[c], 2) for c, v in line.values.items() if c in paper.values}
        lines += runs
    if others:
        lines += [_line([(s, None)], table.columns, others) for s in scored if not fits[id(s)]]
    return _as_dict(
        lines, number=table.number, title=table.title, labels=table.labels, columns=table.columns, note=table.note
    )


def _runs_only(scored: list[ScoredRun], fits: dict[int, list[Experiment]], rows: list[Experiment]) -> dict[str, Any]:
    columns = _columns(scored)
    lines = [_line([(s, next(iter(fits[id(s)]), None))], columns, rows) for s in scored]
    note = "no table of the paper has a row for some"
    return _as_dict(lines, number=None, title="All runs", labels=("Run",), columns=columns, note=note)


def _columns(scored: list[ScoredRun]) -> tuple[Column, ...]:
    """All that were evaluated."""
    evaluated = dict.fromkeys(c for s in scored for c in s.scores)
    return tuple(sorted(evaluated, key=lambda c: (c.dataset, c.split != "val", c.split)))


def _by_row(runs: list[tuple[ScoredRun, Experiment]]) -> Iterable[list[tuple[ScoredRun, Experiment]]]:
    """Group the runs of an experiment by rows: those on different datasets share one, as in Table 7; several runs on one
    dataset (with different seeds) have a row each."""
    by_dataset: dict[str, list[tuple[ScoredRun, Experiment]]] = {}
    for s, e in runs:
        by_dataset.setdefault(e.dataset, []).append((s, e))
    return ([pair for pair in group if pair] for group in zip_longest(*by_dataset.values()))


def _line(
    group: Sequence[tuple[ScoredRun, Experiment | None]], columns: tuple[Column, ...], others: Iterable[Experiment] = ()
) -> Line:
    """The row of a run, or of runs on several datasets.

    Args:
        others: experiments among which the nearest to a run without one is looked for.
    """
    values = {c: v for s, _ in group for c, v in s.scores.items() if c in columns}
    name = " + ".join(s.run + ("" if s.prompt == "text" else f" ({s.prompt})") for s, _ in group)
    line = Line("run", [f"> {name}"], values, [s for s, _ in group])
    line.comparable = not any(s.unlike_paper for s, _ in group)
    for s, experiment in group:
        line.notes += [f"{s.run}: {note}" for note in s.unlike_paper + s.notes]
        if experiment is None:
            line.notes.append(f"{s.run}: no row has its settings; {_nearest(s.settings, others)}")
        elif changed := experiments.differences(s.config, experiment.config):
            line.notes.append(f"{s.run} differs from {experiment.path} in {', '.join(changed)}")
    return line


def _nearest(settings: dict[str, Any], others: Iterable[Experiment]) -> str:
    """The experiment that differs in the fewest settings, and the settings in which it does."""

    def different(e: Experiment) -> list[str]:
        return [k for k in settings | e.settings if settings.get(k) != e.settings.get(k)]

    nearest = min(others, key=lambda e: len(different(e)))
    changes = (f"{k} {_text(nearest.settings.get(k))} for {_text(settings.get(k))}" for k in different(nearest))
    return f"nearest is Table {nearest.table.number}'s {nearest.row.name} with {', '.join(changes)}"


def _text(value: Any) -> str:
    return "+".join(value) if isinstance(value, list) else str(value).lower()


def _means(lines: list[Line]) -> list[Line]:
    """The mean and the spread of runs that differ only in keys that `experiments.differences` ignores, as the seed."""
    groups: list[list[Line]] = []
    for line in lines:
        for group in groups:
            if all(not experiments.differences(a.config, b.config) for a, b in zip(line.scored, group[0].scored)):
                group.append(line)
                break
        else:
            groups.append([line])
    return [_mean(group) for group in groups if len(group) > 1 and all(line.comparable for line in group)]


def _mean(lines: list[Line]) -> Line:
    each = {c: [line.values[c] for line in lines] for c in lines[0].values if all(c in line.values for line in lines)}
    line = Line("mean", [f"> mean of {len(lines)}"], {c: round(statistics.fmean(v), 2) for c, v in each.items()})
    line.scored = [s for one in lines for s in one.scored]
    line.spread = {c: round(statistics.stdev(v), 2) for c, v in each.items()}
    return line


def mark(lines: list[Line], columns: Iterable[Column]) -> None:
    """Mark the best and the second best of each column, ties alike; means and rows that are not comparable get no mark."""
    ranked = [line for line in lines if line.kind != "mean" and line.comparable]
    for c in columns:
        order = sorted({line.values[c] for line in ranked if c in line.values}, reverse=True) if c.is_score else []
        for line in ranked:
            for value, name in zip(order, ("best", "second")):
                if line.values.get(c) == value:
                    line.marks[c] = name


def _as_dict(
    lines: list[Line],
    *,
    number: int | None,
    title: str,
    labels: tuple[str, ...],
    columns: tuple[Column, ...],
    note: str,
) -> dict[str, Any]:
    """A table as `compare` returns it."""
    mark(lines, columns)
    notes = list(dict.fromkeys(note for line in lines for note in line.notes))
    rows = [
        {
            "kind": line.kind,
            "label": line.label + [""] * (len(labels) - len(line.label)),
            "runs": [s.run for s in line.scored],
            "steps": [s.steps for s in line.scored],
            **{name: [getattr(line, name).get(c) for c in columns] for name in ("values", "deltas", "spread", "marks")},
            "comparable": line.comparable,
            "notes": [notes.index(note) + 1 for note in line.notes],
        }
        for line in lines
    ]
    return {
        "table": number, "title": title, "note": note, "labels": list(labels),
        "columns": [c._asdict() for c in columns], "rows": rows, "notes": notes,
    }  # fmt: skip
