"""REFER and gREFER files to records: refs from a restricted pickle or JSON, joined with COCO annotations.

The layout is `ROOT/{refcoco,refcoco+,refcocog,refclef}/{refs(SPLITBY).p,instances.json}`, and for gRefCOCO
`ROOT/grefcoco/{grefs(SPLITBY).json or .p,instances.json}`. The readers of other files return the same
records.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_ds.data.annotations.check import UnreadAnnotation, check_refs, coco_tables, is_id, show
from dit_ds.data.annotations.plain_pickle import load_plain
from dit_ds.data.annotations.published import is_published
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.masks import UnusableRecord
from dit_ds.errors import UserError
from dit_ds.files import read_json, sha256_of

IMAGE_SETS = dict.fromkeys(["refcoco", "refcoco+", "refcocog", "grefcoco"], "coco/train2014")
IMAGE_SETS["refclef"] = "saiapr_tc-12"
_REF_KEYS = ("ref_id", "ann_id", "image_id", "split", "sentences")
_NO_TARGET = -1  # gRefCOCO's ann_id of an expression without a target in the image


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of one split, with its refs and their annotations.

    Attributes:
        image: COCO's image entry, reduced to `id`, `file_name`, `height`, `width`.
        refs: the split's refs of this image in order of ref_id, each with `ref_id`, `ann_ids` (the target is the union
            of their masks), `no_target` (there is none), `sentences` with `sent_id`, `raw` and `sent`, and in a combined
            dataset `dataset`.
        annotations: COCO's annotations that the refs name, by ann_id.
    """

    image: dict[str, Any]
    refs: list[dict[str, Any]]
    annotations: dict[int | str, dict[str, Any]]


@dataclass(frozen=True)
class ReferTree:
    """A loaded dataset, independent of the format of its files.

    Attributes:
        dataset, split_by: REFER's names, as refcoco and unc.
        splits: records by split.
        sources: SHA-256 of each file that was read, by name.
        description: `info.description` of the annotation file.
        image_set: the image collection that the image ids belong to; datasets of one collection may share images.
        leakage: in a combined dataset, the numbers of images, refs and sentences of each dataset that were left out
            because a val or test split of one of them has the image.
        published: its refs are those of a published dataset, whose faults are read as published code reads them.
    """

    dataset: str
    split_by: str
    splits: dict[str, list[ImageRecord]]
    sources: dict[str, str]
    description: str
    image_set: str
    leakage: dict[str, dict[str, int]] | None = None
    published: bool = False


def load_refs(path: Path) -> list[dict[str, Any]]:
    """Read a refs file: JSON, or a pickle written by Python 2 (hence latin1), without running code from it.

    Raises:
        UserError: it is damaged, asks to run code, or is no list of refs.
    """
    try:
        if path.suffix == ".json":
            refs = read_json(path, "refs file")
        else:
            refs = load_plain(path.read_bytes())
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        why = " ".join(str(e).split())
        raise UserError(
            f"{path} is not a plain REFER pickle ({why}), nothing was run: fetch the original file"
        ) from None
    except Exception as e:  # a damaged pickle can raise nearly anything
        why = " ".join(str(e).split())
        raise UserError(f"{path} is damaged ({type(e).__name__}: {why}): fetch the file again") from None
    if not isinstance(refs, (list, tuple)) or not all(isinstance(r, dict) for r in refs):
        raise UserError(f"{path} does not hold a list of refs: fetch the original file")
    return list(refs)


def _refs_file(folder: Path, split_by: str) -> Path:
    for name in (f"refs({split_by}).p", f"grefs({split_by}).json", f"grefs({split_by}).p"):
        if (folder / name).exists():
            return folder / name
    there = sorted({p.name.split("(")[1].split(")")[0] for p in folder.glob("*refs(*).*")})
    hint = f"--split-by can be {', '.join(there)} here" if there else "--refer-root must hold DATASET/refs(SPLITBY).p"
    raise UserError(f"no refs file at {folder / f'refs({split_by}).p'}: {hint}")


def load_refer(root: str | Path, dataset: str, split_by: str) -> ReferTree:
    """Load one dataset of a REFER or gREFER tree and join its refs with images and annotations on their ids.

    The annotation file covers every object of the images; only annotations that a ref names are loaded.

    Args:
        root: folder that holds a folder for each dataset.
        dataset, split_by: REFER's names, as refcoco and unc.

    Raises:
        UserError: a missing or damaged file, or a ref whose image or annotation is missing.
    """
    folder = Path(root) / dataset
    if not folder.is_dir():
        there = sorted(p.parent.name for p in Path(root).glob("*/instances.json"))
        near = difflib.get_close_matches(dataset, there, 1)
        hint = f"did you mean {near[0]}?" if near else f"it holds {', '.join(there) or 'no dataset'}"
        raise UserError(f"no dataset '{dataset}' in {root}: {hint}")
    refs_file, instances_file = _refs_file(folder, split_by), folder / "instances.json"
    generalized = refs_file.name.startswith("grefs")
    refs = [normalised_ref(r, refs_file, generalized) for r in load_refs(refs_file)]
    published = is_published(dataset, split_by, refs)
    check_refs(refs, refs_file, same_sentence_ids=published)
    wanted = {a for r in refs for a in r["ann_ids"]}
    instances = read_json(instances_file, "annotation file", object_hook=without_other_annotations(wanted))
    images, annotations = coco_tables(instances, instances_file)
    if generalized:
        _drop_crowds(refs, annotations)
    splits = join(refs, images, annotations, instances_file, "fetch both again")
    sources = {f.name: sha256_of(f) for f in (refs_file, instances_file)}
    description = describe(instances)
    image_set = IMAGE_SETS.get(dataset, dataset)
    return ReferTree(
        dataset, split_by, splits, sources, description=description, image_set=image_set, published=published
    )


