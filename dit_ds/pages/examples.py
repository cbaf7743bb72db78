"""The expressions of a split that runs segment best and worst, as small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from dit_ds.checkpointing.weights import load_model, with_data_root
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.progress import progress_bar
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import device
from dit_ds.pages.run_folder import cut
from dit_ds.visualize.drawing import overlay
from dit_ds.visualize.figures import predictions

_SIDE = 260  # pixels: longer side of a picture
_QUALITY = 80


@dataclass(frozen=True)
class Shown:
    """One expression of a gallery.

    Attributes:
        sample: its number in the split.
        image, truth: pictures, as `data:` addresses.
        predicted: of each run, picture and IoU.
    """

    sample: int
    text: str
    image: str
    truth: str
    predicted: list[tuple[str, float]]


@dataclass(frozen=True)
class Gallery:
    """Expressions of one split, by the runs that were trained for the same set.

    Attributes:
        set: as refcoco/unc.
        runs: their names.
        looked_at, total: expressions that were predicted, and that the split has.
        miou: of each run, of those predicted.
        groups: titles, and the expressions below.
    """

    set: str
    split: str
    runs: list[str]
    looked_at: int
    total: int
    miou: list[float]
    groups: list[tuple[str, list[Shown]]]


@dataclass
class _Group:
    """Runs that read the same shards.

    Attributes:
        chosen: the expressions' numbers in the split.
        texts, scores: of each expression; of each run, its IoU of each.
        truths, masks: run lengths of each expression; of each run.
    """

    dataset: ExpressionDataset
    chosen: list[int]
    texts: list[str]
    truths: list[Any]
    runs: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    masks: list[list[Any]] = field(default_factory=list)


def make_galleries(
    runs: Sequence[tuple[str, str]], split: str | None, *, data_root: str | None, looked_at: int, shown: int
) -> tuple[list[Gallery], list[str]]:
    """Predict some expressions of a split by each run, and show the worst and the best.

    Args:
        runs: names and folders.
        split: by default the one that a run was evaluated on in training.
        data_root: where the shards are, if they moved since training.
        looked_at: expressions to predict, spread over the split; all where it has no more.
        shown: of the worst, and of the best.
    Returns:
        A gallery for each set of shards, and a line for each run that has none: the checkpoint or the shards are not
        there, or can't be read.
    """
    groups: dict[tuple[str, str, str], _Group] = {}
    without = []
    for name, path in runs:
        try:
            _predict(groups, name, path, split, data_root=data_root, looked_at=looked_at)
        except UserError as e:
            without.append(f"{name}: {e}")
    return [_gallery(key[0], key[1], group, shown) for key, group in groups.items()], without


def _predict(
    groups: dict[tuple[str, str, str], _Group],
    name: str,
    path: str,
    split: str | None,
    *,
    data_root: str | None,
    looked_at: int,
) -> None:
    """Add a run to the group of its shards."""
    model, config, _ = load_model(path)
    split = split or config.data.val_split
    dataset = build_eval_dataset(with_data_root(path, config, data_root), split)
    chosen = [int(s) for s in np.linspace(0, len(dataset) - 1, min(looked_at, len(dataset)))]
    found = predictions(model.to(device()), config, dataset, chosen, batch_size=config.eval.batch_size)
    texts, truths, scores, masks = [], [], [], []
    for p in progress_bar(found, f"predict {name}", total=len(chosen), leave=False):
        nothing = dataset.index.generalized and not p.truth.any() and p.mask.sum() < config.eval.no_target_pixels
        texts.append(cut(p.text))
        scores.append(1.0 if nothing else p.iou)  # nothing was meant, and nothing is predicted
        truths.append(_encode(p.truth))
        masks.append(_encode(p.mask))
    key = (config.data.val_set, split, dataset.index.manifest_sha)
    group = groups.setdefault(key, _Group(dataset, chosen, texts, truths))
    group.runs.append(name)
    group.scores.append(scores)
    group.masks.append(masks)


def _encode(mask: np.ndarray) -> Any:
    return coco.encode(np.asfortranarray(mask, np.uint8))


def _gallery(set_name: str, split: str, group: _Group, shown: int) -> Gallery:
    scores = np.array(group.scores)  # (runs, expressions)
    mean, spread = scores.mean(0), np.ptp(scores, axis=0)
    order = np.argsort(mean, kind="stable")
    worst, best = order[:shown], order[::-1][:shown]
    groups = [("Worst", worst), ("Best", best)]
    if len(group.runs) > 1:
        groups.append(("Where the runs differ most", np.argsort(-spread, kind="stable")[:shown]))
    pictures = [(title, [_shown(group, int(i)) for i in chosen]) for title, chosen in groups]
    miou = scores.mean(1).tolist()
    looked_at, total = len(group.chosen), len(group.dataset)
    return Gallery(set_name, split, group.runs, looked_at=looked_at, total=total, miou=miou, groups=pictures)


def _shown(group: _Group, i: int) -> Shown:
    pixels = group.dataset.full_image(group.chosen[i])

    def masked(rle: Any) -> str:
        return data_address(overlay(pixels, coco.decode(rle).astype(bool)))

    predicted = [(masked(masks[i]), scores[i]) for masks, scores in zip(group.masks, group.scores)]
    image, truth = data_address(Image.fromarray(pixels)), masked(group.truths[i])
    return Shown(group.chosen[i], group.texts[i], image, truth, predicted)


def data_address(image: Image.Image, side: int = _SIDE) -> str:
    """A picture as a JPEG in a `data:` address, no larger than `side` pixels."""
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
