"""Pictures: masks over images, grids of them, and attention over an image."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_ds.errors import UserError
from dit_ds.files import atomic_write

_TINT = np.array([255, 60, 40])
_LEVELS = np.arange(256)[:, None] * np.ones(3)  # of each channel
_SHADED = (_LEVELS * 0.45 + 35).astype(np.uint8)[None]  # what a pixel becomes outside of a mask, and within
_TINTED = (_LEVELS * 0.65 + _TINT * 0.35).astype(np.uint8)[None]
_CELL = 220  # pixels: longer side of an image on a sheet
_BAND = 18  # pixels: height of a line of text
_GAP = 6  # pixels between pictures
_FORMATS = {".png": "PNG", ".pdf": "PDF", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_WRONG = (220, 0, 0)  # the frame of a wrong prediction


def overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A picture with the mask tinted, its edge drawn and the rest dimmed.

    Args:
        pixels: (H, W, 3) uint8.
        mask: (H, W) bool.
    """
    shaded = cv2.LUT(pixels, _SHADED)
    np.copyto(shaded, cv2.LUT(pixels, _TINTED), where=mask[..., None])
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    shaded[mask & ~inner] = _TINT
    return Image.fromarray(shaded)


def picture_format(path: str | Path) -> str:
    """Pillow's and Matplotlib's name of a format, by the file's ending; called before any work is done.

    Raises:
        UserError: another ending.
    """
    if (ending := Path(path).suffix.lower()) not in _FORMATS:
        raise UserError(f"{path} is no picture's name: let it end in {', '.join(_FORMATS)}")
    return _FORMATS[ending]


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _caption(canvas: Image.Image, at: tuple[int, int], text: str, width: int, size: int = 13) -> None:
    font = _font(size)
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip(".") + "…" if len(text) > 2 else ""
    ImageDraw.Draw(canvas).text(at, text, fill=(20, 20, 20), font=font)


def save_picture(image: Image.Image, out: str | Path, **options: Any) -> None:
    """Write a picture in the format of its name, whole or not at all.

    Args:
        options: of Pillow's `save`.
    Raises:
        UserError: the name has another ending, or it can't be written.
    """
    kind, data = picture_format(out), io.BytesIO()
    image.save(data, kind, **options)
    with atomic_write(out) as f:
        f.write(data.getvalue())


def side_by_side(pixels: np.ndarray, mask: np.ndarray, text: str) -> Image.Image:
    """The (H, W, 3) picture beside itself with the (H, W) mask, the text above."""
    h, w = mask.shape
    canvas = Image.new("RGB", (2 * w + 6, h + _BAND + 4), "white")
    _caption(canvas, (4, 1), text, 2 * w)
    canvas.paste(Image.fromarray(pixels), (0, _BAND + 4))
    canvas.paste(overlay(pixels, mask), (w + 6, _BAND + 4))
    return canvas


def overlay_with_text(pixels: np.ndarray, mask: np.ndarray, text: str) -> Image.Image:
    """The (H, W, 3) picture with the (H, W) mask, the text above."""
    h, w = mask.shape
    canvas = Image.new("RGB", (w, h + _BAND + 4), "white")
    _caption(canvas, (4, 1), text, w - 8)
    canvas.paste(overlay(pixels, mask), (0, _BAND + 4))
    return canvas


@dataclass(frozen=True)
class GridRow:
    """An expression and what each model predicts for it.

    Attributes:
        pixels: (H, W, 3) uint8.
        truth: (H, W) bool.
        predictions: of each model, its (H, W) bool mask and IoU.
    """

    pixels: np.ndarray
    text: str
    truth: np.ndarray
    predictions: list[tuple[np.ndarray, float]]


def write_grid(
    rows: list[GridRow],
    titles: list[str],
    out: str | Path,
    *,
    wrong_below: float = 0.0,
    across: int = 1,
    scale: int = 1,
) -> None:
    """Write a picture of expressions, each with its image, ground truth and predictions under the text.

    Args:
        titles: of the models.
        wrong_below: a prediction with a smaller IoU is framed red, as the paper's figure 4 does.
        across: expressions side by side.
        scale: factor on all sizes in pixels.
    Raises:
        UserError: `out` has another ending, or can't be written.
    """
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
    save_picture(canvas, out, resolution=100 * scale, quality=95)


