"""One picture, segmented and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_ds.data.picture import read_picture
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import check_coordinates, expression_warnings, read_expression, size_of
from dit_ds.evaluation.predictor import Predictor
from dit_ds.files import refuse_overwriting
from dit_ds.visualize.drawing import picture_format, save_picture, side_by_side


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
        text, points, box: at least one of them, in pixels of the turned picture.
        threshold: a pixel is in if its probability exceeds this; by default the run's.
    Returns:
        `out`, the prompts, `covered`, the share of the picture that the mask covers, `score`, the mean probability of its
        pixels, and `warnings`, a line each.
    Raises:
        UserError: no prompt, one outside the picture or that the model can't read, or a file that can't be read.
    """
    if text is None and not points and box is None:
        raise UserError("nothing says what to segment: give --text, --point or --box")
    expression = None if text is None else read_expression(text)
    picture_format(out)
    refuse_overwriting(out, image)
    pixels = read_picture(image)
    check_coordinates(points, box, *size_of(pixels))
    predictor = Predictor.load(path, threshold=threshold)
    mask, score = predictor.segment(pixels, text, points=points, box=box)
    given: dict[str, Any] = {"text": text} if text is not None else {}
    given |= {"points": [list(p) for p in points]} if points else {}
    given |= {"box": list(box)} if box is not None else {}
    save_picture(side_by_side(pixels, mask, text or ", ".join(f"{k} {v}" for k, v in given.items())), out)
    warnings = [] if expression is None else expression_warnings(predictor.config, expression)
    found = {"covered": round(float(mask.mean()), 4), "score": round(score, 4)}
    return {"out": out} | given | found | {"warnings": warnings}
