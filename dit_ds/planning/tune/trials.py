"""Short real trainings of the most promising candidates, one after another, each in its own processes.

The run folder of a trial is `OUT/trials/NAME`. `trial.json` is written at its end: an interrupted trial has none and is
repeated; a failed one (out of memory, a crash, a refusal) is a result.
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
from dit_ds.data.progress import progress_bar
from dit_ds.errors import Interrupted, RunFailed, UserError
from dit_ds.files import read_json, write_json
from dit_ds.planning.tune.candidates import Candidate
from dit_ds.planning.tune.output import write_run
from dit_ds.planning.tune.search import ScoredCandidate, SearchResult
from dit_ds.processes import die_with_parent

_log = logging.getLogger("dit_ds")
_INTERRUPTED = 75  # exit status of a training that a signal stopped
_REFUSED = 2  # exit status of a wrong request
_GRACE = 200  # seconds for a training to stop after SIGTERM


@dataclass(frozen=True)
class Trials:
    """How trials are made.

    Attributes:
        folder: `OUT/trials`.
        count: candidates to try.
        steps: optimizer steps of each.
        launch: the command up to `dit_ds.cli train`, as a list of arguments; it starts a rank on each GPU.
        retry_failed: repeat trials that failed before.
    """

    folder: Path
    count: int
    steps: int
    launch: tuple[str, ...] = ()
    retry_failed: bool = False


def launcher(launch: str | None, nodes: int, gpus: int) -> tuple[str, ...]:
    """The command that starts the ranks, up to the module's name.

    Args:
        launch: a user's command, as `srun --ntasks-per-node 8`; by default torchrun, or plain Python for one GPU.
    Raises:
        UserError: several nodes without a launch command.
    """
    if launch is not None:
        return (*shlex.split(launch), sys.executable, "-m")
    if nodes > 1:
        raise UserError("--measure on several nodes needs a launcher: submit slurm/tune.sbatch, or give --launch")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus))
    return (sys.executable, *(torchrun if gpus > 1 else ()), "-m")


def promising(scored: list[ScoredCandidate], count: int) -> list[ScoredCandidate]:
    """The fastest candidates that fit; of those that differ in the bucket size alone only the first."""
    seen, chosen = set(), []
    for s in scored:
        key = tuple((k, v) for k, v in s.candidate.choices().items() if k != "bucket")
        if s.fits and key not in seen:
            seen.add(key)
            chosen.append(s)
    return chosen[:count]


def measure(result: SearchResult, trials: Trials, config_path: str, config: RunConfig, ds: dict[str, Any]) -> None:
    """Try the most promising candidates; the fastest of them becomes the chosen one.

    Args:
        config_path, config, ds: as of `output.write_run`.
    Raises:
        Interrupted: a signal came; finished trials are kept.
        RunFailed: every trial failed.
    """
    tried = promising(result.candidates, trials.count)
    for i, s in enumerate(progress_bar(tried, "try", unit="trial", mininterval=0), 1):
        s.trial = _trial(s.candidate, trials, config_path, config, ds)
        outcome = s.failure or f"{s.trial['samples_per_second']:.1f} samples/s"
        _log.info(f"trial {i} of {len(tried)}: {s.candidate.name}: {outcome}")
    rank(result, tried)


def rank(result: SearchResult, tried: list[ScoredCandidate]) -> None:
    """Order by measured speed, then by predicted speed; candidates whose trial failed come after those that fit.

    Raises:
        RunFailed: every trial failed.
    """

    def order(s: ScoredCandidate) -> tuple[int, float]:
        if s.measured is not None:
            return (0, -s.measured)
        return (1 if s.fits and not s.trial else 2 if s.trial else 3, 0)

    result.candidates.sort(key=order)  # stable: otherwise as predicted
    best = result.candidates[0]
    if best.measured is None:
        raise RunFailed(f"all {len(tried)} trials failed, the first: {tried[0].failure}")
    result.chosen = best
    for s in result.candidates:
        if s is best:
            s.reason = f"chosen: the fastest of the trials, {best.measured:.1f} samples/s measured"
        elif s.failure is not None:
            s.reason = f"failed in its trial: {s.failure}"
        elif s.measured is not None:
            s.reason = f"measured {s.measured / best.measured - 1:+.1%} against the chosen one"
        elif s.fits:
            s.reason = f"not tried; by the prediction {s.reason}"


def _trial(c: Candidate, trials: Trials, config_path: str, config: RunConfig, ds: dict[str, Any]) -> dict[str, Any]:
    """The result of a candidate's trial, made now or before."""
    folder = trials.folder / c.name
    overrides = write_run(folder, c, config_path, config, ds)
    fingerprint = _fingerprint(folder, config, trials)
    if (folder / "trial.json").exists():
        before = read_json(folder / "trial.json", "trial")
        # the cause of a refusal may be gone: a missing file, a busy machine
        final = before["status"] == 0 or (before["status"] != _REFUSED and not trials.retry_failed)
        if before["of"] == fingerprint and final:
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
    status = _rank_status(folder / "trial.log", status)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # large and not needed
    if status == _INTERRUPTED:
        raise Interrupted(f"{c.name} was stopped by a signal: the same command goes on with it")
    result = {"of": fingerprint, "status": status, "seconds": round(time.monotonic() - start, 1)}
    result |= {"error": _error(folder / "trial.log", status)} if status else _figures(folder)
    write_json(folder / "trial.json", result)
    return result


def _rank_status(log: Path, status: int) -> int:
    """The exit status of the training's ranks, from that of its launcher.

    torchrun ends with 1 whatever its ranks end with, and reports the status of the first rank that failed.
    """
    report = r"^Root Cause.*\n(?:.*\n){0,6}? *exitcode *: (\d+) "
    reported = [int(code) for code in re.findall(report, log.read_text(errors="replace"), re.MULTILINE)]
    return reported[-1] if reported and status == 1 and reported[-1] in (_REFUSED, _INTERRUPTED) else status


def _fingerprint(folder: Path, config: RunConfig, trials: Trials) -> str:
    """A hash of everything that a trial's result depends on."""
    inputs = [config.model_dump_json(), (folder / "deepspeed.json").read_text(), str(trials.steps), *trials.launch]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


def _clear(folder: Path) -> None:
    """Remove everything but the files that the next trial starts from."""
    for path in folder.iterdir():
        if path.name in ("overrides.yaml", "deepspeed.json"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(command: list[str], log: Any) -> int:
    """Run a command; return its exit status, 128 + the signal if one ended it.

    Raises:
        Interrupted: this process got SIGTERM or SIGUSR2; the command has been stopped.
    """
    with _terminated_as_interrupt():
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
        )
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
    """In this context SIGTERM and SIGUSR2 raise `Interrupted`."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: the same command goes on")

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _figures(folder: Path) -> dict[str, Any]:
    """Samples a second and peak memory of a finished trial."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    steady = lines[1:] or lines  # the first window includes allocation, compilation and autotuning
    return {
        "samples_per_second": statistics.median(line["samples_per_second"] for line in steady),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }


_ERRORS = (r"^dit-ds.*?error: (.*)", r"^\S*?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")


def _error(log: Path, status: int) -> str:
    """The line of the log that says why a trial failed, else its last line."""
    text = log.read_text(errors="replace")
    for pattern in _ERRORS:
        if lines := re.findall(pattern, text, re.MULTILINE):
            return " ".join(lines[0].split())[:300]
    died = f"ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{died}{': ' if last else ''}{' '.join(last.split())[:200]}"
