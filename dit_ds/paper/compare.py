"""The paper's tables with one's own runs in them: where a row goes, what is best, how far from the paper it is."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dit_ds.errors import UserError
from dit_ds.paper import experiments
from dit_ds.paper.experiments import FOLDER, Experiment
from dit_ds.paper.scored_runs import NotEvaluated, Scored, read_run
from dit_ds.paper.tables import TABLES, Column, Table

_log = logging.getLogger("dit_ds")


@dataclass
class Line:
    """A row of what is shown.

    Attributes:
        kind: paper, run, or mean (of runs with the same settings).
        label: its leading cells.
        values, deltas, spread: by column; percent, percent points to the paper's row, and the sample standard deviation.
        scored: whose figures these are.
        comparable: whether it is ranked, and subtracted from.
        notes: footnotes.
    """

    kind: str
    label: list[str]
    values: dict[Column, float]
    scored: list[Scored] = field(default_factory=list)
    deltas: dict[Column, float] = field(default_factory=dict)
    spread: dict[Column, float] = field(default_factory=dict)
    marks: dict[Column, str] = field(default_factory=dict)
    comparable: bool = True
    notes: list[str] = field(default_factory=list)


def compare(runs: list[str], number: int | None = None, folder: str | Path = FOLDER) -> dict[str, Any]:
    """`dit-ds compare`: the tables that have a row with the settings of a run, or the one that is asked for.

    A run stands behind the paper's row of the same settings; in a table that is asked for at the end, where it has no
    such row. Without a number, runs that fit no table are in one without the paper's rows, with all others.

    Returns:
        `tables`, each with `table` (None for runs alone), `title`, `labels`, `columns`, `rows`, `notes`. A row's
        `values`, `deltas`, `spread` and `marks` (best, second) go by the columns, None where there is nothing; its
        `steps`, by the runs, say which step of it was evaluated on each split.
    Raises:
        UserError: no such table, no run, or none that was evaluated.
    """
    if number == 8:
        raise UserError("Table 8 is about memory, not about figures of runs: see dit-ds memory table8")
    rows = [e for e in experiments.experiments(number, folder) if e.table.number != 8]
    scored = _read(runs)
    fits = {id(s): [e for e in rows if e.settings == s.settings] for s in scored}
    numbers = [number] if number else sorted({e.table.number for found in fits.values() for e in found})
    tables = [_of_paper(TABLES[n], scored, fits, rows if number else None) for n in numbers]
    if not number and not all(fits.values()):
        tables.append(_alone(scored, fits, rows))
    return {"tables": tables}


def _read(runs: list[str]) -> list[Scored]:
    """All that were evaluated; of others a warning."""
    scored: list[Scored] = []
    missing: list[NotEvaluated] = []
    for run in dict.fromkeys(map(Path, runs)):
        try:
            scored += read_run(run)
        except NotEvaluated as e:
            missing.append(e)
    if not scored:
        raise missing[0]
    for e in missing:
        _log.warning(f"warning: left out: {e}")
    return scored


def _of_paper(
    table: Table, scored: list[Scored], fits: dict[int, list[Experiment]], others: list[Experiment] | None
) -> dict[str, Any]:
    """`others`: the table's experiments, to name the nearest one to a run that fits none; None leaves such runs out."""
    lines = []
    for row in table.rows:
        lines.append(paper := Line("paper", list(row.label), dict(row.values)))
        here = [(s, e) for s in scored for e in fits[id(s)] if e.table is table and e.row is row]
        mine = [_line(group, table.columns) for group in _side_by_side(here)]
        mine += _mean(mine)
        for line in mine:
            if line.comparable:
                line.deltas = {c: round(v - paper.values[c], 2) for c, v in line.values.items() if c in paper.values}
        lines += mine
    for s in scored if others else []:
        if not fits[id(s)]:
            lines.append(_line([(s, None)], table.columns, others))
    return _finished(table.number, table.title, table.labels, columns=table.columns, lines=lines, note=table.note)


