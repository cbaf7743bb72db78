"""Pictures: masks over images, and contact sheets of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_ds.files import atomic_write

_TINT = np.array([255, 60, 40])
_CELL = 220  # pixels: longer side of an image on a sheet
_BAND = 18  # pixels: height of a line of text


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


def _caption(canvas: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    font = ImageFont.load_default(13)
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


def write_sheet(panels: list[tuple[np.ndarray, str, np.ndarray, np.ndarray, float]], out: str | Path) -> None:
    """Write a PNG of two columns of panels: image, ground truth, prediction, with the words and the IoU above.

    Args:
        panels: ((H, W, 3) uint8, words, (H, W) truth, (H, W) prediction, IoU) each.
    """
    columns = 2
    panel_w, panel_h = 3 * _CELL + 20, _CELL + _BAND + 8
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * panel_w + 8, rows * panel_h + _BAND + 8), "white")
    for c in range(columns):
        for k, title in enumerate(("image", "ground truth", "prediction")):
            _caption(sheet, (8 + c * panel_w + k * (_CELL + 4), 4), title, _CELL)
    for i, (pixels, text, truth, prediction, iou) in enumerate(panels):
        x, y = 8 + (i % columns) * panel_w, _BAND + 8 + (i // columns) * panel_h
        _caption(sheet, (x, y), f"“{text}”  IoU {iou:.2f}", panel_w - 20)
        for k, picture in enumerate((Image.fromarray(pixels), overlay(pixels, truth), overlay(pixels, prediction))):
            picture.thumbnail((_CELL, _CELL))
            sheet.paste(picture, (x + k * (_CELL + 4), y + _BAND + 2))
    with atomic_write(out) as f:
        sheet.save(f, "PNG")
