"""`dit-ds experiments sweep`: a run for each line of a file of overrides, as SLURM jobs, and one table of them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.paper.planned_run import Evaluation, Run
from dit_ds.paper.submit import Report, Request, submit_runs

_LONGEST = 80  # letters of the values in a folder's name


def submit_sweep(
    file: str | Path, config: str, request: Request, *, overrides: list[str], splits: list[str]
) -> dict[str, Any]:
    """Train a run for each line of overrides, evaluate it, and write `sweep.md` in the folder of the runs.

    Args:
        file: a line a run, as `--train.lr 1e-4 --train.batch_size 16`; blank lines and those that begin with # are none.
        config: the YAML that the lines override.
        overrides: of every run; a line's come after them.
        splits: to evaluate beside what each training evaluates itself.
    Returns:
        As of `submit_runs`.
    Raises:
        UserError: as of `submit_runs`, or a line that can't be read, names no configuration or repeats another.
    """
    runs: dict[str, Run] = {}
    numbers: dict[str, int] = {}
    for number, words in _lines(Path(file)):
        folder = request.runs / _folder_name(number, words, overrides)
        arguments = [*overrides, *words, "--run_dir", str(folder)]
        try:
            resolved = load_config(config, arguments)
        except UserError as e:
            raise UserError(f"{file}, line {number}: {e}") from None
        same = _without_folder(resolved)
        if same in runs:
            raise UserError(f"{file}, line {number} is the run of line {numbers[same]}: remove one")
        evaluations = [Evaluation(split, resolved.data.default_prompt) for split in splits]
        numbers[same], runs[same] = number, Run(folder, resolved, ("--config", config, *arguments), evaluations)
    if not runs:
        raise UserError(f"{file} has no overrides: write a line a run, as --train.lr 1e-4 --train.batch_size 16")
    report = Report(request.runs / "sweep.md", list(runs.values()), ("--keys",))
    return submit_runs("sweep", list(runs.values()), [report], request)


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Each line's number, from 1 on, and its words, quoted as in a shell; nothing in it is expanded or run."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the overrides {file} ({getattr(e, 'strerror', None) or 'not text'})") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            words = shlex.split(line) if line.strip() and not line.lstrip().startswith("#") else []
        except ValueError as e:
            raise UserError(f"{file}, line {number}: {str(e).lower()}: quote it as in a shell") from None
        if any(word.partition("=")[0] == "--run_dir" for word in words):
            raise UserError(f"{file}, line {number}: --run_dir is each run's own: name the folder of all with --runs")
        if words:
            yield number, words


def _folder_name(number: int, words: list[str], shared: list[str]) -> str:
    """Of a line's run: its number and values for people, and a digest of all that it overrides, so that a line that was
    changed is another run."""
    text = " ".join(word.rpartition(".")[2] if word.startswith("--") else word for word in words).replace("--", "")
    values = re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:_LONGEST].strip("_")
    digest = hashlib.sha256(json.dumps([words, shared]).encode()).hexdigest()[:6]
    return f"{number:02d}_{values}_{digest}"


def _without_folder(config: RunConfig) -> str:
    return config.model_dump_json(exclude={"run_dir"})
