"""What a run leaves behind: its configuration, environment, metrics and log. Rank 0 writes, every rank may call."""

from __future__ import annotations

import json
import logging
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_ds.config import RunConfig
from dit_ds.distributed import World, mean_over_ranks
from dit_ds.files import atomic_write, full_disk_is_user_error, write_json

_PACKAGES = ("dit-ds", "torch", "deepspeed", "transformers", "segment-anything", "webdataset", "xformers", "numpy")
_log = logging.getLogger("dit_ds")


class RunRecord:
    """The run's folder.

    Args:
        resumed_at: the step a resumed run goes on from; lines of later steps, which will be taken again, are dropped.
    """

    def __init__(self, config: RunConfig, world: World, resumed_at: int | None):
        self.world, self.folder = world, Path(config.run_dir)
        self._metrics = self._board = None
        if not world.main:
            return
        with full_disk_is_user_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            config.save(self.folder / "config.yaml")
            write_json(self.folder / "environment.json", environment(world))
            _log.addHandler(logging.FileHandler(self.folder / "log.txt"))
            path = self.folder / "metrics.jsonl"
            kept = _lines_up_to(path, resumed_at) if resumed_at is not None else []
            with atomic_write(path) as f:
                f.write("".join(kept).encode())
            self._metrics = open(path, "a")
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=(resumed_at or 0) + 1)

    def metrics(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars of the same names."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"kind": kind} | values) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def log(self, message: str) -> None:
        """A line of the log, on stderr too."""
        if self.world.main:
            _log.info(message)

    def describe_parameters(self, model: nn.Module) -> None:
        """How much of each part trains."""
        for name, part in model.named_children():
            counts = [(p.numel(), p.requires_grad) for p in part.parameters()]
            total, trained = sum(n for n, _ in counts), sum(n for n, t in counts if t)
            self.log(f"{name}: {total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M train")

    def describe_checkpoint(self, report: dict[str, list[str]]) -> None:
        """What of a SAM checkpoint was used, and by name what was not."""
        self.log(f"SAM checkpoint: {len(report['loaded'])} tensors loaded by name")
        ours = [
            n
            for n in report["missing"]
            if not n.startswith(("text_encoder.", "text_projection.", "image_encoder.instruction."))
        ]
        for what, names in (
            ("not in the checkpoint, fresh", ours),
            ("not in the model, ignored", report["unexpected"]),
        ):
            if names:
                self.log(f"{what}: {', '.join(names)}")

    def close(self) -> None:
        """Flush and close."""
        for f in (self._metrics, self._board):
            if f is not None:
                f.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line that a kill cut short
            continue
    return kept


def environment(world: World) -> dict[str, Any]:
    """Versions, commit and hardware; never the whole environment, which can hold secrets."""
    versions = {}
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


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: allocated on the GPU, or this process's resident memory on a CPU. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Window:
    """Averages over some steps: loss, samples a second, the share of time spent waiting for data.

    `close` is the only point that synchronises with the device and between ranks.
    """

    def __init__(self, world: World):
        self.world = world
        self.loss: Tensor | float = 0.0
        self.micro_steps = self.samples = 0
        self.start = time.perf_counter()
        self.waited = 0.0

    def waiting(self) -> None:
        """The loop asks for data."""
        self._asked = time.perf_counter()

    def got(self) -> None:
        """The loop got its data."""
        self.waited += time.perf_counter() - self._asked

    def add(self, loss: Tensor, samples: int) -> None:
        """One micro-step's loss and real samples."""
        self.loss = self.loss + loss
        self.micro_steps += 1
        self.samples += samples

    def close(self) -> dict[str, float]:
        """The averages over all ranks, and the `seconds` the window lasted."""
        local = [float(self.loss) / max(1, self.micro_steps), float(self.samples)]
        seconds = time.perf_counter() - self.start
        loss, samples, wait = mean_over_ranks([*local, self.waited / seconds], self.world.device)
        return {
            "loss": loss,
            "samples_per_second": samples * self.world.world_size / seconds,
            "data_wait": wait,
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "seconds": seconds,
        }
