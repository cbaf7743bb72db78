"""A run's folder: configuration, environment, metrics and log. Every rank calls; rank 0 writes, but for samples."""

from __future__ import annotations

import json
import logging
import math
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, gather_objects
from dit_ds.files import atomic_write, full_disk_is_user_error, parse_json, write_json
from dit_ds.models.sam_checkpoint import describe
from dit_ds.training.log_files import LineFile, LineFileHandler, ScalarBoard
from dit_ds.training.run_folder import note_folder
from dit_ds.training.run_lock import Owner
from dit_ds.training.stragglers import NAME as RANKS
from dit_ds.training.stragglers import StragglerWatch

_PACKAGES = ("dit-ds", "torch", "deepspeed", "transformers", "segment-anything", "webdataset", "xformers", "numpy")

_log = logging.getLogger("dit_ds")


class RunLog:
    """Writes the run's folder. Made by all ranks together.

    Args:
        resumed_at: the step of the checkpoint that is resumed; lines of later steps, which will be repeated, are moved to
            `metrics.jsonl.superseded`. None for a new run: all lines are.
        evaluated_at: the step of the last evaluation before the checkpoint; lines of later ones are moved, too.
    Raises:
        UserError: the folder can't be written.
    """

    def __init__(self, config: RunConfig, world: World, resumed_at: int | None, evaluated_at: int = 0):
        self.world, self.folder = world, Path(config.run_dir)
        go_on = config.checkpoint.on_full_disk == "go_on"
        self._metrics = LineFile(self.folder / "metrics.jsonl", go_on) if world.main else None
        self._nonfinite = LineFile(self.folder / "nonfinite.jsonl", go_on) if world.main else None
        self._events = LineFile(self.folder / "events.jsonl", go_on=True) if world.main else None
        self._ranks = LineFile(self.folder / RANKS, go_on) if world.main and world.world_size > 1 else None
        self._stragglers = StragglerWatch()
        self._samples: LineFile | None = None
        self._board: ScalarBoard | None = None
        self._handler = LineFileHandler(self.folder / "log.txt", go_on) if world.main else None
        if world.main:
            self._open(config, world, resumed_at, evaluated_at)
        # rank 0 cuts the other ranks' sample logs, too: they wait before they append
        self._hosts = gather_objects(socket.gethostname())
        if config.log.samples:
            self._samples = LineFile(self.folder / f"samples/rank_{world.rank:05d}.jsonl", go_on)

    def _open(self, config: RunConfig, world: World, resumed_at: int | None, evaluated_at: int) -> None:
        with full_disk_is_user_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            config.save(self.folder / "config.yaml")
            note_folder(self.folder)
            write_json(self.folder / "environment.json", environment(world))
            path = self.folder / "metrics.jsonl"
            (self.folder / "samples").mkdir(exist_ok=True)
            for lines in (path, self.folder / "nonfinite.jsonl", self.folder / RANKS,
                          *self.folder.glob("samples/rank_*.jsonl")):  # fmt: skip
                if lines.exists() or lines == path:
                    _cut(lines, resumed_at, evaluated_at)
            if self._handler is not None:
                _log.addHandler(self._handler)
            if config.log.tensorboard:
                go_on = config.checkpoint.on_full_disk == "go_on"
                self._board = ScalarBoard(self.folder / "tensorboard", (resumed_at or 0) + 1, go_on)

    def metrics(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars of the same names. Values that are not finite become null."""
        if self._metrics is None:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._metrics.write(json.dumps({"kind": kind} | values))
        if self._board is not None:
            self._board.add(kind, values, values["step"])

    def samples(self, step: int, epoch: int, samples: list[int]) -> None:
        """One line of this rank's sample log, where `log.samples` asks for it: a step's samples, without padding."""
        if self._samples is not None:
            self._samples.write(json.dumps({"step": step, "epoch": epoch, "samples": samples}))

    def own_times(self, step: int, own_seconds: list[float], step_seconds: float) -> None:
        """One line of ranks.jsonl; a rank that is slow in many intervals is named in the log, with its host.

        Args:
            own_seconds: of each rank, for an optimizer step, see `ThroughputMeter.close`.
            step_seconds: of an optimizer step with all waiting.
        """
        if self._ranks is None:
            return
        of_hosts: dict[str, dict[str, float]] = {}
        for rank, (host, seconds) in enumerate(zip(self._hosts, own_seconds, strict=True)):
            of_hosts.setdefault(host, {})[str(rank)] = float(f"{seconds:.5g}")
        line = {"step": step, "step_seconds": float(f"{step_seconds:.5g}"), "own_seconds": of_hosts}
        self._ranks.write(json.dumps(line))
        times = {(host, rank): s for rank, (host, s) in enumerate(zip(self._hosts, own_seconds))}
        self._stragglers.add(times, step_seconds)

    def nonfinite(self, values: dict[str, Any]) -> None:
        """One line of nonfinite.jsonl: the losses and samples of a step whose gradient was not finite."""
        if self._nonfinite is not None:
            self._nonfinite.write(json.dumps(values))

    def started(self, step: int, total_steps: int) -> None:
        """A line of events.jsonl: the training begins, or goes on from a checkpoint."""
        who = Owner.this_process()
        self._event("start", step=step, total_steps=total_steps, world_size=self.world.world_size,
                    host=who.host, job=who.job)  # fmt: skip

    def ended(self, how: str, step: int, why: BaseException | str | None = None) -> None:
        """A line of events.jsonl: the training ends.

        Args:
            how: done, stopped, interrupted, refused, failed or stalled.
        """
        words = " ".join((str(why) or type(why).__name__).split()) if why is not None else None
        self._event("end", step=step, how=how, why=words)

    def _event(self, event: str, **values: Any) -> None:
        if self._events is not None:
            self._events.write(json.dumps({"event": event, "time": round(time.time(), 1)} | values))

    def log(self, message: str) -> None:
        """A line of the log, on stderr too."""
        if self.world.main:
            _log.info(message)

    def describe_parameters(self, model: nn.Module, rates: dict[str, float] | None = None) -> None:
        """Log a table of parameters, all and trained, of each part of the model.

        Args:
            rates: learning rates of the trained parameters by name, for one more column.
        """
        counts: dict[str, list[int]] = {}
        rates_of: dict[str, list[float]] = {}
        for name, p in model.named_parameters():
            part, *rest = name.split(".")
            if rest[0] in ("instruction", "static_tokens"):  # text features' way into the ViT
                part += f".{rest[0]}"
            elif "lora" in rest:
                part += ".lora"
            of = counts.setdefault(part, [0, 0])
            of[0] += p.numel()
            of[1] += p.numel() * p.requires_grad
            if rates and p.requires_grad:
                rates_of.setdefault(part, []).append(rates[name])
        counts["all"] = [sum(x) for x in zip(*counts.values())]
        self.log(f"{'parameters, in millions':<30} {'all':>9} {'trained':>9}{'  learning rate' if rates else ''}")
        for part, (total, trained) in counts.items():
            at = _range(rates_of[part]) if part in rates_of else "" if trained else "frozen"
            self.log(f"{part:<30} {total / 1e6:9.2f} {trained / 1e6:9.2f}  {at}".rstrip())

    def describe_checkpoint(self, report: dict[str, list[str]]) -> None:
        """Log how many tensors of `model.checkpoint` were loaded, and the names of those that were not.

        Args:
            report: from `Segmenter.load_pretrained`.
        """
        for line in describe(report):
            self.log(line)

    def close(self) -> None:
        """Flush and close."""
        for f in (self._metrics, self._nonfinite, self._events, self._ranks, self._board, self._samples):
            if f is not None:
                f.close()
        if self._handler is not None:
            _log.removeHandler(self._handler)
            self._handler.close()


def _range(rates: list[float]) -> str:
    least, most = f"{min(rates):.3g}", f"{max(rates):.3g}"
    return most if least == most else f"{least} to {most}"


def trace_of_run(run_dir: str | Path) -> str | None:
    """The first trace that a training left in a folder, beside its configuration and log; None where there is none."""
    folder = Path(run_dir)
    lines = (folder / "metrics.jsonl", folder / "nonfinite.jsonl", *sorted(folder.glob("samples/rank_*.jsonl")))
    traces = [*sorted(folder.glob("checkpoints/*")), folder / "best.json", folder / "local.json"]
    found = [p for p in traces if p.exists()] + [p for p in lines if p.is_file() and p.stat().st_size]
    return str(found[0].relative_to(folder)) if found else None


def _cut(path: Path, step: int | None, evaluated: int) -> None:
    """Keep a file's lines up to `step`, and of evaluations up to `evaluated`; none where `step` is None.

    The others are moved to the end of `NAME.superseded`.
    """
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = parse_json(line)
            keep = step is not None and entry["step"] <= (evaluated if entry.get("kind") == "eval" else step)
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            keep = False
        (kept if keep else moved).append(f"{line}\n")
    if moved:  # first, so that a kill between the two leaves them twice and not nowhere
        with open(path.with_name(f"{path.name}.superseded"), "a") as f:
            f.writelines(moved)
    with atomic_write(path) as out:
        out.write("".join(kept).encode())


def environment(world: World) -> dict[str, Any]:
    """Versions, commit and hardware; not the environment variables, which can hold secrets."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else None
    return {
        "versions": versions, "python": platform.python_version(), "commit": _commit(), "world_size": world.world_size,
        "gpu": gpu, "cpu": platform.processor() or platform.machine(), "cuda": torch.version.cuda, "command": sys.argv,
    }  # fmt: skip


def _commit() -> str | None:
    try:
        where = Path(__file__).parent
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, timeout=10, check=True
        )
        return out.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
