"""The interface for Python programs: `dit_ds.load(path)` gives a `Predictor`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from dit_ds.checkpointing.weights import LoadedModel, load_model
from dit_ds.config.schema import RunConfig
from dit_ds.data.picture import pillow_pixels, read_picture
from dit_ds.errors import UserError
from dit_ds.evaluation import inference
from dit_ds.evaluation.inference import (
    InputMaker,
    check_coordinates,
    check_kind,
    read_expression,
    size_of,
    trained_prompts,
)
from dit_ds.evaluation.postprocess import MaskPostprocess, ScoredMask, run_model
from dit_ds.models.segmenter import Segmenter

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
Pictures = list[Picture] | list[str] | list[Path] | list[Image.Image] | list[np.ndarray] | tuple[Picture, ...]
Texts = list[str] | tuple[str, ...]


class Predictor:
    """A model that segments pictures.

    Args:
        loaded: of `load_model`.
        device: where it runs; by default the current GPU, else the CPU.
        threshold: a pixel is in if its probability exceeds this; by default the run's.

    Attributes:
        model: a torch module in evaluation mode, on `device`.
        config: of the run.
        device: where it is.
        inputs: makes its inputs.
        postprocess: makes masks of its logits.
    """

    def __init__(
        self, loaded: LoadedModel, device: str | torch.device | None = None, threshold: float | None = None
    ) -> None:
        self.device = inference.device() if device is None else torch.device(device)
        self.model: Segmenter = loaded.model.to(self.device)
        self.config: RunConfig = loaded.config
        self.inputs = InputMaker(loaded.config, trained_prompts(loaded.config, loaded.meta))
        self.postprocess = MaskPostprocess.from_config(loaded.config, threshold)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device | None = None, threshold: float | None = None
    ) -> Predictor:
        """The model of a run's folder, a checkpoint's, an exported file, or a YAML: see `load_model`.

        Raises:
            UserError: as of `load_model`.
        """
        return cls(load_model(path), device, threshold)

    @overload
    def segment(
        self,
        image: Picture,
        text: str | None = None,
        *,
        points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
    ) -> ScoredMask: ...

    @overload
    def segment(self, image: Pictures, text: str | Texts) -> list[ScoredMask]: ...

    @overload
    def segment(self, image: Picture, text: Texts) -> list[ScoredMask]: ...

    def segment(
        self,
        image: Picture | Pictures,
        text: str | Texts | None = None,
        *,
        points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
    ) -> ScoredMask | list[ScoredMask]:
        """Segment what words, points or a box mean.

        Args:
            image: a picture's path; an image of Pillow's; or (H, W, 3) uint8, RGB. Files and Pillow's images are turned as
                viewers turn them. Or a list of these.
            text: the expression; or a list: of several for one picture, which is decoded once, or of one for each
                picture. One expression for a list of pictures is meant for each of them.
            points: x and y of points on the object, in pixels of the picture; of one picture only.
            box: XYXY around it, in pixels of the picture; of one picture only.
        Returns:
            `mask, score`: (H, W) bool, of the picture's size, and the mean probability of the mask's pixels, 0 of an empty
            mask. A list of these, in order, where `image` or `text` is a list.
        Raises:
            UserError: no prompt, one outside the picture or that the model can't read, or a picture that can't be used.
        """
        one_image, one_text = not isinstance(image, (list, tuple)), not isinstance(text, (list, tuple))
        images: list[Any] = [image] if one_image else list(image)  # type: ignore[arg-type]
        texts: list[Any] = [text] if one_text else list(text)  # type: ignore[arg-type]
        single = one_image and one_text
        if not single and (len(points) or box is not None):
            raise UserError("points and a box are of one picture, with one text: segment lists without them")
        if not one_image and not one_text and len(images) != len(texts):
            raise UserError(
                f"{len(images)} pictures and {len(texts)} texts: give a text for each picture, or one for all"
            )
        self._check_prompt(texts, points, box)
        expressions = [None if t is None else read_expression(t) for t in texts]
        if one_image:
            images = images * len(texts)
        elif one_text:
            expressions = expressions * len(images)
        found = list(self._batches(images, expressions, points, box))
        return found[0] if single else found

    def _check_prompt(self, texts: Sequence[Any], points: Sequence[Any], box: Sequence[float] | None) -> None:
        given = {"text": any(t is not None for t in texts), "point": len(points) > 0, "box": box is not None}
        if texts and not any(given.values()):
            raise UserError("nothing says what to segment: give a text, points or a box")
        wrong = [t for t in texts if not isinstance(t, str) and t is not None or (t is None and len(texts) > 1)]
        if wrong:
            raise UserError(f"{wrong[0]!r} is no text: give words, as 'the left star'")
        for kind, is_given in given.items():
            if is_given:
                check_kind(self.config, kind)

    def _batches(
        self,
        images: Sequence[Any],
        expressions: Sequence[str | None],
        points: Sequence[Sequence[float]],
        box: Sequence[float] | None,
    ) -> Iterator[ScoredMask]:
        last, pixels, small = None, np.zeros(0), np.zeros(0)
        size = self.config.eval.batch_size
        for start in range(0, len(images), size):
            pictures, prompts, shapes = [], [], []
            for image, expression in zip(images[start : start + size], expressions[start : start + size]):
                if image is not last:
                    pixels, last = read_pixels(image), image
                    small = self.inputs.resized(pixels)
                    check_coordinates(points, box, *size_of(pixels))
                pictures.append(small)
                prompts.append(
                    self.inputs.prompt(expression, points, box, original=size_of(pixels), resized=size_of(small))
                )
                shapes.append(size_of(pixels))
            yield from self.predict(self.inputs.collate(pictures, prompts), shapes)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> Iterator[ScoredMask]:
        """A batch's masks.

        Args:
            batch: of `InputMaker.collate`.
            shapes: each picture's original height and width.
        """
        logits, denied = run_model(self.model, batch, self.device, self.postprocess)
        for i, shape in enumerate(shapes):
            found = self.postprocess.scored(logits[i], batch["size"][i], shape, self.config.data.image_size)
            yield found.emptied() if denied is not None and denied[i] else found


def read_pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a path, an image of Pillow's, or an array of this form.

    Raises:
        UserError: it is none of these, or can't be read.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_picture(os.fspath(image))
    if isinstance(image, Image.Image):
        try:
            return pillow_pixels(image)
        except ValueError as e:
            raise UserError(f"cannot read the picture {image!r} ({e})") from None
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return image
    what = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    raise UserError(f"a picture is a path, an image of Pillow's, or an array of uint8 (H, W, 3), RGB: this is {what}")
