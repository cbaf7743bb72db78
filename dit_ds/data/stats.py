"""Statistics of a split: expressions, refs, masks and image sizes."""

from __future__ import annotations

import collections
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.config.schema import RunConfig
from dit_ds.data.input_check import InputCheck
from dit_ds.data.loading.index import JSON, SplitIndex
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.parallel import forked_map
from dit_ds.data.shards.storage import local

_SMALL, _LARGE = (
    32**2,
    96**2,
)  # pixels: COCO's small masks have fewer than the first, its large ones at least the second
_QUANTILES = (5, 25, 50, 75, 95)
_WORDS = 30  # frequent words to report


@dataclass
class _ShardCounts:
    """Counts from one shard's JSON members.

    Attributes:
        words: of each expression.
        expressions: of each ref.
        refs: of each image.
        areas: of each ref with a target: pixels of its mask, pixels of the image.
        sizes: of each image: width, height.
        frequencies: of each word.
        no_target: refs without target.
    """

    words: list[int] = field(default_factory=list)
    expressions: list[int] = field(default_factory=list)
    refs: list[int] = field(default_factory=list)
    areas: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    frequencies: collections.Counter[str] = field(default_factory=collections.Counter)
    no_target: int = 0


def split_stats(
    folder: str | Path,
    split: str = "train",
    processes: int | None = None,
    config: RunConfig | None = None,
) -> dict[str, Any]:
    """Statistics of one split, from its JSON members; no image is read.

    Args:
        folder: as data_shards/refcoco/unc.
        processes: that read shards, by default one a core.
        config: as for `InputCheck`.
    Returns:
        `split, images, refs, expressions, no_target`; `words_per_expression`, `expressions_per_ref`, `refs_per_image`
        (mean, median, p95, max, histogram); `mask_share` (quantiles of a mask's share of its image), `mask_sizes`
        (shares of COCO's small, medium and large); `image_sizes`, `frequent_words`, `left_right_share`;
        `as_read`: what of the split a run with this configuration loses (`settings`, `counts`, `lines`, `note`).
    Raises:
        UserError: no such dataset or split, or a damaged sample.
    """
    index = SplitIndex.load(local(folder), split)
    check = InputCheck(config)
    losses = check.losses(folder, split, processes)
    shards = list(range(len(index.shards)))
    counts = list(forked_map(functools.partial(_count_shard, index), shards, processes, "stats"))
    areas = np.array([x for c in counts for x in c.areas], np.int64).reshape(-1, 2)
    expressions = len(index.sentences)
    frequencies: collections.Counter[str] = sum((c.frequencies for c in counts), collections.Counter())
    sizes = collections.Counter(x for c in counts for x in c.sizes)
    return {
        "split": split, "images": len(index.images), "refs": len(index.refs), "expressions": expressions,
        "no_target": sum(c.no_target for c in counts),
        "words_per_expression": _distribution([n for c in counts for n in c.words]),
        "expressions_per_ref": _distribution([n for c in counts for n in c.expressions]),
        "refs_per_image": _distribution([n for c in counts for n in c.refs]),
        "mask_share": _quantiles(areas[:, 0] / areas[:, 1]),
        "mask_sizes": _size_shares(areas[:, 0]),
        "image_sizes": [{"width": w, "height": h, "images": n} for (w, h), n in _by_frequency(sizes)[:10]],
        "frequent_words": _by_frequency(frequencies)[:_WORDS],
        "left_right_share": losses.counts["expressions_swapped"] / max(1, expressions),
        "as_read": {
            "settings": check.settings, "counts": dict(losses.counts), "lines": check.lines(losses), "note": check.note,
        },
    }  # fmt: skip


def _by_frequency(counter: collections.Counter[Any]) -> list[tuple[Any, int]]:
    """Items and counts, the most frequent first, then in the items' order."""
    return sorted(counter.items(), key=lambda x: (-x[1], x[0]))


def _count_shard(index: SplitIndex, shard: int) -> _ShardCounts:
    reader, counts = MemberReader(index), _ShardCounts()
    for image in np.flatnonzero(index.images[:, 0] == shard).tolist():
        meta = index.parse(image, reader.read(image, JSON))
        counts.sizes.append((meta["width"], meta["height"]))
        counts.refs.append(len(meta["refs"]))
        for ref in meta["refs"]:
            counts.expressions.append(len(ref["sentences"]))
            if ref["ann_ids"]:
                counts.areas.append((_area(meta, ref), meta["width"] * meta["height"]))
            else:
                counts.no_target += 1
            for sentence in ref["sentences"]:
                words = sentence["sent"].split()
                counts.words.append(len(words))
                counts.frequencies.update(words)
    return counts


def _area(meta: dict[str, Any], ref: dict[str, Any]) -> int:
    """Pixels of the union of a ref's masks."""
    from pycocotools import mask as coco

    return int(coco.area(coco.merge([meta["anns"][str(a)]["rle"] for a in ref["ann_ids"]])))


def _distribution(values: list[int]) -> dict[str, Any]:
    n = np.array(values or [0])
    middle, p95 = np.percentile(n, (50, 95)).tolist()
    histogram = {str(k): v for k, v in sorted(collections.Counter(values).items())}
    return {"mean": float(n.mean()), "median": middle, "p95": p95, "max": int(n.max()), "histogram": histogram}


def _quantiles(shares: np.ndarray) -> dict[str, float]:
    if not len(shares):
        return {}
    return {f"p{q}": float(x) for q, x in zip(_QUANTILES, np.percentile(shares, _QUANTILES))}


def _size_shares(areas: np.ndarray) -> dict[str, float]:
    small, large = (areas < _SMALL).sum(), (areas >= _LARGE).sum()
    counts = {"small": small, "medium": len(areas) - small - large, "large": large}
    return {k: float(n / max(1, len(areas))) for k, n in counts.items()}


def format_report(found: dict[str, Any]) -> list[str]:
    """The result of `split_stats` as text lines."""
    words, sizes, share = found["words_per_expression"], found["mask_sizes"], found["mask_share"]
    spread = ", ".join(f"{100 * x:.1f}% at {k}" for k, x in share.items())
    pictures = ", ".join(f"{s['width']}x{s['height']} ({s['images']})" for s in found["image_sizes"][:5])
    return [
        f"{found['split']}: {found['images']} images, {found['refs']} refs ({found['no_target']} without target), "
        f"{found['expressions']} expressions",
        *(
            f"{name.replace('_', ' ')}: mean {d['mean']:.2f}, median {d['median']:g}, 95th percentile {d['p95']:g}, "
            f"most {d['max']}"
            for name in ("words_per_expression", "expressions_per_ref", "refs_per_image")
            for d in [found[name]]
        ),
        *_bars(words["histogram"]),
        f"a mask's share of its picture: {spread or 'there is none'}",
        "masks: " + ", ".join(f"{100 * x:.1f}% {k}" for k, x in sizes.items()) + " (COCO's 32x32 and 96x96 pixels)",
        f"picture sizes: {pictures}",
        f"expressions with left or right: {100 * found['left_right_share']:.1f}%",
        "frequent words: " + ", ".join(f"{w} {n}" for w, n in found["frequent_words"]),
        *found["as_read"]["lines"],
        *filter(None, [found["as_read"]["note"]]),
    ]


def _bars(histogram: dict[str, int]) -> list[str]:
    """A bar chart of the number of words, up to 20."""
    most = max(histogram.values(), default=1)
    few = [(int(k), n) for k, n in histogram.items() if int(k) <= 20]
    return [f"  {k:3d} words {'#' * round(40 * n / most):40} {n}" for k, n in few]
