"""REFER files to records: a restricted pickle, COCO annotations, and the joins between them.

The layout is `ROOT/{refcoco,refcoco+,refcocog,refclef}/{refs(SPLITBY).p,instances.json}`.
"""

from __future__ import annotations

import difflib
import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.errors import UserError
from dit_ds.files import read_json, sha256_of

IMAGE_SETS = dict.fromkeys(["refcoco", "refcoco+", "refcocog", "grefcoco"], "coco/train2014")
IMAGE_SETS["refclef"] = "saiapr_tc-12"
_REF_KEYS = ("ref_id", "ann_id", "image_id", "split", "sentences")


class UnusableRecord(UserError):
    """One ref or image that can't be used; `dit-ds data shard --skip-bad` drops it and counts it."""


@dataclass(frozen=True)
class ImageRecord:
    """One image of one split with what is said of it.

    Attributes:
        image: COCO's image entry (`id`, `file_name`, `height`, `width`).
        refs: the split's refs of this image, by ref_id.
        annotations: COCO's annotations that those refs point at, by ann_id.
    """

    image: dict[str, Any]
    refs: list[dict[str, Any]]
    annotations: dict[int, dict[str, Any]]


@dataclass(frozen=True)
class ReferTree:
    """A loaded tree.

    Attributes:
        splits: records by split.
        sources: SHA-256 of the files they came from.
        description: what the annotation file says of itself.
        image_set: whose ids the image ids are; sets of one image set may share images.
    """

    dataset: str
    split_by: str
    splits: dict[str, list[ImageRecord]]
    sources: dict[str, str]
    description: str
    image_set: str


class _RestrictedUnpickler(pickle.Unpickler):
    """Loads plain containers, numbers and strings. A pickle is code otherwise."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks to load {module}.{name}")


def load_refs(path: Path) -> list[dict[str, Any]]:
    """Read `refs(SPLITBY).p` (written by Python 2, hence latin1) without executing anything in it."""
    try:
        refs = _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"no refs file at {path}{_nearest_refs(path)}") from None
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is not a plain REFER pickle ({e}), nothing was run: fetch the original file") from None
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}): fetch the file again") from None
    if not isinstance(refs, list) or not all(isinstance(r, dict) for r in refs):
        raise UserError(f"{path} does not hold a list of refs: fetch the original file")
    for ref in refs:
        missing = [k for k in _REF_KEYS if k not in ref]
        if missing:
            raise UserError(f"{path}: ref {ref.get('ref_id', '?')} has no '{missing[0]}': fetch the original file")
    return refs


def _nearest_refs(path: Path) -> str:
    there = sorted(p.name[5:-3] for p in path.parent.glob("refs(*).p"))
    return (
        f": --split-by can be {', '.join(there)} here" if there else ": --refer-root must hold DATASET/refs(SPLITBY).p"
    )


def load_refer(root: str | Path, dataset: str, split_by: str) -> ReferTree:
    """Load one dataset of a REFER tree and join its refs to images and annotations on their ids.

    Raises:
        UserError: a missing or damaged file, or a ref whose image or annotation isn't there.
    """
    folder = Path(root) / dataset
    if not folder.is_dir():
        there = sorted(p.parent.name for p in Path(root).glob("*/instances.json"))
        near = difflib.get_close_matches(dataset, there, 1)
        hint = f"did you mean {near[0]}?" if near else f"it holds {', '.join(there) or 'no dataset'}"
        raise UserError(f"no dataset '{dataset}' in {root}: {hint}")
    refs_file, instances_file = folder / f"refs({split_by}).p", folder / "instances.json"
    refs = load_refs(refs_file)
    instances = read_json(instances_file, "annotation file")
    try:
        images = {i["id"]: i for i in instances["images"]}
        annotations = {a["id"]: a for a in instances["annotations"]}
    except (TypeError, KeyError) as e:
        raise UserError(f"{instances_file} is not a COCO annotation file (no {e}): fetch the original") from None

    grouped: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for ref in sorted(refs, key=lambda r: r["ref_id"]):
        # join on image_id: a ref's own file_name is not the image's name
        if ref["image_id"] not in images:
            raise UserError(
                f"ref {ref['ref_id']}: image {ref['image_id']} is not in {instances_file}: fetch both again"
            )
        if ref["ann_id"] not in annotations:
            raise UserError(
                f"ref {ref['ref_id']}: annotation {ref['ann_id']} is not in {instances_file}: fetch both again"
            )
        grouped.setdefault(ref["split"], {}).setdefault(ref["image_id"], []).append(ref)
    splits = {
        split: [
            ImageRecord(images[i], of_image, {r["ann_id"]: annotations[r["ann_id"]] for r in of_image})
            for i, of_image in sorted(by_image.items())
        ]
        for split, by_image in grouped.items()
    }
    sources = {f.name: sha256_of(f) for f in (refs_file, instances_file)}
    description = str((instances.get("info") or {}).get("description", ""))
    return ReferTree(dataset, split_by, splits, sources, description, IMAGE_SETS.get(dataset, dataset))


def annotation_rle(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The annotation's mask as compressed COCO RLE, `{"size": [H, W], "counts": str}`.

    Takes the three encodings found in the wild: polygons, a list of RLE dicts (refclef), one dict (crowd). Parts are
    united: where polygons overlap the pixel counts once.

    Raises:
        UnusableRecord: there is no polygon or run in it that encloses anything.
    """
    from pycocotools import mask as coco

    segmentation = annotation.get("segmentation")
    parts: list[Any] = segmentation if isinstance(segmentation, list) else [segmentation]
    # fewer than three corners enclose nothing, and pycocotools takes four numbers for a box
    parts = [p for p in parts if isinstance(p, dict) or (isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0)]
    try:
        rles = [r for p in parts for r in coco.frPyObjects([p], height, width)] if _uncompressed(parts) else parts
        merged = coco.merge(rles) if rles else None
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise UnusableRecord(f"annotation {annotation.get('id')}: its segmentation can't be read ({e})") from None
    if merged is None or int(coco.area(merged)) == 0:
        raise UnusableRecord(f"annotation {annotation.get('id')} has no polygon that encloses anything")
    if list(merged["size"]) != [height, width]:
        raise UnusableRecord(
            f"annotation {annotation.get('id')}: its mask is {merged['size']}, its image {[height, width]}"
        )
    return {"size": [height, width], "counts": merged["counts"].decode()}


def _uncompressed(parts: list[Any]) -> bool:
    return not parts or isinstance(parts[0], list) or isinstance(parts[0].get("counts"), list)


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1 from compressed COCO RLE."""
    from pycocotools import mask as coco

    return coco.decode(rle)


def clean_sentence(sentence: dict[str, Any]) -> str:
    """The expression as models read it: REFER's `sent`, or, where that is empty, `raw` cleaned as REFER cleans it.

    Raises:
        UnusableRecord: there are no words in either.
    """
    text = sentence.get("sent", "").strip()
    if not text:
        text = " ".join(re.sub(r"[^\w\s-]", " ", sentence.get("raw", "").lower()).split())
    if not text:
        raise UnusableRecord(f"sentence {sentence.get('sent_id')} is empty")
    return text
