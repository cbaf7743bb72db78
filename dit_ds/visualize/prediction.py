"""One picture, segmented and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit_ds.checkpointing.weights import load_model
from dit_ds.data.picture import read_picture
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import (
    check_kind,
    device,
    expression_warnings,
    read_expression,
    segment,
    trained_prompts,
)
from dit_ds.files import refuse_overwriting
from dit_ds.visualize.drawing import picture_format, save_picture, side_by_side


@torch.no_grad()
def predict_image(
    path: str,
    image: str,
    out: str,
    *,
    text: str | None = None,
    points: Sequence[tuple[float, ...]] = (),
    box: tuple[float, ...] | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """`dit-ds predict`: write the picture beside the picture with the mask.

    Args:
        path: as for `load_model`.
        image: file of the picture, which is turned as viewers turn it.
        out: picture to write, in the format of its ending.
        text, points, box: at least one of them, in pixels of the turned picture; with `threshold` as for `segment`.
    Returns:
        `out`, the prompts, `covered`, the share of the picture that the mask covers, and `warnings`, a line each.
    Raises:
        UserError: no prompt, one outside the picture or that the model can't read, or a file that can't be read.
    """
    if text is None and not points and box is None:
        raise UserError("nothing says what to segment: give --text, --point or --box")
    expression = None if text is None else read_expression(text)
    picture_format(out)
    refuse_overwriting(out, image)
    pixels = read_picture(image)
    check_coordinates(points, box, *pixels.shape[:2])
    model, config, meta = load_model(path)
    for kind, is_given in (("text", text is not None), ("point", bool(points)), ("box", box is not None)):
        if is_given:
            check_kind(config, kind)
    model.to(device())
    trained = trained_prompts(config, meta)
    mask = segment(model, config, pixels, text=expression, points=points, box=box, threshold=threshold, trained=trained)
    given: dict[str, Any] = {"text": text} if text is not None else {}
    given |= {"points": [list(p) for p in points]} if points else {}
    given |= {"box": list(box)} if box is not None else {}
    save_picture(side_by_side(pixels, mask, text or ", ".join(f"{k} {v}" for k, v in given.items())), out)
    warnings = [] if expression is None else expression_warnings(config, expression)
    return {"out": out} | given | {"covered": round(float(mask.mean()), 4), "warnings": warnings}


def check_coordinates(
    points: Sequence[tuple[float, ...]], box: tuple[float, ...] | None, height: int, width: int
) -> None:
    """Refuse points and boxes that are not within the picture."""
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"--point {x:g},{y:g} is outside the picture, which is {width} wide and {height} high")
    if box is None:
        return
    x0, y0, x1, y1 = box
    said = f"--box {x0:g},{y0:g},{x1:g},{y1:g}"
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"{said} has no inside: give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
    if not (0 <= x0 and 0 <= y0 and x1 <= width and y1 <= height):
        raise UserError(f"{said} is not within the picture, which is {width} wide and {height} high")