def _alone(scored: list[Scored], fits: dict[int, list[Experiment]], rows: list[Experiment]) -> dict[str, Any]:
    found = dict.fromkeys(c for s in scored for c in s.scores)
    columns = tuple(sorted(found, key=lambda c: (c.dataset, c.split != "val", c.split)))
    lines = [_line([(s, (fits[id(s)] or [None])[0])], columns, rows) for s in scored]
    return _finished(
        None, "All runs", ("Run",), columns=columns, lines=lines, note="no table of the paper has a row for some"
    )


def _side_by_side(here: list[tuple[Scored, Experiment]]) -> Iterable[list[tuple[Scored, Experiment]]]:
    """Runs on several datasets share a row, as in Table 7; more than one on a dataset (of other seeds) have their own."""
    by_dataset: dict[str, list[tuple[Scored, Experiment]]] = {}
    for s, e in here:
        by_dataset.setdefault(e.dataset, []).append((s, e))
    return ([pair for pair in group if pair] for group in zip_longest(*by_dataset.values()))


def _line(
    group: list[tuple[Scored, Experiment | None]], columns: tuple[Column, ...], others: Iterable[Experiment] = ()
) -> Line:
    """The row of a run, or of runs on several datasets."""
    values = {c: v for s, _ in group for c, v in s.scores.items() if c in columns}
    name = " + ".join(s.run + ("" if s.prompt == "text" else f" ({s.prompt})") for s, _ in group)
    line = Line("run", [f"> {name}"], values, [s for s, _ in group])
    line.comparable = all(s.comparable for s, _ in group)
    for s, experiment in group:
        line.notes += [f"{s.run}: {note}" for note in s.notes]
        if experiment is None:
            line.notes.append(f"{s.run}: no row has its settings; {_nearest(s.settings, others)}")
        elif changed := experiments.differences(s.config, experiment.config):
            line.notes.append(f"{s.run} differs from {experiment.path} in {', '.join(changed)}")
    return line


def _nearest(settings: dict[str, Any], others: Iterable[Experiment]) -> str:
    """The row with the fewest other settings, and which they are."""

    def unlike(e: Experiment) -> list[str]:
        return [k for k in settings | e.settings if settings.get(k) != e.settings.get(k)]

    nearest = min(others, key=lambda e: len(unlike(e)))
    other = ", ".join(f"{k} {_text(nearest.settings.get(k))} for {_text(settings.get(k))}" for k in unlike(nearest))
    return f"nearest is Table {nearest.table.number}'s {nearest.row.name} with {other}"


def _text(value: Any) -> str:
    return "+".join(value) if isinstance(value, list) else str(value).lower()


def _mean(lines: list[Line]) -> list[Line]:
    """Of runs that differ in nothing but seeds and what is like them: the mean, and how far they spread."""
    alike: list[list[Line]] = []
    for line in lines:
        for group in alike:
            if all(not experiments.differences(a.config, b.config) for a, b in zip(line.scored, group[0].scored)):
                group.append(line)
                break
        else:
            alike.append([line])
    return [_mean_of(group) for group in alike if len(group) > 1 and all(line.comparable for line in group)]


def _mean_of(lines: list[Line]) -> Line:
    each = {c: [line.values[c] for line in lines] for c in lines[0].values if all(c in line.values for line in lines)}
    line = Line("mean", [f"> mean of {len(lines)}"], {c: round(statistics.fmean(v), 2) for c, v in each.items()})
    line.scored = [s for one in lines for s in one.scored]
    line.spread = {c: round(statistics.stdev(v), 2) for c, v in each.items()}
    return line


def mark(lines: list[Line], columns: Iterable[Column]) -> None:
    """Mark the best and the second best of each column; those that tie alike. Means and what can't be compared aside."""
    ranked = [line for line in lines if line.kind != "mean" and line.comparable]
    for c in columns:
        order = sorted({line.values[c] for line in ranked if c in line.values}, reverse=True) if c.is_score else []
        for line in ranked:
            for value, name in zip(order, ("best", "second")):
                if line.values.get(c) == value:
                    line.marks[c] = name


def _finished(
    number: int | None,
    title: str,
    labels: tuple[str, ...],
    columns: tuple[Column, ...],
    lines: list[Line],
    note: str,
) -> dict[str, Any]:
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
