"""What a search leaves behind: the chosen DeepSpeed JSON, overrides, the sbatch line, all candidates, a plot."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.files import GIB, atomic_write, full_disk_is_user_error, write_json
from dit_ds.planning.tune.candidates import Candidate
from dit_ds.planning.tune.search import ScoredCandidate, SearchResult


def write_run(folder: Path, c: Candidate, config_path: str, config: RunConfig, ds: dict[str, Any]) -> Path:
    """`deepspeed.json` and `overrides.yaml`, a configuration that is based on the user's and names the former.

    The command line's overrides are in it, too: everything in which the resolved run differs from the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deepspeed.json"
    write_json(path, c.deepspeed(ds))
    values, before = c.applied(config, str(path)).model_dump(mode="json"), load_config(config_path)
    if not before.deepspeed.override:  # else those keys would be laid over the chosen JSON: then all is said here
        base = os.path.relpath(Path(config_path).resolve(), folder.resolve())
        values = {"base": base} | _differences(before.model_dump(mode="json"), values)
    with atomic_write(folder / "overrides.yaml") as f:
        f.write(yaml.safe_dump(values, sort_keys=False).encode())
    return folder / "overrides.yaml"


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What to lay over `before` to have `after`."""
    out = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            if inner := _differences(before[key], value):
                out[key] = inner
        elif key not in before or before[key] != value:
            out[key] = value
    return out


def sbatch_line(overrides: Path, found: SearchResult, run_dir: str) -> str:
    """What submits the chosen run."""
    place = found.place
    options = f"--nodes={place.nodes} --gpus-per-node={place.gpus}"
    return (
        f"sbatch {options} slurm/train.sbatch --config {shlex.quote(str(overrides))} --run_dir {shlex.quote(run_dir)}"
    )


def as_dict(row: ScoredCandidate, found: SearchResult) -> dict[str, Any]:
    """A candidate for JSON. GiB and seconds."""
    f = row.footprint
    return {
        "name": row.candidate.name,
        **row.candidate.choices(),
        "accumulation": row.candidate.accumulation,
        "fits": row.fits,
        "needed_gib": round(found.memory(row) / GIB, 3),
        "peak_gib": round(f.peak / GIB, 3),
        "activations_gib": round(f.activations / GIB, 3),
        "states_gib": round(f.states / GIB, 3),
        "host_gib_a_rank": round(f.host / GIB, 3),
        "exact_memory": f.exact,
        "samples_per_second": round(row.speed, 2),
        "step_seconds": round(row.step["step_seconds"], 6),
        "parts_seconds": {k: round(v, 6) for k, v in row.step["parts"].items() if v},
        "trial": row.trial,
        "why": row.why,
    }


def summary(found: SearchResult) -> dict[str, Any]:
    """The whole answer as one JSON object."""
    return {
        "predicted": found.chosen.trial is None,
        "nodes": found.place.nodes,
        "gpus": found.place.gpus,
        "gpu_memory_gib": round(found.place.capacity / GIB, 2),
        "assumed": found.assumed.as_dict(),
        "chosen": as_dict(found.chosen, found),
        "own": found.own and as_dict(found.own, found),
        "pareto": [r.candidate.name for r in found.front],
        "notes": found.notes,
        "candidates": [as_dict(r, found) for r in found.rows],
    }


def write(
    out: Path, found: SearchResult, config_path: str, config: RunConfig, ds: dict[str, Any], *, started: float
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
        overrides = write_run(out, found.chosen.candidate, config_path, config, ds)
        line = sbatch_line(overrides, found, config.run_dir)
        (out / "sbatch.txt").write_text(line + "\n")
        plot(out / "pareto.png", found)
        names = ("deepspeed.json", "overrides.yaml", "sbatch.txt", "candidates.json", "pareto.png")
        files = {name: str(out / name) for name in names} | {"sbatch": line}
        result = summary(found) | {"files": files, "seconds": round(time.monotonic() - started, 1)}
        write_json(out / "candidates.json", result)
    return result


def plot(path: Path, found: SearchResult) -> None:
    """Memory against predicted speed: the front, the chosen one, in grey what does not fit."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()

    def points(rows: list[ScoredCandidate]) -> tuple[list[float], list[float]]:
        return [found.memory(r) / GIB for r in rows], [r.speed for r in rows]

    unfit = [r for r in found.rows if not r.fits]
    if unfit:
        axes.scatter(*points(unfit), s=14, color="0.8", label=f"does not fit ({len(unfit)})", zorder=1)
    for i, setting in enumerate(dict.fromkeys(r.candidate.setting for r in sorted(found.rows, key=_by_setting))):
        rows = [r for r in found.rows if r.fits and r.candidate.setting == setting]
        if rows:
            axes.scatter(*points(rows), s=18, color=f"C{i}", alpha=0.6, label=setting, zorder=2, linewidths=0)
    axes.plot(*points(found.front), color="black", linewidth=1.2, drawstyle="steps-post", label="front", zorder=3)
    axes.scatter(*points(found.front), s=22, color="black", zorder=4)
    x, y = points([found.chosen])
    axes.scatter(x, y, marker="*", s=220, color="crimson", label=f"chosen: {found.chosen.candidate.name}", zorder=5)
    if found.own and found.own is not found.chosen:
        axes.scatter(
            *points([found.own]), marker="D", s=55, facecolors="none", edgecolors="crimson",
            label=f"as configured: {found.own.candidate.name}", zorder=5,
        )  # fmt: skip
    limit = found.place.capacity / GIB
    if limit < 1.6 * max(found.memory(r) for r in found.rows) / GIB:
        axes.axvline(limit, color="0.4", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(f"{limit:.0f} GiB", (limit, 0), textcoords="offset points", xytext=(4, 6), color="0.4")
    axes.set(xlabel="memory of a GPU (GiB), with context and reserve", ylabel="samples a second, predicted")
    axes.set_title(
        f"{found.place.nodes} x {found.place.gpus} {found.assumed.as_dict()['gpu']}, {len(found.rows)} candidates"
    )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_write(path) as f:
        figure.savefig(f, dpi=130, format="png")


def _by_setting(row: ScoredCandidate) -> str:
    return row.candidate.setting
