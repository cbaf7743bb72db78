"""Predictions in COCO's form of results: written, and anyone's scored by the metrics of `evaluate`.

A file is a JSON list with an object for each expression: `image_id`, `category_id` (1), `segmentation` (RLE, `size` and
`counts`), `score`, `text`, and of a split `ref_id` and `sent_id`. Where the model can say that there is no target,
`no_target` is whether it does, and `vetoed` the mask that a no-target head did not let count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.decoded_image import union_mask
from dit_ds.data.loading.index import JSON, SplitIndex
from dit_ds.data.loading.readers import make_reader
from dit_ds.data.masks import compressed_rle, decode_rle, encode_rle
from dit_ds.data.progress import progress_bar
from dit_ds.errors import UserError
from dit_ds.evaluation.metrics import count_pixels, summarize_rows
from dit_ds.files import read_json

CATEGORIES = [{"id": 1, "name": "referred object"}]
_Key = tuple[Any, ...]
# what joins results with a split's expressions, the first whose parts all results have
_BY_TEXT = "image_id and text"
_JOINS: dict[str, Callable[[dict[str, Any]], _Key]] = {
    "ref_id and sent_id": lambda r: (r["ref_id"], r["sent_id"]),
    "sent_id": lambda r: (r["sent_id"],),
    _BY_TEXT: lambda r: (r["image_id"], normalise_expression(r["text"])),
}


def coco_result(
    expression: dict[str, Any],
    mask: np.ndarray,
    score: float,
    no_target: bool | None = None,
    vetoed: np.ndarray | None = None,
) -> dict[str, Any]:
    """One expression's object; arguments as of `many.loop.Answer`."""
    result = expression | {"category_id": 1, "segmentation": encode_rle(mask), "score": score}
    if no_target is not None:
        result["no_target"] = no_target
    return result if vetoed is None else result | {"vetoed": encode_rle(vetoed)}


def score_results(
    path: str | Path, index: SplitIndex, *, streamed: bool, no_target_pixels: int, allow_missing: bool
) -> dict[str, Any]:
    """The metrics of a file of results: those of `evaluate`, to the last digit for masks that are the same.

    Args:
        index: of the split that it answers.
        streamed: see `make_reader`.
        no_target_pixels: in a split with expressions without a target, a mask of fewer pixels says so where the file has
            no `no_target`.
        allow_missing: an expression without a result has an empty mask; else it is refused.
    Returns:
        `n`, the number of expressions, the metrics, and `missing`, if they are allowed.
    Raises:
        UserError: the file can't be read, a mask is none of the picture's size, or an expression is answered twice with
            different masks, or not at all, or is not of the split.
    """
    results = _read(path)
    key_of, answers = _by_key(path, results)
    seen: dict[_Key, int] = {}
    rows, missing = [], []
    for expression, truth in _expressions(index, streamed):
        key = key_of(expression)
        seen[key] = seen.get(key, 0) + 1
        if key not in answers:
            missing.append(key)
        rows.append(_row(path, key, answers.get(key), truth, no_target_pixels if index.generalized else 0))
    if max(seen.values()) > 1 and key_of is not _JOINS[_BY_TEXT]:
        raise UserError(
            f"expressions of this split share their ids: give the results in {path} {_BY_TEXT}, or ref_id, too"
        )
    if extra := [key for key in answers if key not in seen]:
        raise UserError(
            f"{len(extra)} of {len(answers)} results in {path} are of no expression of this split, as {_said(extra[0])}: "
            "score them on the split that they are of"
        )
    if missing and not allow_missing:
        raise UserError(
            f"{path} has no result for {len(missing)} of {len(rows)} expressions, as {_said(missing[0])}: add them, or "
            "count them as empty masks with --allow-missing"
        )
    metrics = summarize_rows(np.array(rows, np.int64), index.generalized)
    return metrics | ({"missing": len(missing)} if allow_missing else {})


