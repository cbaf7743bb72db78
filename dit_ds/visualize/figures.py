"""The paper's figure 4 from your own checkpoints: predictions side by side; and sheets of a split's expressions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_ds.checkpointing.weights import load_model, with_data_root
from dit_ds.config.schema import RunConfig
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, JSON, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.masks import decode_rle
from dit_ds.data.picture import decode_picture
from dit_ds.data.shards.storage import local
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import device
from dit_ds.evaluation.metrics import intersection_and_union
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.files import refuse_overwriting
from dit_ds.visualize.drawing import GridRow, picture_format, write_grid
from dit_ds.visualize.titles import title_of

_SHEET, _ACROSS = 24, 3  # expressions of `draw_sheet`, and how many side by side


def grid(
    paths: list[str],
    out: str,
    split: str = "val",
    *,
    data_root: str | None = None,
    rows: int = 8,
    samples: list[int] | None = None,
    wrong_below: float = 0.5,
    titles: list[str] | None = None,
    across: int = 1,
    scale: int = 2,
) -> dict[str, Any]:
    """`dit-ds grid` (paper, figure 4): the same expressions, segmented by each checkpoint, wrong ones framed red.

    Args:
        paths: checkpoints of one data set, of any method and image size.
        data_root: where the shards are; by default where each run read them, if that is a local folder.
        rows: number of expressions, spread over the split.
        samples: the expressions to show instead, by their number in the split from 0 on.
        wrong_below: IoU under which a prediction is wrong.
        titles: of the checkpoints; by default `title_of`.
        across, scale: as for `write_grid`.
    Returns:
        `out`, `split`, `titles`, `wrong_below`, `miou` (each checkpoint's, of the expressions shown) and `samples`:
        `sample`, `text` and `ious`.
    Raises:
        UserError: checkpoints of different sets, no such sample, or another number of titles than of checkpoints.
    """
    picture_format(out)
    refuse_overwriting(out)
    if titles and len(titles) != len(paths):
        raise UserError(f"{len(titles)} titles for {len(paths)} checkpoints: give one for each")
    predicted = list(_predict_all(paths, split, data_root, rows, samples))
    first = predicted[0]
    titles = titles or [title_of(p.config) for p in predicted]
    table = [
        GridRow(
            first.dataset.full_image(s), shown.text, shown.truth, [(p.shown[i].mask, p.shown[i].iou) for p in predicted]
        )
        for i, (s, shown) in enumerate(zip(first.chosen, first.shown))
    ]
    write_grid(table, titles, out, wrong_below=wrong_below, across=across, scale=scale)
    ious = np.array([[iou for _, iou in row.predictions] for row in table])  # (expressions, checkpoints)
    return {
        "out": out,
        "split": split,
        "titles": titles,
        "wrong_below": wrong_below,
        "miou": ious.mean(0).tolist(),
        "samples": [
            {"sample": s, "text": row.text, "ious": of_row.tolist()}
            for s, row, of_row in zip(first.chosen, table, ious)
        ],
    }


def grid_lines(result: dict[str, Any]) -> list[str]:
    """The result of `grid` as lines for people."""
    lines = [result["out"]]
    for k, (title, miou) in enumerate(zip(result["titles"], result["miou"])):
        wrong = sum(s["ious"][k] < result["wrong_below"] for s in result["samples"])
        lines.append(f"{title}: mIoU {miou:.3f} of these {len(result['samples'])}, {wrong} wrong")
    return lines


def contact_sheet(path: str, out: str, split: str, *, data_root: str | None = None, rows: int = 8) -> dict[str, Any]:
    """`dit-ds sheet`: a grid of one checkpoint, two expressions side by side; arguments as for `grid`.

    Returns:
        `out`, `rows` (expressions shown) and their `miou`.
    """
    result = grid(
        [path], out, split, data_root=data_root, rows=rows, wrong_below=0.0, titles=["prediction"], across=2, scale=1
    )
    return {"out": out, "rows": len(result["samples"]), "miou": result["miou"][0]}


_Opened = tuple[str, RunConfig, ExpressionDataset]  # a checkpoint's path, configuration and split


@dataclass(frozen=True)
class SamplePrediction:
    """What a model predicts for one expression of a split.

    Attributes:
        text: as the model reads it.
        truth, mask: (H, W) bool, at the picture's own size.
        iou: of the two; 0 where both are empty.
    """

    text: str
    truth: np.ndarray
    mask: np.ndarray
    iou: float


@dataclass(frozen=True)
class _Predicted:
    """What one checkpoint predicts for the chosen expressions.

    Attributes:
        chosen: their numbers in the split.
        shown: of each expression.
    """

    path: str
    config: RunConfig
    dataset: ExpressionDataset
    chosen: list[int]
    shown: list[SamplePrediction]


def _predict_all(
    paths: list[str], split: str, data_root: str | None, rows: int, samples: list[int] | None
) -> Iterator[_Predicted]:
    first = None
    for path in paths:
        model, config, _ = load_model(path)
        dataset = build_eval_dataset(with_data_root(path, config, data_root), split)
        first = first or (path, config, dataset)
        _require_same_set(first, (path, config, dataset))
        chosen = _choose(len(dataset), split, rows, samples)
        shown = list(predictions(model.to(device()), config, dataset, chosen))
        yield _Predicted(path, config, dataset, chosen, shown)


def _require_same_set(a: _Opened, b: _Opened) -> None:
    """Refuse two checkpoints whose sample numbers are not the same expressions."""
    (path_a, config_a, data_a), (path_b, config_b, data_b) = a, b
    set_a, set_b = config_a.data.val_set, config_b.data.val_set
    if set_a != set_b:
        raise UserError(f"{path_a} is of {set_a}, {path_b} of {set_b}: compare checkpoints of one data set")
    if data_a.index.manifest_sha != data_b.index.manifest_sha:
        raise UserError(f"{path_a} and {path_b} have different shards of {set_a}: name those to show with --data-root")


def _choose(n: int, split: str, rows: int, samples: list[int] | None) -> list[int]:
    if samples is None:
        return [int(s) for s in np.linspace(0, n - 1, min(rows, n))]
    for s in samples:
        if s >= n:
            raise UserError(f"no sample {s} in {split}: it has 0 to {n - 1}")
    return samples


@torch.no_grad()
def predictions(
    model: Any, config: RunConfig, dataset: ExpressionDataset, chosen: list[int], batch_size: int = 1
) -> Iterator[SamplePrediction]:
    """What a model predicts for some expressions of a split, in their order.

    Args:
        model: in evaluation mode, on `device()`.
        chosen: numbers of the expressions in the split.
        batch_size: expressions at once.
    Raises:
        UserError: a sample is damaged.
    """
    postprocess = MaskPostprocess.from_config(config)
    items = [(0, s, 1.0) for s in chosen]  # (epoch, sample, weight), as a batch sampler's
    batches: Any = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    for batch in iterate(make_loader(dataset, batches, workers=0, pin=False)):
        logits = model(**model_inputs(batch, device())).cpu()  # (B, s, s)
        for row, truth in enumerate(batch["original"]):  # (H, W)
            mask = postprocess(logits[row], batch["size"][row], truth.shape, config.data.image_size).numpy()
            intersection, union = intersection_and_union(mask, truth)
            yield SamplePrediction(batch["text"][row], truth.astype(bool), mask, intersection / max(1, union))


def draw_sheet(folder: str | Path, split: str, out: str | Path, seed: int) -> None:
    """Write random expressions of a split, each with its picture and ground truth, as a PNG or PDF.

    Args:
        folder: of the set, as data_shards/refcoco/unc.
        seed: of the choice.
    Raises:
        UserError: no such set or split, a damaged sample, or `out` can't be written.
    """
    index = SplitIndex.load(local(folder), split)
    reader, rows = MemberReader(index), []
    count = min(_SHEET, len(index.sentences))
    for sentence in np.random.default_rng(seed).choice(len(index.sentences), count, replace=False):
        image, position, first, _ = index.refs[index.sentences[sentence]].tolist()
        meta = index.parse(image, reader.read(image, JSON))
        ref = meta["refs"][position]
        truth = np.zeros((meta["height"], meta["width"]), bool)
        for ann in ref["ann_ids"]:
            truth |= decode_rle(meta["anns"][str(ann)]["rle"]).astype(bool)
        rows.append(
            GridRow(decode_picture(reader.read(image, JPG)), ref["sentences"][sentence - first]["sent"], truth, [])
        )
    write_grid(rows, [], out, across=_ACROSS)
