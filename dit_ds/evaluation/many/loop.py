"""The loop over many pictures: batches of expressions and tiles through the model, answers in the order of the source."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_ds.data.loading.loader import iterate
from dit_ds.evaluation.many.pictures import Cut, PictureDataset, ReadPicture
from dit_ds.evaluation.many.sources import Source
from dit_ds.evaluation.many.tiles import Tiling
from dit_ds.evaluation.postprocess import ScoredMask, run_model
from dit_ds.evaluation.predictor import Predictor


@dataclass(frozen=True)
class Answer:
    """What the model says of one expression.

    Attributes:
        expression: see `Source.expressions`.
        picture: which of the source's.
        found: the mask and its score; emptied where there is no target.
        no_target: the model says that there is none; None where it can't.
        vetoed: (H, W) bool, the mask that a no-target head did not let count.
        error: why the picture can't be read; the rest means nothing then.
    """

    expression: dict[str, Any]
    picture: int
    found: ScoredMask
    no_target: bool | None = None
    vetoed: np.ndarray | None = None
    error: str | None = None


class _Unit(NamedTuple):
    """A tile of a picture with one of its expressions: (3, S, S), and the height and width before padding."""

    image: Tensor
    size: Tensor
    picture: ReadPicture
    expression: int
    tile: int


@torch.no_grad()
def predict_pictures(
    predictor: Predictor, source: Source, cut: Cut, *, batch_size: int, workers: int, done: int = 0
) -> Iterator[list[Answer]]:
    """Segment what every expression of a source means.

    Whole pictures are put into batches as `evaluate` puts a split's, so that both give the same masks to the bit.

    Args:
        predictor: the model.
        cut: how pictures are cut; probabilities of tiles are merged, and then thresholded by any mask rule.
        batch_size: expressions, or tiles, at once.
        workers: processes that read pictures; 0 reads in this one.
        done: so many expressions were answered before.
    Yields:
        After each batch the answers that it completed, in order.
    Raises:
        UserError: a picture can't be read, unless `cut.skip_bad`.
        RankFailed: a worker died or stalled.
    """
    data = predictor.config.data
    dataset = PictureDataset(source, predictor.inputs, data.image_size, cut, batch_size=batch_size, done=done)
    merger = _Merger(predictor, cut, source.generalized)
    for units in _batches(iterate(dataset.loader(workers, data.worker_timeout)), batch_size):
        batch = {"image": torch.stack([u.image for u in units]), "size": torch.stack([u.size for u in units])}
        prompts = [u.picture.prompts[u.expression] for u in units]
        batch |= {key: torch.from_numpy(np.stack([p[key] for p in prompts])) for key in prompts[0]}
        logits, denied = run_model(predictor.model, batch, predictor.device, predictor.postprocess)
        says = [None] * len(units) if denied is None else denied.tolist()
        answers = [merger.add(unit, x, none) for unit, x, none in zip(units, logits, says)]
        yield [a for a in answers if a is not None]


def _batches(chunks: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[_Unit]]:
    units: list[_Unit] = []
    for chunk in chunks:
        for picture in chunk["pictures"]:
            for expression, tile in itertools.product(range(len(picture.expressions)), range(picture.tiles)):
                row = picture.first + tile
                units.append(_Unit(chunk["image"][row], chunk["size"][row], picture, expression, tile))
                if len(units) == batch_size:
                    yield units
                    units = []
    if units:
        yield units


class _Merger:
    """Makes answers of logits, which come in order."""

    def __init__(self, predictor: Predictor, cut: Cut, generalized: bool):
        self._postprocess, self._side = predictor.postprocess, predictor.config.data.image_size
        self._cut, self._generalized = cut, generalized
        self._map: Tensor | None = None  # of the picture and expression whose tiles are coming
        self._denied: list[bool] = []

    def add(self, unit: _Unit, logits: Tensor, denied: bool | None) -> Answer | None:
        """The answer, if this was its last tile.

        Args:
            logits: (s, s).
            denied: what a no-target head says, if there is one.
        """
        picture, size, tiles = unit.picture, unit.size, unit.picture.tiles
        expression, number = picture.expressions[unit.expression], picture.number
        if picture.error is not None:
            return Answer(expression, number, ScoredMask(np.zeros(picture.shape, bool), 0.0), error=picture.error)
        if tiles == 1:
            found = self._postprocess.scored(logits, size, picture.shape, self._side)
            return self._answer(expression, number, found, denied)
        if self._map is None:
            self._map, self._denied = torch.zeros(picture.shape, device=logits.device), []
        self._denied.append(bool(denied))
        if not denied:
            tiling = Tiling(*picture.shape, self._cut.tile, self._cut.overlap)
            tile = tiling.tiles[unit.tile]
            inside = (tile.bottom - tile.top, tile.right - tile.left)
            tiling.blend(self._map, unit.tile, self._postprocess.probabilities(logits, size, inside, self._side))
        if unit.tile + 1 < tiles:
            return None
        found = ScoredMask.of(self._map > self._postprocess.threshold, self._map)
        self._map = None
        return self._answer(expression, number, found, None if denied is None else all(self._denied))

    def _answer(self, expression: dict[str, Any], picture: int, found: ScoredMask, denied: bool | None) -> Answer:
        if denied is None and not self._generalized:
            return Answer(expression, picture, found)
        if denied is None:
            none = found.mask.sum() < max(1, self._postprocess.no_target_pixels)
            return Answer(expression, picture, found.emptied() if none else found, bool(none))
        if not denied:
            return Answer(expression, picture, found, False)
        return Answer(expression, picture, found.emptied(), True, found.mask)
