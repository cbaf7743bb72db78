"""How a run is, from its folder alone: for people who wait for it, on whichever machine they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from dit_ds.checkpointing.reader import all_checkpoints
from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.files import json_lines, parse_json
from dit_ds.training.run_lock import INTERVAL, NAME, Owner

_SILENT = (
    6 * INTERVAL
)  # seconds without a heartbeat after which its process counts as gone, where it can't be looked up
_NUMBERS = ("time", "step", "total_steps", "world_size")  # in a start's line


def status(run_dir: str | Path) -> dict[str, Any]:
    """What `dit-ds status --json` prints.

    Returns:
        `run`; `state`: queued, running, done, stopped, interrupted, failed, refused, stalled, killed or none; `step`,
        `total_steps`, `epoch`, `loss`, `samples_per_second`; `seconds_left` of training, predicted from the last rate,
        and `finish`, the local time at which it then ends, both None unless it runs; `evaluation`, the last one;
        `best_step`; `checkpoint`: the newest one's `step` and its age in `seconds`; `local_checkpoint`: the
        step of the last one on the nodes' disks, None without `checkpoint.local`; `starts`, each with `time`, `step`,
        `host`, `job`, and `ended`: how and why it did; `slurm`: the job's state in SLURM's words.
    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no run in {folder}: it has no config.yaml yet; --watch waits for it")
    config, metrics = load_config(folder / "config.yaml"), list(json_lines(folder / "metrics.jsonl"))
    starts = _starts(folder / "events.jsonl")
    train: dict[str, Any] = next((x for x in reversed(metrics) if x.get("kind") == "train"), {})
    evaluation = next((x for x in reversed(metrics) if x.get("kind") == "eval"), None)
    last = starts[-1] if starts else {}
    job = _slurm(last.get("job", ""))
    state = _state(folder, last, job)
    step, total = max(_number(train.get("step")) or 0, last.get("step", 0)), last.get("total_steps")
    rate = _number(train.get("samples_per_second"))
    left = (total - step) * config.train.batch_size / rate if rate and total and state == "running" else None
    newest = next(reversed(all_checkpoints(folder)), None)
    return {
        "run": str(folder),
        "state": state,
        "step": step,
        "total_steps": total,
        "epoch": _number(train.get("epoch")),
        "loss": _number(train.get("loss")),
        "samples_per_second": rate,
        "seconds_left": None if left is None else round(left),
        "finish": None if left is None else time.strftime("%F %T", time.localtime(time.time() + left)),
        "evaluation": evaluation,
        "best_step": _best(folder),
        "checkpoint": newest and {
            "step": int(newest.name.rpartition("_")[2]),
            "seconds": round(time.time() - newest.stat().st_mtime),
        },
        "local_checkpoint": next((_number(x.get("step")) for x in reversed(metrics) if _is_local(x)), None),
        "starts": starts,
        "slurm": job,
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """The status for people: one screen."""
    r, total = result, result["total_steps"]
    share = f" of {total:,} ({r['step'] / total:.0%})" if total else ""
    out = [f"{r['run']}: {r['state']}" + (f", job {r['slurm']}" if r["slurm"] else "")]
    out.append(f"step        {r['step']:,}{share}" + ("" if r["epoch"] is None else f", epoch {r['epoch']}"))
    if r["samples_per_second"] is not None:
        loss = "not finite" if r["loss"] is None else f"{r['loss']:.4f}"
        out.append(f"loss        {loss}, {r['samples_per_second']:.1f} samples/s")
    if r["finish"]:
        out.append(
            f"finish      {r['finish']}, in {_duration(r['seconds_left'])} at this rate, evaluations not counted"
        )
    if r["evaluation"]:
        e = r["evaluation"]
        scores = ", ".join(f"{k} {e[k]:.4f}" for k in ("miou", "oiou", "giou") if _number(e.get(k)) is not None)
        out.append(f"evaluated   step {e.get('step')}: {scores}; best: step {r['best_step']}")
    c = r["checkpoint"]
    out.append(f"checkpoint  step {c['step']:,}, {_duration(c['seconds'])} ago" if c else "checkpoint  none yet")
    if r["local_checkpoint"] is not None:
        out.append(f"on disks    step {r['local_checkpoint']:,}, on the nodes' own")
    out.append(f"restarts    {max(0, len(r['starts']) - 1)}")
    for start in r["starts"][-6:]:
        out.append(f"  {time.strftime('%F %T', time.localtime(start['time']))} from step {start['step']:,} on "
                   f"{start['host']}: {start['ended'] or 'goes on'}")  # fmt: skip
    return out


def _is_local(line: dict[str, Any]) -> bool:
    return line.get("kind") == "local_save" and line.get("whole") is True


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _starts(path: Path) -> list[dict[str, Any]]:
    """Each start of the training, with how it ended, in words; None for the last one where nothing is known of its end."""
    starts: list[dict[str, Any]] = []
    for line in json_lines(path):
        if line.get("event") == "start" and all(_number(line.get(k)) is not None for k in _NUMBERS):
            if starts and starts[-1]["ended"] is None:
                starts[-1] |= {"ended": "killed, or its node was lost", "how": "killed"}
            who = {k: str(line.get(k) or "") for k in ("host", "job")}
            starts.append({k: line[k] for k in _NUMBERS} | who | {"ended": None, "how": None})
        elif line.get("event") == "end" and starts:
            how, why = str(line.get("how")), line.get("why")
            starts[-1] |= {"ended": f"{how} at step {line.get('step')}" + (f": {why}" if why else ""), "how": how}
    return starts


def _state(folder: Path, last: dict[str, Any], job: str | None) -> str:
    if job and job.startswith("PENDING"):
        return "queued"
    try:
        owner = Owner(**parse_json((folder / NAME).read_text()))
        alive = owner.alive()
        if alive is None:
            alive = time.time() - (folder / NAME).stat().st_mtime < _SILENT
    except (OSError, ValueError, TypeError):
        return last.get("how") or "none"
    return "running" if alive else last.get("how") or "killed"


def _slurm(job: str) -> str | None:
    """The job's number and its state in SLURM's words; None outside of SLURM, or where it forgot the job."""
    number = job.rpartition("/")[2].partition(".")[0]
    if not number.isdigit() or not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--format=%T (%r)", f"--jobs={number}", "--states=all"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{said.splitlines()[0]} {number}" if said else None


def _number(value: Any) -> Any:
    """The value, if it is a number: a run's folder may come from anyone."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _best(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "best.json").read_text())["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
