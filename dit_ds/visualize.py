"""Pictures: masks over images, grids of them, and attention over an image."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_ds.errors import UserError
from dit_ds.files import atomic_write

_TINT = np.array([255, 60, 40])
_CELL = 220  # pixels: longer side of an image on a sheet
_BAND = 18  # pixels: height of a line of text
_GAP = 6  # pixels between pictures
_WRONG = (220, 0, 0)  # the frame of a wrong prediction


def overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 with what is outside the mask dimmed, the mask tinted and its edge drawn."""
    shaded = pixels * 0.45 + 35
    shaded[mask] = pixels[mask] * 0.65 + _TINT * 0.35
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    shaded[mask & ~inner] = _TINT
    return Image.fromarray(shaded.astype(np.uint8))


def picture_format(path: str | Path) -> str:
    """PNG or PDF, as the file's ending says; to be asked before any work is done.

    Raises:
        UserError: it ends in something else.
    """
    kind = Path(path).suffix[1:].upper()
    if kind not in ("PNG", "PDF"):
        raise UserError(f"{path} is neither a .png nor a .pdf: name one of these")
    return kind


def _caption(canvas: Image.Image, at: tuple[int, int], text: str, width: int, size: int = 13) -> None:
    font = ImageFont.load_default(size)
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip(".") + "…" if len(text) > 2 else ""
    ImageDraw.Draw(canvas).text(at, text, fill=(20, 20, 20), font=font)


def side_by_side(pixels: np.ndarray, mask: np.ndarray, text: str) -> Image.Image:
    """The picture, the picture with the mask, and the words above."""
    h, w = mask.shape
    canvas = Image.new("RGB", (2 * w + 6, h + _BAND + 4), "white")
    _caption(canvas, (4, 1), text, 2 * w)
    canvas.paste(Image.fromarray(pixels), (0, _BAND + 4))
    canvas.paste(overlay(pixels, mask), (w + 6, _BAND + 4))
    return canvas


@dataclass(frozen=True)
class GridRow:
    """An expression: (H, W, 3) uint8 `pixels`, the words, the (H, W) `truth`, and (H, W) prediction and IoU of each."""

    pixels: np.ndarray
    text: str
    truth: np.ndarray
    predictions: list[tuple[np.ndarray, float]]


