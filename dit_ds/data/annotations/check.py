"""Checks that the records of every source pass: ids, names, sizes and texts, and that nothing is there twice.

Each fault is one line that names the file and the record, and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from dit_ds.errors import UserError

IMAGE_KEYS = ("id", "file_name", "height", "width")
_LONGEST = 60  # characters of a wrong value that a message shows


class UnreadAnnotation(int):
    """The id of an annotation that no ref names, in its place."""

    __slots__ = ()


def coco_tables(file: Any, path: object) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """A COCO file's images, reduced to `IMAGE_KEYS`, and annotations by id, checked.

    Annotations that are `UnreadAnnotation` are left out, once their ids were compared with the others'.

    Raises:
        UserError: it is no such file, or an entry is malformed or there twice.
    """
    for key in ("images", "annotations"):
        if not isinstance(file, dict) or not isinstance(file.get(key), list):
            raise UserError(f"{path} is not a COCO annotation file (no list '{key}'): mend it, or fetch the original")
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    for n, image in enumerate(file["images"]):
        add_image(images, image, f"{path}: images[{n}]")
    unread: set[int] = set()
    for n, annotation in enumerate(file["annotations"]):
        if not isinstance(annotation, UnreadAnnotation):
            add_annotation(annotations, annotation, f"{path}: annotations[{n}]")
        elif annotation in unread:
            raise UserError(f"{path}: two of its annotations have the same id, {annotation}: number them anew")
        else:
            unread.add(annotation)
    return images, annotations


def add_image(images: dict[int, dict[str, Any]], entry: Any, where: str, repeated: bool = False) -> None:
    """Add COCO's image entry, reduced to `IMAGE_KEYS`, to `images` by its id.

    Args:
        where: names the file, and the entry, in messages.
        repeated: an image may come several times, if it is the same.
    Raises:
        UserError: the entry is malformed, or there twice.
    """
    _require_keys(entry, IMAGE_KEYS, where)
    image = {k: entry[k] for k in IMAGE_KEYS}
    if not is_id(image["id"]):
        raise UserError(
            f"{where} has the id {show(image['id'])}, and image ids must be whole numbers from 0 on: number the images"
        )
    where, name = f"{where}, image {image['id']}", image["file_name"]
    if not _is_text(name) or min(name, default="\0") < " ":
        raise UserError(f"{where}: a file_name must be a string that can name a file, not {show(name)}: mend it")
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{where}: its file_name {show(name)} leads out of the folder of images: name it within")
    for side in ("height", "width"):
        if not _is_number(image[side]) or image[side] < 1 or image[side] % 1:  # some files have 640.0
            raise UserError(f"{where}: its {side} must be a whole number of pixels, not {show(image[side])}: mend it")
    known = images.setdefault(image["id"], image)
    if known is not image and not (repeated and known == image):
        raise UserError(f"{where}: two of its images have the same id: number them anew")


def add_annotation(annotations: dict[int, dict[str, Any]], entry: Any, where: str, repeated: bool = False) -> None:
    """Add COCO's annotation to `annotations` by its id; as `add_image`.

    Raises:
        UserError: the entry is malformed, or there twice.
    """
    _require_keys(entry, ("id",), where)
    if not is_id(entry["id"]):
        raise UserError(
            f"{where} has the id {show(entry['id'])}, and annotation ids must be whole numbers from 0 on: number the "
            "annotations"
        )
    where = f"{where}, annotation {entry['id']}"
    _check_annotation(entry, where)
    known = annotations.setdefault(entry["id"], entry)
    if known is not entry and not (repeated and known == entry):
        raise UserError(f"{where}: two of its annotations have the same id: number them anew")


def _check_annotation(annotation: dict[str, Any], where: str) -> None:
    """The fields that become part of a sample as they are; each may be missing or null."""
    fields = {k: annotation.get(k) for k in ("iscrowd", "area", "category_id", "bbox")}
    bbox, category = fields["bbox"] if fields["bbox"] is not None else [], fields["category_id"]
    for key, expected, holds in (
        ("iscrowd", "0 or 1", fields["iscrowd"] in (None, 0, 1)),
        ("area", "a number", fields["area"] is None or _is_number(fields["area"])),
        ("category_id", "a number or a name", category is None or _is_number(category) or _is_text(category)),
        ("bbox", "a list of numbers", isinstance(bbox, list) and all(map(_is_number, bbox))),
    ):
        if not holds:
            raise UserError(f"{where}: its {key} must be {expected}, not {show(fields[key])}: mend it")


def check_refs(refs: list[dict[str, Any]], path: object, *, noun: str = "ref", same_sentence_ids: bool = False) -> None:
    """Check the refs of a source.

    Args:
        refs: in the form of `ImageRecord.refs`, plus `image_id` and `split`.
        path, noun: name their file, and one of them, in messages.
        same_sentence_ids: two sentences may have the same id.
    Raises:
        UserError: a ref is malformed, or it or a sentence is there twice.
    """
    ref_ids: set[int] = set()
    sentence_ids: dict[int, int] = {}  # each with its ref
    for n, ref in enumerate(refs):
        if not is_id(ref["ref_id"]):
            raise UserError(
                f"{path}: refs[{n}] has the ref_id {show(ref['ref_id'])}, and ref ids must be whole numbers from 0 on: "
                "number the refs"
            )
        where = f"{path}: {noun} {ref['ref_id']}"
        if ref["ref_id"] in ref_ids:
            raise UserError(f"{where} is there twice: remove one of the two, or number the refs anew")
        ref_ids.add(ref["ref_id"])
        _check_references(ref, where)
        for sentence in ref["sentences"]:
            _check_sentence(sentence, where)
            sent_id = sentence["sent_id"]
            if sent_id in sentence_ids and not same_sentence_ids:
                raise UserError(
                    f"{where}: its sentence {sent_id} has the id of one of {noun} {sentence_ids[sent_id]}: number the "
                    "sentences anew"
                )
            sentence_ids[sent_id] = ref["ref_id"]


def _check_references(ref: dict[str, Any], where: str) -> None:
    """The ids that a ref names."""
    for what, value in (("image_id", ref["image_id"]), *(("annotation id", a) for a in ref["ann_ids"])):
        if type(value) is not int:
            raise UserError(f"{where}: its {what} is {show(value)}, and ids must be whole numbers: mend it")


def _check_sentence(sentence: dict[str, Any], where: str) -> None:
    if not is_id(sentence["sent_id"]):
        raise UserError(
            f"{where}: a sentence has the sent_id {show(sentence['sent_id'])}, and sentence ids must be whole numbers "
            "from 0 on: number the sentences"
        )
    for key in ("raw", "sent"):
        text, of = sentence[key], f"('{key}' of sentence {sentence['sent_id']})"
        if not isinstance(text, str):
            raise UserError(f"{where}: its text must be a string, not {show(text)} {of}: mend it")
        if _half_character(text):
            raise UserError(f"{where}: its text has half a character, as \\ud83d {of}: mend it")


def is_id(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 0 on that fits in 64 bits; True and 1.0 are none."""
    return type(value) is int and 0 <= value < 2**63


def show(value: Any) -> str:
    """A wrong value for a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.."


def _require_keys(entry: Any, keys: Iterable[str], where: str) -> None:
    """Raise unless the entry is an object with these keys."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {show(entry)}, not an object: mend it")
    for key in keys:
        if key not in entry:
            raise UserError(f"{where} (id {show(entry.get('id'))}) has no '{key}': mend it")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**53  # not NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _half_character(value)


def _half_character(text: str) -> bool:
    """Whether UTF-8 has no bytes for it: half of a surrogate pair."""
    return not text.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in text)