def normalised_ref(ref: dict[str, Any], path: object, generalized: bool = False) -> dict[str, Any]:
    """A ref of REFER, or with `generalized` of gREFER, in the form of `ImageRecord.refs`, plus `image_id` and `split`.

    Args:
        path: names its file in messages.
    Raises:
        UserError: it lacks a key, has no annotation, or its sentences are no list of objects. `check_refs` checks what
            its keys have.
    """
    where = f"{path}: ref {show(ref.get('ref_id'))}"
    for key in _REF_KEYS:
        if key not in ref:
            raise UserError(f"{where} has no '{key}': mend it, or fetch the original file")
    sentences = ref["sentences"]
    if not isinstance(sentences, (list, tuple)) or not all(isinstance(s, dict) for s in sentences):
        raise UserError(
            f"{where}: its sentences must be a list of {{sent_id, raw, sent}}, not {show(sentences)}: mend it"
        )
    ann_ids = list(ref["ann_id"]) if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
    if generalized:
        ann_ids = [a for a in ann_ids if a != _NO_TARGET]
    elif not ann_ids:
        raise UserError(f"{where} has no annotation: mend it, or call the file grefs(..).p if nothing fits")
    common = {k: ref[k] for k in ("ref_id", "image_id", "split")}
    texts = [{"sent_id": s.get("sent_id"), "raw": s.get("raw", ""), "sent": s.get("sent", "")} for s in sentences]
    return common | {"ann_ids": ann_ids, "no_target": not ann_ids, "sentences": texts}


def _drop_crowds(refs: list[dict[str, Any]], annotations: dict[int, dict[str, Any]]) -> None:
    """Remove crowds from the refs' annotations, as gRefCOCO's code does. A ref of crowds only becomes unusable."""
    for ref in refs:
        ref["ann_ids"] = [a for a in ref["ann_ids"] if not annotations.get(a, {}).get("iscrowd")]


def without_other_annotations(wanted: Container[Any]) -> Callable[[dict[str, Any]], Any]:
    """An `object_hook` for `json.load` that turns each annotation that isn't `wanted` into its id as soon as it is parsed.

    It keeps a quarter of RefCOCO's 197 thousand annotations, which would take a gigabyte together.
    """

    def hook(value: dict[str, Any]) -> Any:
        ann_id = value.get("id")
        return UnreadAnnotation(ann_id) if "image_id" in value and is_id(ann_id) and ann_id not in wanted else value

    return hook


def join(
    refs: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    annotations: dict[int, dict[str, Any]],
    path: Path,
    remedy: str,
) -> dict[str, list[ImageRecord]]:
    """Join refs with images and annotations into records by split.

    The key is image_id: a ref's `file_name` is not that of its image.

    Args:
        refs: as returned by `normalised_ref`, checked.
        images, annotations: by id.
        path, remedy: for the error: the file that lacks an image or annotation, and what to do about it.
    Raises:
        UserError: an image or annotation is missing, or a split's name can't be part of a file's name.
    """
    grouped: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for ref in sorted(refs, key=lambda r: r["ref_id"]):
        if ref["image_id"] not in images:
            raise UserError(f"ref {ref['ref_id']}: image {ref['image_id']} is not in {path}: {remedy}")
        for a in ref["ann_ids"]:
            if a not in annotations:
                raise UserError(f"ref {ref['ref_id']}: annotation {a} is not in {path}: {remedy}")
        if not isinstance(ref["split"], str) or not re.fullmatch(r"\w[\w.+-]{0,99}", ref["split"]):
            raise UserError(
                f"ref {ref['ref_id']}: its split {show(ref['split'])} can't name files: call it train or val"
            )
        grouped.setdefault(ref.pop("split"), {}).setdefault(ref.pop("image_id"), []).append(ref)
    return {
        split: [
            ImageRecord(images[i], image_refs, {a: annotations[a] for r in image_refs for a in r["ann_ids"]})
            for i, image_refs in sorted(by_image.items())
        ]
        for split, by_image in grouped.items()
    }


def clean_sentence(sentence: dict[str, Any]) -> str:
    """The expression's text, normalised: REFER's `sent`, or, where that is empty, `raw`.

    Raises:
        UnusableRecord: both are empty.
    """
    text: str = normalise_expression(sentence.get("sent", "")) or normalise_expression(sentence.get("raw", ""))
    if not text:
        raise UnusableRecord(f"sentence {sentence.get('sent_id')} is empty")
    return text


def describe(file: dict[str, Any]) -> str:
    """A COCO file's `info.description`, or an empty string."""
    info = file.get("info")
    return str(info.get("description", "")) if isinstance(info, dict) else ""