def _said(key: _Key) -> str:
    return ", ".join(str(part)[:60] for part in key)


def _expressions(index: SplitIndex, streamed: bool) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What results are joined by, and the (H, W) ground truth, of each expression."""
    reader = make_reader(index, streamed)
    for image in progress_bar(
        np.unique(index.refs[:, 0]).tolist(), "score", unit="picture", mininterval=2, leave=False
    ):
        meta = index.parse(image, reader.read(image, JSON))
        for ref in meta["refs"]:
            truth = union_mask(meta, ref["ann_ids"])
            for s in ref["sentences"]:
                text = normalise_expression(s["sent"])
                yield (
                    {"image_id": meta["image_id"], "ref_id": ref["ref_id"], "sent_id": s["sent_id"], "text": text},
                    truth,
                )


def _read(path: str | Path) -> list[dict[str, Any]]:
    if Path(path).is_dir():
        raise UserError(
            f"--predictions {path} is a folder: give a file of COCO results; --write-masks DIR writes masks"
        )
    results = read_json(path, "file of results")
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise UserError(f"{path} is no list of COCO results: let it read [{{image_id, segmentation, ..}}, ..]")
    kinds = {"image_id": int, "ref_id": int, "sent_id": int, "text": str, "no_target": bool}
    for n, result in enumerate(results, 1):
        for key, kind in kinds.items():
            if key in result and type(result[key]) is not kind:
                raise UserError(
                    f"result {n} in {path} has {key} {str(result[key])[:60]!r}, which is no {kind.__name__}"
                )
        if not isinstance(result.get("segmentation"), dict):
            raise UserError(f"result {n} in {path} has no segmentation in RLE: give one of size and counts")
    return results


def _by_key(
    path: str | Path, results: list[dict[str, Any]]
) -> tuple[Callable[[dict[str, Any]], _Key], dict[_Key, Any]]:
    """What joins results with expressions, and each result by it.

    Raises:
        UserError: nothing does, or results of one key have other masks.
    """
    known = [parts for parts in _JOINS if all(part in r for r in results for part in parts.split(" and "))]
    if not known:
        raise UserError(f"not all of the {len(results)} results in {path} have {', or '.join(_JOINS)}: add them")
    key_of = _JOINS[known[0]]
    answers: dict[_Key, Any] = {}
    repeated = 0
    for result in results:
        other = answers.setdefault(key_of(result), result)
        # an expression that stands twice in a split may be answered twice, alike
        alike = other["segmentation"] == result["segmentation"] and known[0] == _BY_TEXT
        repeated += other is not result and not alike
    if repeated:
        raise UserError(
            f"{repeated} of {len(results)} results in {path} answer an expression a second time: leave them out"
        )
    return key_of, answers


def _row(
    path: str | Path, key: _Key, result: dict[str, Any] | None, truth: np.ndarray, no_target_pixels: int
) -> tuple[int, ...]:
    """As of `count_pixels`."""
    if result is None:
        return count_pixels(np.zeros_like(truth), truth, None)
    mask = _mask(path, key, result["segmentation"], truth.shape)
    says = result.get("no_target")
    if says:
        return count_pixels(_mask(path, key, result.get("vetoed", result["segmentation"]), truth.shape), truth, True)
    if says is None and mask.sum() < no_target_pixels:
        mask = np.zeros_like(mask)
    return count_pixels(mask, truth, says)


def _mask(path: str | Path, key: _Key, rle: Any, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1."""
    try:
        if not isinstance(rle, dict) or rle.get("size") != list(shape):
            size = rle.get("size") if isinstance(rle, dict) else None
            raise ValueError(f"its size is {str(size)[:60]}, that of the picture {list(shape)}")
        return decode_rle(compressed_rle(rle, *shape))
    except (ValueError, TypeError, OverflowError) as e:
        raise UserError(f"the mask of {_said(key)} in {path} can't be read ({e})") from None
