"""Inference outside of a data set: prompts read and checked, the model's inputs made of pictures and prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.dataset import Tokenize
from dit_ds.data.loading.prompts import Prompts, scale_coordinates
from dit_ds.data.loading.tokenize import make_token_check, make_tokenize
from dit_ds.data.loading.transforms import pad_square, resize_image
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import model_inputs
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
        raise UserError(f"the text {empty}: say what to segment, as --text 'the left star'")
    return expression


def expression_warnings(config: RunConfig, expression: str) -> list[str]:
    """A line for each way in which the model can't read the expression, as `read_expression` returned it."""
    tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
    found, length, lines = make_token_check(tokenizer, config.data.tokens)(expression), config.data.tokens, []
    if found.cut:
        rest = tokenizer.decode(found.ids[found.room :])
        lines.append(f"the model reads {length} tokens (data.tokens), and of the text not its end: '{rest}'")
    if found.mostly_unknown:
        lines.append(
            f"the model knows few words of the text: {found.unknown} of {len(found.ids)} tokens are "
            f"{tokenizer.unk_token} to its text encoder"
        )
    return lines


def check_coordinates(points: Sequence[Sequence[float]], box: Sequence[float] | None, height: int, width: int) -> None:
    """Refuse points and boxes that are not within a picture.

    Args:
        points, box: x and y, and XYXY, in pixels.
        height, width: of the picture.
    Raises:
        UserError: one isn't, or a box has no inside.
    """
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"the point {x:g},{y:g} is outside the picture, which is {width} wide and {height} high")
    if box is None:
        return
    x0, y0, x1, y1 = box
    said = f"the box {x0:g},{y0:g},{x1:g},{y1:g}"
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"{said} has no inside: give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
    if not (0 <= x0 and 0 <= y0 and x1 <= width and y1 <= height):
        raise UserError(f"{said} is not within the picture, which is {width} wide and {height} high")


def size_of(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width."""
    return pixels.shape[0], pixels.shape[1]


class InputMaker:
    """Makes a model's inputs of pictures and prompts, in numpy: in this process, or in a loader's.

    Args:
        config: of the model.
        trained: as for `build_eval_dataset`.
    """

    def __init__(self, config: RunConfig, trained: Sequence[str] | None = None):
        self._config = config
        self._trained = config.data.prompts if trained is None else trained

    @functools.cached_property
    def _tokenize(self) -> Tokenize:
        tokenizer = load_tokenizer(self._config.text.tokenizer or self._config.text.name)
        return make_tokenize(tokenizer, self._config.data.tokens)

    def resized(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (h, w, 3), as the model sees it, not yet padded."""
        return resize_image(pixels, self._config.data.image_size, self._config.data.resize)

    def prompt(
        self,
        text: str | None = None,
        points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
        *,
        original: tuple[int, int],
        resized: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """One prompt's arrays, by the names of the model's arguments.

        Args:
            text: the expression.
            points, box: x and y of points on the object, and XYXY around it, in pixels of the picture.
            original, resized: height and width of the picture, and of what `resized` makes of it.
        """
        given = (("text", text is not None), ("point", len(points) > 0), ("box", box is not None))
        prompts = Prompts.of(self._trained, self._config.data.points, [kind for kind, is_given in given if is_given])

        def scaled(xy: Any) -> np.ndarray:  # (n, 2)
            return scale_coordinates(np.reshape(xy, (-1, 2)), original=original, resized=resized)

        sample = prompts.points_and_labels(
            scaled(points) if len(points) else None, None if box is None else scaled(box)
        )
        if prompts.has_text:
            tokens, real = self._tokenize(normalise_expression(text or ""))  # (N,) each
            sample |= {"tokens": tokens, "token_mask": real & (text is not None)}
        return sample

    def collate(self, pictures: Sequence[np.ndarray], prompts: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """A batch, as `model_inputs` takes it, of pictures as `resized` made them and as many prompts."""
        side = self._config.data.image_size
        image = np.stack([pad_square(x, side).transpose(2, 0, 1) for x in pictures])  # (B, 3, S, S)
        batch = {"image": torch.from_numpy(image), "size": torch.tensor([x.shape[:2] for x in pictures])}
        return batch | {k: torch.from_numpy(np.stack([p[k] for p in prompts])) for k in prompts[0]}


def picture_inputs(
    config: RunConfig,
    pixels: np.ndarray,
    *,
    text: str | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The model's inputs for one picture.

    Args:
        pixels: (H, W, 3) uint8.
        text, trained: as for `InputMaker`.
    Returns:
        The arguments of the model's `forward`, by name, on `device()`, of a batch of one.
    """
    maker = InputMaker(config, trained)
    small = maker.resized(pixels)
    prompt = maker.prompt(text, original=size_of(pixels), resized=size_of(small))
    return model_inputs(maker.collate([small], [prompt]), device())
