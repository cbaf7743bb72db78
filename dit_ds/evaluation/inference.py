"""Inference on one picture: its text read, the model's inputs made, its mask predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.prompts import Prompts, scale_coordinates
from dit_ds.data.loading.tokenize import make_token_check, make_tokenize
from dit_ds.data.loading.transforms import pad_square, resize_image
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.models.text_encoder import load_tokenizer


def trained_prompts(config: RunConfig, meta: dict[str, Any]) -> Sequence[str]:
    """The kinds of prompts that a model was trained with; none at step 0, where the weights are SAM's.

    Args:
        meta: of the checkpoint, see `load_model`.
    """
    return config.data.prompts if meta["step"] else ()


def device() -> torch.device:
    """The device of a single process: the current GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_kind(config: RunConfig, kind: str) -> None:
    """Refuse a prompt that the model can't read.

    Raises:
        UserError: LAVT and ReLA read text only; a model that was not trained on text can't read it.
    """
    if kind == "text" and "text" not in config.data.prompts:
        learned = " or ".join(config.data.prompts)
        raise UserError(f"the model learned no words (data.prompts {config.data.prompts}): prompt it with a {learned}")
    if kind != "text" and config.model.name != "dit_sam":
        raise UserError(f"model.name {config.model.name} reads words only: it can't be prompted with a {kind}")


def read_expression(text: str) -> str:
    """The expression as the model is given it, and as a set would hold it: `normalise_expression`.

    Raises:
        UserError: it has no word.
    """
    expression = normalise_expression(text)
    if not expression:
        empty = "is empty" if not text.strip() else f"'{text}' has no word"
        raise UserError(f"--text {empty}: say what to segment, as --text 'the left star'")
    return expression


def expression_warnings(config: RunConfig, expression: str) -> list[str]:
    """A line for each way in which the model can't read the expression, as `read_expression` returned it."""
    tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
    found, length, lines = make_token_check(tokenizer, config.data.tokens)(expression), config.data.tokens, []
    if found.cut:
        rest = tokenizer.decode(found.ids[found.room :])
        lines.append(f"the model reads {length} tokens (data.tokens), and of --text not its end: '{rest}'")
    if found.mostly_unknown:
        lines.append(
            f"the model knows few words of --text: {found.unknown} of {len(found.ids)} tokens are "
            f"{tokenizer.unk_token} to its text encoder"
        )
    return lines


@torch.no_grad()
def segment(
    model: Any,
    config: RunConfig,
    pixels: np.ndarray,
    *,
    text: str | None = None,
    points: Sequence[tuple[float, ...]] = (),
    box: tuple[float, ...] | None = None,
    threshold: float | None = None,
    trained: Sequence[str] | None = None,
) -> np.ndarray:
    """Segment one picture.

    Args:
        pixels: (H, W, 3) uint8.
        text: the expression.
        points: x and y of points on the object, in pixels of the picture.
        box: XYXY around it, in pixels of the picture.
        threshold: a pixel is in if its probability exceeds this; by default the configuration's.
        trained: as for `build_eval_dataset`.
    Returns:
        (H, W) bool.
    """
    inputs = picture_inputs(config, pixels, text=text, points=points, box=box, trained=trained)
    logits = model(**inputs).cpu()  # (1, s, s)
    postprocess = MaskPostprocess.from_config(config, threshold)
    return postprocess(logits[0], inputs["size"][0], pixels.shape[:2], config.data.image_size).numpy()


def picture_inputs(
    config: RunConfig,
    pixels: np.ndarray,
    *,
    text: str | None = None,
    points: Sequence[tuple[float, ...]] = (),
    box: tuple[float, ...] | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The model's inputs for one picture.

    Args:
        pixels, text, points, box, trained: as for `segment`.
    Returns:
        The arguments of the model's `forward`, by name, on `device()`, of a batch of one.
    """
    d = config.data
    small = resize_image(pixels, d.image_size, d.resize)  # (h, w, 3)
    asked = [k for k, is_given in (("text", text is not None), ("point", points), ("box", box is not None)) if is_given]
    prompts = Prompts.of(d.prompts if trained is None else trained, d.points, asked)

    def scaled(xy: Any) -> np.ndarray:  # (n, 2)
        return scale_coordinates(np.reshape(xy, (-1, 2)), original=pixels.shape[:2], resized=small.shape[:2])

    sample = prompts.points_and_labels(scaled(points) if points else None, None if box is None else scaled(box))
    if prompts.has_text:
        tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
        tokens, real = make_tokenize(tokenizer, d.tokens)(normalise_expression(text or ""))  # (N,) each
        sample |= {"tokens": tokens, "token_mask": real & (text is not None)}
    batch = {k: torch.from_numpy(x)[None] for k, x in sample.items()}
    batch["image"] = torch.from_numpy(pad_square(small, d.image_size).transpose(2, 0, 1).copy())[None]  # (1, 3, S, S)
    batch["size"] = torch.tensor([small.shape[:2]])
    return model_inputs(batch, device())
