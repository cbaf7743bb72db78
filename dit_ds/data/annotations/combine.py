"""Load one dataset with the reader for its files, or combine several for training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_ds.data.annotations.coco import load_coco
from dit_ds.data.annotations.parquet import load_parquet
from dit_ds.data.annotations.refer import IMAGE_SETS, ImageRecord, ReferTree, load_refer
from dit_ds.data.annotations.same_pictures import same_pictures
from dit_ds.data.masks import UnusableRecord, annotation_rle
from dit_ds.errors import UserError

Load = Callable[[str, str], ReferTree]  # takes the dataset's name and its splitBy
_log = logging.getLogger("dit_ds")


def default_split_by(dataset: str) -> str:
    """The splitBy that papers report: umd for RefCOCOg (Nagaraja et al., 2016), unc for the others."""
    return "umd" if dataset == "refcocog" else "unc"


def load_source(
    dataset: str,
    split_by: str | None = None,
    *,
    refer_root: str | Path | None = None,
    coco: str | Path | None = None,
    parquet: str | Path | None = None,
    images: str | Path | None = None,
) -> ReferTree:
    """Load a dataset from one of the three sources, or combine several, named with commas, for training.

    Args:
        dataset: as refcoco, or refcoco,refcoco+,refcocog.
        split_by: as unc, or unc,unc,umd; by default that which papers report, with `coco` the name `own`.
        refer_root: folder of a REFER or gREFER tree.
        coco: a COCO file with expressions.
        parquet: folder with parquet files.
        images: as for `combine`.
    Raises:
        UserError: not exactly one source, datasets that can't be combined, or an error of the readers.
    """
    if sum(x is not None for x in (refer_root, coco, parquet)) != 1:
        raise UserError("give one of --refer-root, --coco and --parquet: where the annotations are")
    names = dataset.split(",")
    if coco is not None:
        if len(names) > 1:
            raise UserError(f"--coco is one set, and --dataset {dataset} names {len(names)}: give it one name")
        return load_coco(coco, dataset, split_by or "own")
    split_bys = split_by.split(",") if split_by else [default_split_by(n) for n in names]
    if len(split_bys) != len(names):
        raise UserError(f"--split-by {split_by} is for {len(split_bys)} sets, --dataset {dataset} names {len(names)}")
    if refer_root is not None:
        load: Load = functools.partial(load_refer, refer_root)
    elif parquet is not None:
        load = functools.partial(load_parquet, parquet)
    if len(names) == 1:
        return load(names[0], split_bys[0])
    return combine(names, split_bys, load, None if images is None else Path(images))


def combine(names: list[str], split_bys: list[str], load: Load, images: Path | None = None) -> ReferTree:
    """One dataset with the single split train: the union of the datasets' train splits, image by image.

    An image that is in another split of any of them, by its id or as a copy of the file, is left out, and counted in
    `leakage`: the model would be evaluated on an image that it was trained on. The datasets are loaded one after the
    other, to save memory.

    Args:
        names, split_bys: of each dataset.
        load: its reader.
        images: folder with the image files, to find copies; without it images are compared by their ids alone.
    Raises:
        UserError: a dataset named twice, datasets of different images, one without a train split, or no image is left.
    """
    image_sets = {IMAGE_SETS.get(n, n) for n in names}
    if len(image_sets) > 1:
        raise UserError(f"{' and '.join(names)} are not of the same images: combine sets of COCO's train2014")
    if len(set(names)) < len(names):
        raise UserError(f"--dataset {','.join(names)} names a set twice: name each once")
    merged: dict[int, ImageRecord] = {}
    held_out: dict[int, str] = {}
    sources: dict[str, str] = {}
    published = True
    descriptions: dict[str, None] = {}  # used as an ordered set
    for name, split_by in zip(names, split_bys):
        tree = load(name, split_by)
        if "train" not in tree.splits:
            raise UserError(f"{name} {split_by} has no train split, only {', '.join(tree.splits)}: leave it out")
        for record in tree.splits.pop("train"):
            _merge_record(merged, record, name)
        held_out |= {r.image["id"]: r.image["file_name"] for records in tree.splits.values() for r in records}
        published &= tree.published
        sources |= {f"{name}/{file}": sha for file, sha in tree.sources.items()}
        descriptions[tree.description] = None
    leakage = {n: {"images": 0, "refs": 0, "sentences": 0} for n in names}
    for image_id in sorted(held_out & merged.keys()):
        _count_left_out(leakage, merged.pop(image_id))
    if images is not None:
        _leave_out_copies(merged, held_out, images, leakage)
    if not merged:
        raise UserError(f"every train image of {', '.join(names)} is in a val or test split of one of them")
    train = [merged[i] for i in sorted(merged)]
    description = " + ".join(filter(None, descriptions))
    return ReferTree(
        ",".join(names),
        ",".join(split_bys),
        {"train": train},
        sources,
        description=description,
        image_set=image_sets.pop(),
        leakage=leakage,
        published=published,
    )


def _merge_record(merged: dict[int, ImageRecord], record: ImageRecord, dataset: str) -> None:
    """Add one dataset's record of an image; an ann_id whose mask is another in `merged` gets the dataset's name."""
    target = merged.setdefault(record.image["id"], ImageRecord(record.image, [], {}))
    if target.image != record.image:
        raise UserError(
            f"image {record.image['id']} is {record.image['file_name']!r} in {dataset}, and {target.image['file_name']!r} or of "
            "another size in a set before it: combine sets of the same images"
        )
    keys: dict[int | str, int | str] = {}
    for ann_id, annotation in record.annotations.items():
        known = target.annotations.get(ann_id)
        shared = known is None or _same_mask(known, annotation, record.image)
        keys[ann_id] = ann_id if shared else f"{ann_id}@{dataset}"
        target.annotations[keys[ann_id]] = annotation
    target.refs.extend(r | {"ann_ids": [keys[a] for a in r["ann_ids"]], "dataset": dataset} for r in record.refs)


def _same_mask(a: dict[str, Any], b: dict[str, Any], image: dict[str, Any]) -> bool:
    if a.get("segmentation") == b.get("segmentation"):
        return True
    try:
        return annotation_rle(a, image["height"], image["width"]) == annotation_rle(b, image["height"], image["width"])
    except UnusableRecord:
        return False


def _leave_out_copies(
    merged: dict[int, ImageRecord], held_out: dict[int, str], images: Path, leakage: dict[str, dict[str, int]]
) -> None:
    """Leave out images whose files are copies of one that is evaluated on."""
    names = {i: r.image["file_name"] for i, r in merged.items()}
    copies = same_pictures(images, names.values(), held_out.values())
    for image_id in sorted(i for i, name in names.items() if name in copies):
        _log.warning("left out: image %s is a copy of one that is evaluated on", names[image_id])
        _count_left_out(leakage, merged.pop(image_id))


def _count_left_out(leakage: dict[str, dict[str, int]], record: ImageRecord) -> None:
    for dataset in {r["dataset"] for r in record.refs}:
        leakage[dataset]["images"] += 1
    for ref in record.refs:
        leakage[ref["dataset"]]["refs"] += 1
        leakage[ref["dataset"]]["sentences"] += len(ref["sentences"])
