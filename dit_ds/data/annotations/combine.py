"""Where a set's records come from: which reader, by which splits, and several sets combined for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_ds.data.annotations.coco import load_coco
from dit_ds.data.annotations.parquet import load_parquet
from dit_ds.data.annotations.refer import IMAGE_SETS, ImageRecord, ReferTree, load_refer
from dit_ds.data.masks import UnusableRecord, annotation_rle
from dit_ds.errors import UserError

Load = Callable[[str, str], ReferTree]  # of a dataset and how it is split


def default_split_by(dataset: str) -> str:
    """The splits that papers report."""
    return "umd" if dataset == "refcocog" else "unc"


def load_source(
    dataset: str,
    split_by: str | None = None,
    refer_root: str | Path | None = None,
    coco: str | Path | None = None,
    parquet: str | Path | None = None,
) -> ReferTree:
    """Load a set from one of the three sources, or several sets, separated by commas, as one to train on.

    Args:
        dataset: as refcoco, or refcoco,refcoco+,refcocog.
        split_by: as unc, or unc,unc,umd; by default that which papers report, of a COCO-style set `own`.
        refer_root: folder of a REFER or gREFER tree.
        coco: a COCO-style file with expressions.
        parquet: folder with parquet files.
    Raises:
        UserError: not exactly one source; sets that can't be combined; what the readers raise.
    """
    if sum(x is not None for x in (refer_root, coco, parquet)) != 1:
        raise UserError("give one of --refer-root, --coco and --parquet: where the annotations are")
    names = dataset.split(",")
    if coco is not None:
        if len(names) > 1:
            raise UserError(f"--coco is one set, and --dataset {dataset} names {len(names)}: give it one name")
        return load_coco(coco, dataset, split_by or "own")
    ways = split_by.split(",") if split_by else [default_split_by(n) for n in names]
    if len(ways) != len(names):
        raise UserError(f"--split-by {split_by} is for {len(ways)} sets, --dataset {dataset} names {len(names)}")

    def load(name: str, way: str) -> ReferTree:
        return load_refer(refer_root, name, way) if parquet is None else load_parquet(parquet, name, way)

    return load(names[0], ways[0]) if len(names) == 1 else combine(names, ways, load)


def combine(names: list[str], ways: list[str], load: Load) -> ReferTree:
    """One set with the split train: what all sets' train splits say of an image.

    An image that any other split of any of the sets has is left out, and counted: a model would be tested on what it
    was trained on. The sets are loaded one after the other.

    Raises:
        UserError: a set twice, sets of different images, or one without a train split.
    """
    image_sets = {IMAGE_SETS.get(n, n) for n in names}
    if len(image_sets) > 1:
        raise UserError(f"{' and '.join(names)} are not of the same images: combine sets of COCO's train2014")
    if len(set(names)) < len(names):
        raise UserError(f"--dataset {','.join(names)} names a set twice: name each once")
    merged: dict[int, ImageRecord] = {}
    held_out: set[int] = set()
    sources, descriptions = {}, {}
    for name, way in zip(names, ways):
        tree = load(name, way)
        if "train" not in tree.splits:
            raise UserError(f"{name} {way} has no train split, only {', '.join(tree.splits)}: leave it out")
        for record in tree.splits.pop("train"):
            _add(merged, record, name)
        held_out |= {r.image["id"] for records in tree.splits.values() for r in records}
        sources |= {f"{name}/{file}": sha for file, sha in tree.sources.items()}
        descriptions[tree.description] = None  # a set in order
    leakage = {n: {"images": 0, "refs": 0, "sentences": 0} for n in names}
    for image_id in sorted(held_out & merged.keys()):
        _count(leakage, merged.pop(image_id))
    if not merged:
        raise UserError(f"every train image of {', '.join(names)} is in a val or test split of one of them")
    train = [merged[i] for i in sorted(merged)]
    description = " + ".join(filter(None, descriptions))
    return ReferTree(",".join(names), ",".join(ways), {"train": train}, sources, description, *image_sets, leakage)


def _add(merged: dict[int, ImageRecord], record: ImageRecord, dataset: str) -> None:
    """Add what one set says of an image."""
    of_all = merged.setdefault(record.image["id"], ImageRecord(record.image, [], {}))
    keys = {}
    for ann_id, annotation in record.annotations.items():
        there = of_all.annotations.get(ann_id)
        shared = there is None or _same_mask(there, annotation, record.image)
        keys[ann_id] = ann_id if shared else f"{ann_id}@{dataset}"
        of_all.annotations[keys[ann_id]] = annotation
    of_all.refs.extend(r | {"ann_ids": [keys[a] for a in r["ann_ids"]], "dataset": dataset} for r in record.refs)


def _same_mask(a: dict[str, Any], b: dict[str, Any], image: dict[str, Any]) -> bool:
    if a.get("segmentation") == b.get("segmentation"):
        return True
    try:
        return annotation_rle(a, image["height"], image["width"]) == annotation_rle(b, image["height"], image["width"])
    except UnusableRecord:
        return False


def _count(leakage: dict[str, dict[str, int]], record: ImageRecord) -> None:
    for dataset in {r["dataset"] for r in record.refs}:
        leakage[dataset]["images"] += 1
    for ref in record.refs:
        leakage[ref["dataset"]]["refs"] += 1
        leakage[ref["dataset"]]["sentences"] += len(ref["sentences"])