def _fit(pixels: np.ndarray, cell: int) -> tuple[int, int]:
    """Width and height with the longer side `cell`."""
    h, w = pixels.shape[:2]
    return max(1, round(w * cell / max(h, w))), max(1, round(h * cell / max(h, w)))


@dataclass(frozen=True)
class AttentionRow:
    """A row of `draw_attention`.

    Attributes:
        prediction: (H, W) bool, or None for a row without one.
        maps: by the layer's number, from 1 on: (h, w) attention over the picture's patches, and the text under it.
        patch: height and width of a patch in pixels of the picture.
    """

    title: str
    prediction: np.ndarray | None
    maps: dict[int, tuple[np.ndarray, str]]
    patch: tuple[float, float]


def draw_attention(pixels: np.ndarray, text: str, rows: list[AttentionRow], note: str, out: str | Path) -> None:
    """Write a PNG or PDF: the picture, and in each row the prediction and each layer's map over the picture in grey.

    A panel's colours go from its least to its largest value.

    Args:
        pixels: (H, W, 3) uint8.
        text: the expression, the figure's title.
        note: explains the panels, below them.
    Raises:
        UserError: `out` has another ending, or can't be written.
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
        axis.set(xticks=[], yticks=[], frame_on=False, xlim=(0, w), ylim=(h, 0), aspect="equal")
    thin = slice(None, None, math.ceil(max(h, w) / 800))  # a photo's pixels, once a panel, would fill the memory
    small = pixels[thin, thin]
    grey = small.mean(axis=2)
    axes[0, 0].imshow(small, extent=(0, w, h, 0))
    axes[0, 0].set_title("image", fontsize=9)
    for row, (_, first, *others) in zip(rows, axes):
        if row.prediction is None:
            first.text(
                0.95, 0.5, row.title, transform=first.transAxes, ha="right", va="center", fontsize=9, parse_math=False
            )
        else:
            first.imshow(overlay(small, row.prediction[thin, thin]), extent=(0, w, h, 0))
            first.set_title(row.title.replace(" (", "\n("), fontsize=8)
            first.set_xlabel("prediction", fontsize=7, labelpad=2)
        for layer, axis in zip(layers, others):
            if layer in row.maps:
                _heat(axis, grey, *row.maps[layer], row.patch)
    for layer, axis in zip(layers, axes[0, 2:]):
        axis.set_title(f"layer {layer}", fontsize=9)
    width = int(10 * figure.get_figwidth())
    title = textwrap.fill(f"“{textwrap.shorten(text, 3 * width, placeholder='…')}”", width)
    figure.suptitle(title, fontsize=11, parse_math=False)  # a dollar in the text is no mathematics
    figure.supxlabel(note, fontsize=7)
    figure.savefig(picture, format=kind.lower(), dpi=150)
    with atomic_write(out) as f:
        f.write(picture.getvalue())


def heat(grey: np.ndarray, values: np.ndarray, patch: tuple[float, float]) -> np.ndarray:
    """A picture in grey under a map, whose colours go from its least (dark) to its largest value (bright).

    Args:
        grey: (H, W) of 0 to 255.
        values: (h, w) over the picture's patches.
        patch: height and width of a patch, in pixels of `grey`; the last one may reach beyond it.
    Returns:
        (H, W, 3) uint8.
    """
    from matplotlib import colormaps

    (h, w), least = grey.shape, float(values.min())
    scaled = (values - least) / max(float(values.max()) - least, 1e-12)
    rows, columns = (max(1, round(n * size)) for n, size in zip(values.shape, patch))
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((columns, rows), Image.Resampling.BILINEAR)
    whole = np.pad(np.asarray(smooth)[:h, :w], ((0, max(0, h - rows)), (0, max(0, w - columns))), mode="edge")
    return (grey[..., None] * 0.35 + colormaps["inferno"](whole)[..., :3] * 255 * 0.65).astype(np.uint8)


def _heat(axis: Any, grey: np.ndarray, values: np.ndarray, label: str, patch: tuple[float, float]) -> None:
    """A panel: `heat`, over the whole picture."""
    (bottom, top), right = axis.get_ylim(), axis.get_xlim()[1]
    scale = grey.shape[0] / bottom  # the panel's pixels in one of the picture's
    axis.imshow(heat(grey, values, (patch[0] * scale, patch[1] * scale)), extent=(0, right, bottom, top))
    axis.set_xlabel(label, fontsize=7, labelpad=2)
