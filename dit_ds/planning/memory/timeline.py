"""A picture of a step's memory: what of each category there is, from the step's first operator to its last."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

from dit_ds.errors import UserError
from dit_ds.files import GIB, atomic_write
from dit_ds.planning.memory.tracker import CATEGORIES, Profile

# Okabe and Ito's colours, which people who see red and green alike can tell apart; from the bottom: what stays, first
_COLOURS = {
    "parameters": "#0072B2",
    "optimizer": "#56B4E9",
    "average": "#7F7F7F",
    "inputs": "#000000",
    "buffers": "#F0E442",
    "workspaces": "#CC79A7",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "temporaries": "#D55E00",
}


def require(path: str | Path) -> str:
    """Look for what draws, before any work is done; return the picture's format.

    Raises:
        UserError: matplotlib is not installed, or the file's ending is no picture's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    kind = Path(path).suffix[1:] or "png"
    if kind not in Figure().canvas.get_supported_filetypes():
        raise UserError(f"{path}: no picture is called .{kind}: name a .png")
    return kind


def draw(profile: Profile, path: str | Path, title: str) -> None:
    """Write a stacked area chart of GiB by category over the step; phases are named, the peak is marked.

    From left to right memory is taken and given back: that is no time, and every phase has the same width.

    Args:
        path: a PNG (or what else its ending says, as .svg or .pdf).
    Raises:
        UserError: matplotlib is not installed, the ending is none it knows, or the file can't be written.
    """
    kind, picture = require(path), io.BytesIO()
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing kept for later

    figure = Figure(figsize=(11, 5), layout="constrained")
    axis = figure.subplots()
    peak = (profile.peak_at, *(profile.at_peak.get(c, 0) for c in CATEGORIES))
    moments = sorted({*profile.timeline, peak})
    xs = _x_positions(profile, moments)
    heights = {c: [m[1 + i] / GIB for m in moments] for i, c in enumerate(CATEGORIES)}
    shown = [c for c in _COLOURS if max(heights[c]) > 0]
    labels = [f"{profile.at_peak.get(c, 0) / GIB:.2f}  {c}" for c in shown]
    axis.stackplot(xs, [heights[c] for c in shown], colors=[_COLOURS[c] for c in shown], labels=labels, linewidth=0)
    top = profile.peak / GIB
    axis.set(title=title, ylabel="GiB", xlim=(0, len(profile.bounds)), ylim=(0, top * 1.25), xticks=[])
    for i, name in enumerate(_phases(profile)):
        axis.axvline(i, color="black", linewidth=0.8, linestyle=":")
        axis.text(i + 0.5, top * 1.24, f"{name}: {profile.phases[name] / GIB:.2f} GiB", ha="center", va="top")
    _mark_peak(axis, profile, xs[moments.index(peak)], top)
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], title="GiB at the peak", loc="center left", bbox_to_anchor=(1.0, 0.5),
                frameon=False)  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, format=kind, dpi=130)
    with atomic_write(path) as f:
        f.write(picture.getvalue())


def _phases(profile: Profile) -> list[str]:
    return sorted(profile.bounds, key=profile.bounds.__getitem__)


def _x_positions(profile: Profile, moments: list[tuple[int, ...]]) -> list[float]:
    """From left to right: each phase from one whole number to the next, as far as memory moves and tensors are made.

    By their number alone, thousands of small ones would leave no room for what matters. Of a step of several
    micro-batches what comes before the last one is drawn with its forward pass.
    """
    starts = [profile.bounds[name] for name in _phases(profile)]
    starts[0] = 0
    phases: list[list[tuple[int, ...]]] = [[] for _ in starts]
    for moment in moments:
        phases[max(k for k, start in enumerate(starts) if start <= moment[0])].append(moment)
    xs = []
    for i, phase in enumerate(phases):
        totals = [sum(m[1:]) for m in phase]
        moved = [0, *(abs(after - before) for before, after in zip(totals, totals[1:]))]
        passed = [0, *(after[0] - before[0] for before, after in zip(phase, phase[1:]))]
        ways = zip(itertools.accumulate(moved), itertools.accumulate(passed))
        xs += [i + 0.5 * a / max(1, sum(moved)) + 0.5 * b / max(1, sum(passed)) for a, b in ways]
    return xs


def _mark_peak(axis: Any, profile: Profile, place: float, top: float) -> None:
    """The peak's place and value, what passes it is in, and in which module."""
    where = f"{profile.phase}, in {profile.module}" if profile.module else profile.phase
    left = place < len(profile.bounds) / 2
    axis.plot([place], [top * 1.015], marker="v", color="black", markersize=7)
    axis.annotate(
        f"peak {top:.2f} GiB: {where}", (place, top), xytext=(8 if left else -8, 8), textcoords="offset points",
        ha="left" if left else "right", va="bottom", fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
