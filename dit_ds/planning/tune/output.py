"""The files of a search: the chosen DeepSpeed JSON, overrides, the sbatch line, all candidates, a plot."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from dit_ds.config.installed_files import find_file, scripts_folder
from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.config.yaml_text import dump_yaml
from dit_ds.files import GIB, atomic_write, full_disk_is_user_error, write_json
from dit_ds.planning.tune.candidates import Candidate
from dit_ds.planning.tune.search import Cluster, ScoredCandidate, SearchResult


def write_run(folder: Path, c: Candidate, config_path: str, config: RunConfig, ds: dict[str, Any]) -> Path:
    """Write a candidate as a run: `deepspeed.json`, and `overrides.yaml`, a configuration that names it.

    `overrides.yaml` has the user's file as its base and every key in which the candidate's resolved run differs from it,
    those of the command line included.

    Args:
        config_path: of the user's configuration.
        config: the same with the command line's overrides.
        ds: the run's DeepSpeed JSON.
    Returns:
        The path of `overrides.yaml`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deepspeed.json"
    write_json(path, c.deepspeed(ds))
    values, before = c.applied(config, path.name).model_dump(mode="json"), load_config(config_path)
    # a base with DeepSpeed overrides would apply them to the candidate's JSON, too: then no base, and all keys
    if not before.deepspeed.override:
        # one of the package's goes by its name
        own = find_file(config_path, ".yaml") == Path(config_path)
        base = os.path.relpath(Path(config_path).resolve(), folder.resolve()) if own else config_path
        values = {"base": base} | _differences(before.model_dump(mode="json"), values)
    with atomic_write(folder / "overrides.yaml") as f:
        f.write(dump_yaml(values).encode())
    return folder / "overrides.yaml"


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The keys of `after` that `before` lacks or has with other values."""
    out: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            if inner := _differences(before[key], value):
                out[key] = inner
        elif key not in before or before[key] != value:
            out[key] = value
    return out


def sbatch_line(overrides: Path, cluster: Cluster, run_dir: str) -> str:
    """The command that submits the chosen run."""
    options = f"--nodes={cluster.nodes} --gpus-per-node={cluster.gpus}"
    words = (scripts_folder() / "train.sbatch", "--config", overrides, "--run_dir", run_dir)
    return f"sbatch {options} {shlex.join(map(str, words))}"


def as_dict(scored: ScoredCandidate, result: SearchResult) -> dict[str, Any]:
    """A candidate as JSON, in GiB and seconds."""
    f = scored.footprint
    return {
        "name": scored.candidate.name,
        **scored.candidate.choices(),
        "accumulation": scored.candidate.accumulation,
        "fits": scored.fits,
        "needed_gib": round(result.memory(scored) / GIB, 3),
        "peak_gib": round(f.peak / GIB, 3),
        "least_capacity_gib": round(f.capacity / GIB, 3),
        "reserved_gib": round(f.reserved / GIB, 3),
        "activations_gib": round(f.activations / GIB, 3),
        "states_gib": round(f.states / GIB, 3),
        "host_gib_a_rank": round(f.host / GIB, 3),
        "exact_memory": f.exact,
        "samples_per_second": round(scored.speed, 2),
        "step_seconds": round(scored.step["step_seconds"], 6),
        "parts_seconds": {k: round(v, 6) for k, v in scored.step["parts"].items() if v},
        "trial": scored.trial,
        "why": scored.reason,
    }


def summary(result: SearchResult) -> dict[str, Any]:
    """The whole result as one JSON object."""
    return {
        "predicted": result.chosen.trial is None,
        "nodes": result.cluster.nodes,
        "gpus": result.cluster.gpus,
        "gpu_memory_gib": round(result.cluster.capacity / GIB, 2),
        "assumed": result.assumed.as_dict(),
        "chosen": as_dict(result.chosen, result),
        "own": result.configured and as_dict(result.configured, result),
        "pareto": [s.candidate.name for s in result.front],
        "notes": result.notes,
        "candidates": [as_dict(s, result) for s in result.candidates],
    }


def write(
    out: Path, result: SearchResult, config_path: str, config: RunConfig, ds: dict[str, Any], *, started: float
) -> dict[str, Any]:
    """Write all files.

    Args:
        started: `time.monotonic()` at the start of the search.
    Returns:
        `summary` with `files` (paths by name, and the sbatch line) and `seconds`, as candidates.json has it.
    Raises:
        UserError: the folder can't be written.
    """
    with full_disk_is_user_error(out):
        overrides = write_run(out, result.chosen.candidate, config_path, config, ds)
        line = sbatch_line(overrides, result.cluster, config.run_dir)
        (out / "sbatch.txt").write_text(line + "\n")
        plot(out / "pareto.png", result)
        names = ("deepspeed.json", "overrides.yaml", "sbatch.txt", "candidates.json", "pareto.png")
        files = {name: str(out / name) for name in names} | {"sbatch": line}
        written = summary(result) | {"files": files, "seconds": round(time.monotonic() - started, 1)}
        write_json(out / "candidates.json", written)
    return written


def plot(path: Path, result: SearchResult) -> None:
    """Plot memory against predicted speed: the Pareto front, the chosen candidate, in grey those that do not fit."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()

    def points(scored: list[ScoredCandidate]) -> tuple[list[float], list[float]]:
        return [result.memory(s) / GIB for s in scored], [s.speed for s in scored]

    unfit = [s for s in result.candidates if not s.fits]
    if unfit:
        axes.scatter(*points(unfit), s=14, color="0.8", label=f"does not fit ({len(unfit)})", zorder=1)
    for i, setting in enumerate(sorted({s.candidate.setting for s in result.candidates})):
        fitting = [s for s in result.candidates if s.fits and s.candidate.setting == setting]
        if fitting:
            axes.scatter(*points(fitting), s=18, color=f"C{i}", alpha=0.6, label=setting, zorder=2, linewidths=0)
    axes.plot(*points(result.front), color="black", linewidth=1.2, drawstyle="steps-post", label="front", zorder=3)
    axes.scatter(*points(result.front), s=22, color="black", zorder=4)
    x, y = points([result.chosen])
    axes.scatter(x, y, marker="*", s=220, color="crimson", label=f"chosen: {result.chosen.candidate.name}", zorder=5)
    if result.configured and result.configured is not result.chosen:
        axes.scatter(
            *points([result.configured]), marker="D", s=55, facecolors="none", edgecolors="crimson",
            label=f"as configured: {result.configured.candidate.name}", zorder=5,
        )  # fmt: skip
    limit = result.cluster.capacity / GIB
    if limit < 1.6 * max(map(result.memory, result.candidates)) / GIB:
        axes.axvline(limit, color="0.4", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(f"{limit:.0f} GiB", (limit, 0), textcoords="offset points", xytext=(4, 6), color="0.4")
    axes.set(xlabel="memory that a GPU must have (GiB)", ylabel="samples a second, predicted")
    cluster, gpu = result.cluster, result.assumed.machine.gpu
    axes.set_title(f"{cluster.nodes} x {cluster.gpus} {gpu}, {len(result.candidates)} candidates")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_write(path) as f:
        figure.savefig(f, dpi=130, format="png")