def write_grid(
    rows: list[GridRow],
    titles: list[str],
    out: str | Path,
    wrong_below: float = 0.0,
    across: int = 1,
    scale: int = 1,
) -> None:
    """Write a PNG or PDF of expressions, each with its image, ground truth and predictions under the words.

    Args:
        titles: of the predictions.
        wrong_below: a prediction with a smaller IoU is framed red, as the paper's figure 4 does.
        across: expressions side by side.
        scale: pixels of everything, times this.
    Raises:
        UserError: `out` is neither, or can't be written.
    """
    kind, picture = picture_format(out), io.BytesIO()
    cell, band, gap = _CELL * scale, _BAND * scale, _GAP * scale
    width = (2 + len(titles)) * (cell + gap) + 2 * gap
    heights = [2 * band + gap + _fit(row.pixels, cell)[1] for row in rows]
    lines = [max(heights[i : i + across]) for i in range(0, len(rows), across)]
    canvas = Image.new("RGB", (across * width, sum(lines) + 2 * gap), "white")
    for i, row in enumerate(rows):
        x, y = gap + i % across * width, gap + sum(lines[: i // across])
        _caption(canvas, (x, y), f"“{row.text}”", width - 3 * gap, 13 * scale)
        names = ["image", "ground truth", *(f"{t}  IoU {iou:.2f}" for t, (_, iou) in zip(titles, row.predictions))]
        shown = [Image.fromarray(row.pixels), overlay(row.pixels, row.truth)]
        shown += [overlay(row.pixels, mask) for mask, _ in row.predictions]
        for k, (name, image) in enumerate(zip(names, shown)):
            at = (x + k * (cell + gap), y + 2 * band)
            _caption(canvas, (at[0], y + band), name, cell, 12 * scale)
            image = image.resize(_fit(row.pixels, cell))
            if k >= 2 and row.predictions[k - 2][1] < wrong_below:
                ImageDraw.Draw(image).rectangle(
                    (0, 0, image.width - 1, image.height - 1), outline=_WRONG, width=4 * scale
                )
            canvas.paste(image, at)
    canvas.save(picture, kind, resolution=100 * scale, quality=95)
    with atomic_write(out) as f:
        f.write(picture.getvalue())


def _fit(pixels: np.ndarray, cell: int) -> tuple[int, int]:
    """Width and height with the longer side `cell`."""
    h, w = pixels.shape[:2]
    return max(1, round(w * cell / max(h, w))), max(1, round(h * cell / max(h, w)))


@dataclass(frozen=True)
class AttentionRow:
    """A row of `draw_attention`: what it is of, the (H, W) prediction or None, and by layer a map and a note.

    Attributes:
        maps: by layer's number, from 1 on: (h, w) attention over the picture's places, and what to write under it.
        place: height and width of a place in pixels of the picture.
    """

    title: str
    prediction: np.ndarray | None
    maps: dict[int, tuple[np.ndarray, str]]
    place: tuple[float, float]


def draw_attention(pixels: np.ndarray, text: str, rows: list[AttentionRow], note: str, out: str | Path) -> None:
    """Write a PNG or PDF: the picture, and in each row the prediction and each layer's map over the picture in grey.

    A panel's colours go from its least to its largest value.

    Args:
        pixels: (H, W, 3) uint8.
        text: the expression, the figure's title.
        note: what is shown, below.
    Raises:
        UserError: `out` is neither, or can't be written.
    """
    kind, picture = picture_format(out), io.BytesIO()
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing kept for later

    h, w = pixels.shape[:2]
    layers = sorted({layer for row in rows for layer in row.maps})
    # inches: panels of 1.5, a line under each, the titles over a row that has a prediction
    panel, columns = 1.5 * min(1.5, max(0.5, h / w)), 2 + len(layers)
    heights = [panel + (0.22 if row.prediction is None else 0.5) for row in rows]
    figure = Figure(figsize=(max(6, 1.5 * columns), sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(0, w), ylim=(h, 0), aspect="equal")
        axis.set_frame_on(False)
    whole = {"extent": (0, w, h, 0), "interpolation": "bilinear"}
    axes[0, 0].imshow(pixels, **whole)
    axes[0, 0].set_title("image", fontsize=9)
    grey = pixels.mean(axis=2)
    for i, row in enumerate(rows):
        if row.prediction is None:
            axes[i, 1].text(0.95, 0.5, row.title, transform=axes[i, 1].transAxes, ha="right", va="center", fontsize=9,
                            parse_math=False)  # fmt: skip
        else:
            axes[i, 1].imshow(overlay(pixels, row.prediction), **whole)
            axes[i, 1].set_title(row.title.replace(" (", "\n("), fontsize=8)
            axes[i, 1].set_xlabel("prediction", fontsize=7, labelpad=2)
        for layer, (values, label) in row.maps.items():
            axis = axes[i, 2 + layers.index(layer)]
            axis.imshow(grey, cmap="gray", **whole)
            ends = (
                0,
                values.shape[1] * row.place[1],
                values.shape[0] * row.place[0],
                0,
            )  # the last place may stand out
            axis.imshow(values, cmap="inferno", alpha=0.65, extent=ends, interpolation="bilinear")
            axis.set(xlim=(0, w), ylim=(h, 0))
            axis.set_xlabel(label, fontsize=7, labelpad=2)
            if i == 0:
                axis.set_title(f"layer {layer}", fontsize=9)
    title = textwrap.fill(f"“{text}”", width=int(10 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=11, parse_math=False)  # a dollar is a dollar
    figure.supxlabel(note, fontsize=7)
    figure.savefig(picture, format=kind.lower(), dpi=150)
    with atomic_write(out) as f:
        f.write(picture.getvalue())
