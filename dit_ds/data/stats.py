"""What is in a split: words, refs, masks and pictures in figures."""

from __future__ import annotations

import collections
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.loading.index import JSON, SplitIndex
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.loading.transforms import swap_sides
from dit_ds.data.parallel import forked_map
from dit_ds.data.shards.storage import local

_SMALL, _LARGE = 32**2, 96**2  # pixels: COCO's small masks are below the first, its large ones from the second on
_QUANTILES = (5, 25, 50, 75, 95)
_WORDS = 30


@dataclass
class _Seen:
    """What one shard's JSON members say; each list has an entry an expression, a ref or an image."""

    words: list[int] = field(default_factory=list)  # of each expression
    expressions: list[int] = field(default_factory=list)  # of each ref
    refs: list[int] = field(default_factory=list)  # of each image
    areas: list[tuple[int, int]] = field(default_factory=list)  # of each ref that has a target: its pixels, all pixels
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of each image: width, height
    common: collections.Counter[str] = field(default_factory=collections.Counter)
    sided: int = 0  # expressions with a word for left or right
    no_target: int = 0


def split_stats(
    folder: str | Path,
    split: str = "train",
    processes: int | None = None,
) -> dict[str, Any]:
    """Figures of one split, from its JSON members; no picture is read.

    Args:
        processes: to read shards in, by default one a core.
    Returns:
        `split, images, refs, expressions, no_target`; `words_per_expression`, `expressions_per_ref`, `refs_per_image`
        (mean, median, p95, max, histogram); `mask_share` (quantiles of a mask's share of its picture), `mask_sizes`
        (shares of COCO's small, medium and large); `image_sizes`, `frequent_words`, `left_right_share`.
    Raises:
        UserError: no such set or split, or a damaged sample.
    """
    index = SplitIndex.load(local(folder), split)
    shards = list(range(len(index.shards)))
    seen = list(forked_map(functools.partial(_read_shard, index), shards, processes, "stats"))

    def every(name: str) -> list[Any]:
        return [x for s in seen for x in getattr(s, name)]

    areas = np.array(every("areas"), np.int64).reshape(-1, 2)
    expressions = len(index.sentences)
    common = sum((s.common for s in seen), collections.Counter())
    sizes = [list(x) for x in sorted(collections.Counter(every("sizes")).items(), key=lambda x: (-x[1], x[0]))]
    out = {
        "split": split, "images": len(index.images), "refs": len(index.refs), "expressions": expressions,
        "no_target": sum(s.no_target for s in seen),
        "words_per_expression": _distribution(every("words")),
        "expressions_per_ref": _distribution(every("expressions")),
        "refs_per_image": _distribution(every("refs")),
        "mask_share": _quantiles(areas[:, 0] / areas[:, 1]),
        "mask_sizes": _shares(areas[:, 0]),
        "image_sizes": [{"width": w, "height": h, "images": n} for (w, h), n in sizes[:10]],
        "frequent_words": sorted(common.items(), key=lambda x: (-x[1], x[0]))[:_WORDS],
        "left_right_share": sum(s.sided for s in seen) / max(1, expressions),
    }  # fmt: skip
    return out


def _read_shard(index: SplitIndex, shard: int) -> _Seen:
    reader, seen = MemberReader(index), _Seen()
    for image in np.flatnonzero(index.images[:, 0] == shard).tolist():
        meta = index.parse(image, reader.read(image, JSON))
        seen.sizes.append((meta["width"], meta["height"]))
        seen.refs.append(len(meta["refs"]))
        for ref in meta["refs"]:
            seen.expressions.append(len(ref["sentences"]))
            if ref["ann_ids"]:
                seen.areas.append((_area(meta, ref), meta["width"] * meta["height"]))
            else:
                seen.no_target += 1
            for sentence in ref["sentences"]:
                words = sentence["sent"].split()
                seen.words.append(len(words))
                seen.common.update(words)
                seen.sided += swap_sides(sentence["sent"]) != sentence["sent"]
    return seen


def _area(meta: dict[str, Any], ref: dict[str, Any]) -> int:
    """Pixels of the union of what a ref means."""
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


def _shares(areas: np.ndarray) -> dict[str, float]:
    small, large = (areas < _SMALL).sum(), (areas >= _LARGE).sum()
    counts = {"small": small, "medium": len(areas) - small - large, "large": large}
    return {k: float(n / max(1, len(areas))) for k, n in counts.items()}


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
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
    ]


def _bars(histogram: dict[str, int]) -> list[str]:
    """A line for each number of words, as far as 20."""
    most = max(histogram.values(), default=1)
    few = [(int(k), n) for k, n in histogram.items() if int(k) <= 20]
    return [f"  {k:3d} words {'#' * round(40 * n / most):40} {n}" for k, n in few]
