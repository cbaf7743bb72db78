"""Short real trainings of the most promising candidates, one after another, each in processes of its own.

A trial's folder is its run's: `OUT/trials/NAME`. `trial.json` is written when it is over, so that one that was
interrupted is not there and is made again; one that failed (out of memory, a crash, a refusal) is a result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.errors import Interrupted, RunFailed, UserError
from dit_ds.files import read_json, write_json
from dit_ds.planning.tune.candidates import Candidate
from dit_ds.planning.tune.output import write_run
from dit_ds.planning.tune.search import ScoredCandidate, SearchResult

_log = logging.getLogger("dit_ds")
_TRY_AGAIN = 75  # a training that a signal stopped
_REFUSED = 2  # a request that was wrong
_GRACE = 200  # seconds for a training to stop when asked to


@dataclass(frozen=True)
class Trials:
    """How trials are made.

    Attributes:
        folder: `OUT/trials`.
        count: of candidates that are tried.
        steps: optimizer steps of each.
        launch: the command before `python -m dit_ds.cli train`, as words; it starts a rank on each GPU.
        again: whether failed ones are tried again.
    """

    folder: Path
    count: int
    steps: int
    launch: tuple[str, ...] = ()
    again: bool = False


def launcher(launch: str | None, nodes: int, gpus: int) -> tuple[str, ...]:
    """The words that start the ranks.

    Raises:
        UserError: several nodes, and nobody who starts ranks on them.
    """
    if launch is not None:
        return (*shlex.split(launch), sys.executable, "-m")
    if nodes > 1:
        raise UserError("--measure on several nodes needs a launcher: submit slurm/tune.sbatch, or give --launch")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus))
    return (sys.executable, *(torchrun if gpus > 1 else ()), "-m")


def promising(rows: list[ScoredCandidate], count: int) -> list[ScoredCandidate]:
    """The fastest that fit; those that differ in their buckets alone only once."""
    seen, found = set(), []
    for row in rows:
        key = tuple((k, v) for k, v in row.candidate.choices().items() if k != "bucket")
        if row.fits and key not in seen:
            seen.add(key)
            found.append(row)
    return found[:count]


def measure(found: SearchResult, trials: Trials, config_path: str, config: RunConfig, ds: dict[str, Any]) -> None:
    """Try the most promising ones; the fastest of them becomes the chosen one.

    Raises:
        Interrupted: a signal came; what is finished is kept.
        RunFailed: every trial failed.
    """
    tried = promising(found.rows, trials.count)
    for i, row in enumerate(tried, 1):
        row.trial = _trial(row.candidate, trials, config_path, config, ds)
        what = row.trial.get("error") or f"{row.trial['samples_per_second']:.1f} samples/s"
        _log.info(f"trial {i} of {len(tried)}: {row.candidate.name}: {what}")
    good = [r for r in tried if r.trial and r.trial["status"] == 0]
    if not good:
        raise RunFailed(f"all {len(tried)} trials failed, the first: {tried[0].trial['error']}")
    rank(found)


def rank(found: SearchResult) -> None:
    """Order by what was measured, then by what was predicted; what failed comes after what fits."""

    def order(row: ScoredCandidate) -> tuple:
        if row.trial and row.trial["status"] == 0:
            return (0, -row.trial["samples_per_second"])
        return (1 if row.fits and not row.trial else 2 if row.trial else 3, 0)

    found.rows.sort(key=order)  # stable: within each, as predicted
    found.chosen = best = found.rows[0]
    rate = best.trial["samples_per_second"]
    for row in found.rows:
        if row is best:
            row.why = f"chosen: the fastest of the trials, {rate:.1f} samples/s measured"
        elif row.trial and row.trial["status"]:
            row.why = f"failed in its trial: {row.trial['error']}"
        elif row.trial:
            row.why = f"measured {row.trial['samples_per_second'] / rate - 1:+.1%} against the chosen one"
        elif row.fits:
            row.why = f"not tried; by the prediction {row.why}"


def _trial(c: Candidate, trials: Trials, config_path: str, config: RunConfig, ds: dict[str, Any]) -> dict[str, Any]:
    """The result of one, made now or before."""
    folder = trials.folder / c.name
    overrides = write_run(folder, c, config_path, config, ds)
    of = _fingerprint(folder, config, trials)
    if (folder / "trial.json").exists():
        before = read_json(folder / "trial.json", "trial")
        # a refusal may be due to what has been put right since: a missing file, a busy machine
        final = before["status"] == 0 or (before["status"] != _REFUSED and not trials.again)
        if before["of"] == of and final:
            return before
    _clear(folder)
    command = [
        *trials.launch, "dit_ds.cli", "train", "--config", str(overrides), "--run_dir", str(folder),
        "--train.max_steps", str(trials.steps), "--train.epochs", "1000000",
        "--log.every_steps", str(max(1, trials.steps // 4)), "--log.tensorboard", "false", "--eval.every_epochs", "0",
        "--checkpoint.every_epochs", "1000000", "--checkpoint.frozen", "leave_out",
    ]  # fmt: skip
    start = time.monotonic()
    with open(folder / "trial.log", "wb") as log:
        status = _run(command, log)
    status = _of_ranks(folder / "trial.log", status)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # large, and of no use
    if status == _TRY_AGAIN:
        raise Interrupted(f"{c.name} was stopped by a signal: the same command goes on with it")
    result = {"of": of, "status": status, "seconds": round(time.monotonic() - start, 1)}
    result |= {"error": _error(folder / "trial.log", status)} if status else _figures(folder)
    write_json(folder / "trial.json", result)
    return result


def _of_ranks(log: Path, status: int) -> int:
    """The training's own status where a launcher ended with another: of the rank that, it reports, failed first."""
    report = r"^Root Cause.*\n(?:.*\n){0,6}? *exitcode *: (\d+) "  # torchrun's, which itself ends with 1
    reported = [int(code) for code in re.findall(report, log.read_text(errors="replace"), re.MULTILINE)]
    return reported[-1] if reported and status == 1 and reported[-1] in (_REFUSED, _TRY_AGAIN) else status


def _fingerprint(folder: Path, config: RunConfig, trials: Trials) -> str:
    """Of all that a trial's result depends on."""
    what = [config.model_dump_json(), (folder / "deepspeed.json").read_text(), str(trials.steps), *trials.launch]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]


def _clear(folder: Path) -> None:
    """Leave what the next trial starts from only."""
    for path in folder.iterdir():
        if path.name in ("overrides.yaml", "deepspeed.json"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(command: list[str], log: Any) -> int:
    """A command's status, 128 + the signal where one ended it.

    Raises:
        Interrupted: this process was asked to stop; the command was, too, and has.
    """
    with _terminated_as_interrupt():
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    return status if status >= 0 else 128 - status


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """TERM and USR2 raise `Interrupted` inside."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: the same command goes on")

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _figures(folder: Path) -> dict[str, Any]:
    """Samples a second and memory of a finished trial."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    steady = lines[1:] or lines  # the first window holds what happens once: allocation, compilation, autotuning
    return {
        "samples_per_second": statistics.median(line["samples_per_second"] for line in steady),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }


_ERRORS = (r"^dit-ds.*?error: (.*)", r"^\S*?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")


def _error(log: Path, status: int) -> str:
    """The line that says why, as far as one does."""
    text = log.read_text(errors="replace")
    for pattern in _ERRORS:
        if lines := re.findall(pattern, text, re.MULTILINE):
            return " ".join(lines[0].split())[:300]
    died = f"ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{died}{': ' if last else ''}{' '.join(last.split())[:200]}"
