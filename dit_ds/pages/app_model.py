"""The model behind `dit-ds app`: what it answers for one picture, as pictures that a page shows."""

from __future__ import annotations

import base64
import io
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dit_ds.checkpointing.weights import load_model, with_data_root
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import (
    check_coordinates,
    check_kind,
    expression_warnings,
    read_expression,
    size_of,
    trained_prompts,
)
from dit_ds.evaluation.postprocess import ScoredMask
from dit_ds.evaluation.predictor import Predictor
from dit_ds.visualize.attention import Attended, attend
from dit_ds.visualize.drawing import heat
from dit_ds.visualize.titles import title_of

_log = logging.getLogger("dit_ds")

PREVIEW = 1024  # pixels: longer side of a picture in the page
_PANEL = 240  # pixels: longer side of a layer's attention
_TINT = (255, 60, 40)
_SAMPLES = 12
_PLACES = {"point": "points", "box": "boxes"}


@dataclass(frozen=True)
class Sample:
    """A picture of the split, with an expression that it has there.

    Attributes:
        pixels: (H, W, 3) uint8.
    """

    pixels: np.ndarray
    text: str


class AppModel:
    """A checkpoint's model, asked by one thread at a time.

    Args:
        path: as for `load_model`.
    Raises:
        UserError: as of `load_model`.
    """

    def __init__(self, path: str):
        loaded = load_model(path)
        self.path, self.config, self._meta = path, loaded.config, loaded.meta
        self._predictor = Predictor(loaded)
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """What the page says of the model, and which prompts it can be given."""
        config = self.config
        words = "text" in config.data.prompts
        trained = trained_prompts(config, self._meta)
        places = config.model.name == "dit_sam"
        return {
            "title": f"{title_of(config)}, {config.model.size}, step {self._meta['step']:,}",
            "words": words,
            "places": places,
            "untrained": [many for one, many in _PLACES.items() if places and one not in trained],
            "attention": words and places,
        }

    def warm_up(self) -> None:
        """Load what a first answer loads, on a picture of nothing."""
        words = self.describe()["words"]
        self.answer(np.zeros((64, 64, 3), np.uint8), "a" if words else "", [] if words else [(32.0, 32.0)], None)

    def samples(self, split: str | None, data_root: str | None) -> list[Sample]:
        """Pictures of a split, spread over it; none, and a line in the log, where there are no shards."""
        config = self.config
        try:
            dataset = build_eval_dataset(
                with_data_root(self.path, config, data_root),
                split or config.data.val_split,
                kind="text",
                trained=["text"],
            )
            index = dataset.index
            _, first = np.unique(index.refs[index.sentences, 0], return_index=True)  # of each picture, an expression
            chosen = [int(first[int(i)]) for i in np.linspace(0, len(first) - 1, min(_SAMPLES, len(first)))]
            batches: Any = [[(0, s, 1.0)] for s in chosen]  # (epoch, sample, weight), as a batch sampler's
            texts = [batch["text"][0] for batch in iterate(make_loader(dataset, batches, workers=0, pin=False))]
            return [Sample(dataset.full_image(s), text) for s, text in zip(chosen, texts)]
        except UserError as e:
            if data_root or split:
                raise
            _log.info(f"no pictures to choose from: {e}")
            return []

    def answer(
        self,
        pixels: np.ndarray,
        text: str,
        points: Sequence[tuple[float, float]],
        box: tuple[float, float, float, float] | None,
    ) -> dict[str, Any]:
        """Segment a picture.

        Args:
            pixels: (H, W, 3) uint8.
            text: what is meant; empty where points or a box say it.
            points, box: in pixels of the picture.
        Returns:
            `mask`, a picture to lay over the picture; `file`, the mask in full size; `covered`, the share of the picture;
            `score`, the mean probability of the mask's pixels; `layers`, of each its `title`, `picture` and `label`; `warnings`.
        Raises:
            UserError: no prompt, or one that the model can't read.
        """
        expression = read_expression(text) if text.strip() else None
        if expression is None and not points and box is None:
            raise UserError("nothing says what to segment: type words, or set points or a box in the picture")
        for kind, is_given in (("text", expression is not None), ("point", bool(points)), ("box", box is not None)):
            if is_given:
                check_kind(self.config, kind)
        check_coordinates(points, box, *size_of(pixels))
        with self._lock:
            found, attended = self._predict(pixels, expression, points, box)
        if attended is not None:
            warnings = attended.warnings
        else:
            warnings = [] if expression is None else expression_warnings(self.config, expression)
        return {
            "mask": _png(_tinted(found.mask)),
            "file": _png(Image.fromarray(found.mask)),
            "covered": float(found.mask.mean()),
            "score": found.score,
            "layers": [] if attended is None else _panels(pixels, attended),
            "warnings": warnings,
        }

    def _predict(
        self, pixels: np.ndarray, text: str | None, points: Sequence[tuple[float, ...]], box: tuple[float, ...] | None
    ) -> tuple[ScoredMask, Attended | None]:
        """The mask, and where there are words for a SAM what its layers attend to."""
        if text is not None and self.config.model.name == "dit_sam":
            attended = attend(self._predictor, self.path, pixels, text, points=points, box=box)
            return attended.prediction, attended
        return self._predictor.segment(pixels, text, points=points, box=box), None


def preview(pixels: np.ndarray, side: int = PREVIEW) -> bytes:
    """A picture as a JPEG of at most `side` pixels a side."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _tinted(mask: np.ndarray) -> Image.Image:
    """A mask as a colour where it is, transparent elsewhere."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.thumbnail((PREVIEW, PREVIEW), Image.Resampling.NEAREST)
    image.putpalette([0, 0, 0, *_TINT])
    image.info["transparency"] = bytes([0, 140])
    return image


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", **({"transparency": image.info["transparency"]} if "transparency" in image.info else {}))
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _panels(pixels: np.ndarray, attended: Attended) -> list[dict[str, str]]:
    """Each layer's attention over the picture in grey."""
    small = Image.fromarray(pixels).convert("L")
    small.thumbnail((_PANEL, _PANEL))
    grey = np.asarray(small, np.float32)
    scale = grey.shape[0] / pixels.shape[0]
    patch = (attended.patch[0] * scale, attended.patch[1] * scale)
    panels = []
    for layer, (values, label) in attended.panels().items():
        out = io.BytesIO()
        Image.fromarray(heat(grey, values, patch)).save(out, "JPEG", quality=85)
        picture = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
        panels.append({"title": f"layer {layer}", "picture": picture, "label": label})
    return panels
