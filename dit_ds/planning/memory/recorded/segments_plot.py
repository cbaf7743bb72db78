"""A picture of the caching allocator's segments: which blocks lie in them, who holds them, and what is free."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

from dit_ds.files import GIB, atomic_write
from dit_ds.planning.memory.caching_allocator import CachingAllocator
from dit_ds.planning.memory.timeline import require

_ROWS = 40
_FREE, _WAITING, _OTHERS, _UNNAMED = "#FFFFFF", "#000000", "#BBBBBB", "#7F7F7F"
# Okabe and Ito's colours, and tints of them
_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
    "#7FB8D8",
    "#F2CF7F",
    "#7FCEB9",
)


def draw(allocator: CachingAllocator, sites: dict[int, str], path: str | Path, title: str) -> None:
    """Draw all segments one behind the other, in rows, each block in its site's colour; free parts are white.

    Args:
        allocator: in the state to draw.
        sites: where a block was allocated, by its key.
        path: a PNG (or what else its ending says, as .svg or .pdf).
    Raises:
        UserError: matplotlib is not installed, the ending is none it knows, or the file can't be written.
    """
    kind, picture = require(path), io.BytesIO()
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing kept for later

    held: dict[str, int] = defaultdict(int)
    for block in allocator.blocks():
        if block.allocated:
            held[sites.get(block.key, "")] += block.size
    named = sorted((s for s in held if s), key=lambda s: -held[s])[: len(_COLOURS)]
    colours = dict(zip(named, _COLOURS)) | ({"": _UNNAMED} if "" in held else {})
    parts, edges, at, last_end = defaultdict(list), [], 0, None
    for block in allocator.blocks():
        colour = _WAITING if block.waiting else _FREE
        if block.allocated:
            colour = colours.get(sites.get(block.key, ""), _OTHERS)
        parts[colour].append((at, block.size))
        if block.prev is None or block.address != last_end:
            edges.append(at)
        at, last_end = at + block.size, block.end
    figure = Figure(figsize=(12, 8), layout="constrained")
    axis = figure.subplots()
    width = max(1, -(-at // _ROWS))
    for colour, pieces in parts.items():
        for row, spans in _in_rows(pieces, width).items():
            axis.broken_barh(spans, (_ROWS - row - 0.9, 0.8), facecolors=colour, linewidth=0)
    for row, spans in _in_rows([(edge, 0) for edge in edges], width).items():
        axis.vlines([x for x, _ in spans], _ROWS - row - 0.95, _ROWS - row - 0.05, colors="black", linewidth=0.4)
    axis.set(
        title=title, xlim=(0, width / GIB), ylim=(0, _ROWS), yticks=[], xlabel="GiB a row; black lines begin segments"
    )
    axis.set_facecolor("#F4F4F4")
    handles = [axis.bar(0, 0, color=colour, label=f"{held[site] / GIB:.3f}  {site or 'no frames recorded'}") for site,
               colour in colours.items()]  # fmt: skip
    rest = sum(size for site, size in held.items() if site not in colours)
    if rest:
        handles.append(axis.bar(0, 0, color=_OTHERS, label=f"{rest / GIB:.3f}  others"))
    waiting = sum(size for _, size in parts[_WAITING])
    if waiting:
        handles.append(axis.bar(0, 0, color=_WAITING, label=f"{waiting / GIB:.3f}  waits for another stream"))
    free = sum(size for _, size in parts[_FREE])
    handles.append(axis.bar(0, 0, color=_FREE, edgecolor="black", label=f"{free / GIB:.3f}  free"))
    figure.legend(handles=handles, title=f"GiB of {allocator.reserved / GIB:.3f} reserved", loc="outside right upper",
                  frameon=False, fontsize=8)  # fmt: skip
    figure.savefig(picture, format=kind, dpi=120)
    with atomic_write(path) as f:
        f.write(picture.getvalue())


def _in_rows(pieces: list[tuple[int, int]], width: int) -> dict[int, list[tuple[float, float]]]:
    """(start, size) in bytes of the whole to (start, size) in GiB of a row, by row; pieces that span rows are cut."""
    rows: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for at, size in pieces:
        while True:
            row, x = divmod(at, width)
            part = min(size, width - x)
            rows[row].append((x / GIB, part / GIB))
            at, size = at + part, size - part
            if size <= 0:
                break
    return rows
