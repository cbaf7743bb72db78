"""What a trained checkpoint does: evaluate a split, segment one picture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import Prompts, scale_places
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import pad_square, resize_image
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.models.text_encoder import load_tokenizer

_log = logging.getLogger("dit_ds")


def trained_prompts(config: RunConfig, meta: dict[str, Any]) -> Sequence[str]:
    """The kinds of prompts that a model was trained with: weights that were not tuned, at step 0, are SAM's own."""
    return config.data.prompts if meta["step"] else ()


def device() -> torch.device:
    """Where one process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_kind(config: RunConfig, kind: str) -> None:
    """Refuse a prompt that the model can't read.

    Raises:
        UserError: LAVT and ReLA read words only; words mean nothing to a model that never learned any.
    """
    if kind == "text" and "text" not in config.data.prompts:
        learned = " or ".join(config.data.prompts)
        raise UserError(f"the model learned no words (data.prompts {config.data.prompts}): prompt it with a {learned}")
    if kind != "text" and config.model.name != "dit_sam":
        raise UserError(f"model.name {config.model.name} reads words only: it can't be prompted with a {kind}")


def read_expression(text: str) -> str:
    """The words as the model is given them.

    Raises:
        UserError: there are none.
    """
    if not text.strip():
        raise UserError("--text is empty: say what to segment, as --text 'the left star'")
    return text.strip().lower()


def read_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8.

    Raises:
        UserError: it isn't there, or no picture.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as e:
        raise UserError(f"cannot read the picture {path} ({e.strerror or e})") from None


@torch.no_grad()
def segment(
    model: Any,
    config: RunConfig,
    pixels: np.ndarray,
    text: str | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
    threshold: float | None = None,
    trained: Sequence[str] | None = None,
) -> np.ndarray:
    """Segment one picture.

    Args:
        pixels: (H, W, 3) uint8.
        text: words.
        points: x and y of points on the object, in pixels of the picture.
        box: XYXY around it.
        trained: as for `build_eval_dataset`.
    Returns:
        (H, W) bool.
    """
    inputs = picture_inputs(config, pixels, text, points, box, trained)
    logits = model(**inputs).cpu()
    binarize = MaskPostprocess.of(config, threshold)
    return binarize(logits[0], inputs["size"][0], pixels.shape[:2], config.data.image_size).numpy()


def picture_inputs(
    config: RunConfig,
    pixels: np.ndarray,
    text: str | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """What the model takes, of one sample, by name and on its device; arguments as of `segment`."""
    d = config.data
    small = resize_image(pixels, d.image_size, d.resize)
    shape = torch.tensor([small.shape[:2]])
    given = {"text": text is not None, "point": bool(points), "box": box is not None}
    trained = d.prompts if trained is None else trained
    prompts = Prompts.of(trained, d.points, [k for k, is_given in given.items() if is_given])
    places = functools.partial(scale_places, original=pixels.shape[:2], resized=small.shape[:2])
    sample = prompts.lay_out(
        places(points) if points else None, None if box is None else places(np.reshape(box, (2, 2)))
    )
    if prompts.words:
        tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
        tokens, real = make_tokenize(tokenizer, d.tokens)(text or "")
        sample |= {"tokens": tokens, "token_mask": real & (text is not None)}
    batch = {k: torch.from_numpy(x)[None] for k, x in sample.items()}
    batch["image"] = torch.from_numpy(pad_square(small, d.image_size).transpose(2, 0, 1).copy())[None]
    return model_inputs(batch | {"size": shape}, device())
