"""RefCOCO, RefCOCO+ and RefCOCOg as parquet files, without the REFER files: two forms that are about.

`jxu124/refcoco`, `refcocoplus`, `refcocog`: a row is a ref, with the annotation and the image's entry as JSON text.
`jxu124/refcoco-benchmark`: a row is an image, with the picture and a list of refs; no train split. Pictures are joined
by the image entry's file_name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_ds.data.annotations.refer import IMAGE_KEYS, IMAGE_SETS, ReferTree, join, normalised_ref
from dit_ds.errors import UserError
from dit_ds.files import sha256_of

_PUBLISHED = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # how the files with a row a ref are split
_ROWS = 512  # at once
_BY_REF = ["ref_id", "ann_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info"]
_BY_IMAGE = ["image_info", "ref_list"]
_LMMS_LAB = {"question_id", "question", "answer", "segmentation"}


def load_parquet(folder: str | Path, dataset: str, split_by: str) -> ReferTree:
    """Load one dataset of a folder of parquet files, or of its subfolder `refcoco`, `refcocoplus` or `refcocog`.

    Raises:
        UserError: pyarrow is missing; no such files; files that are damaged, of another form, or lmms-lab's.
    """
    folder = Path(folder)
    files = _files(folder, dataset)
    refs: list[dict[str, Any]] = []
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    sources = {}
    for file in files:
        form = _form(file)
        if form is _BY_IMAGE and not file.name.startswith(f"{dataset.replace('+', '_plus')}_{split_by}_"):
            continue
        if form is _BY_REF and _PUBLISHED.get(dataset, split_by) != split_by:
            raise UserError(f"{file} has the splits of {_PUBLISHED[dataset]}, not {split_by}: leave out --split-by")
        sources[file.name] = sha256_of(file)
        for ref, annotation, image in _refs(file, form):
            refs.append(ref | {"split": _split(ref["split"], split_by)})
            images[image["id"]] = image
            annotations[annotation["id"]] = annotation
    if not refs:
        raise UserError(f"no file {dataset.replace('+', '_plus')}_{split_by}_SPLIT-*.parquet in {files[0].parent}")
    splits = join(refs, images, annotations, files[0].parent, "fetch the files again")
    return ReferTree(dataset, split_by, splits, sources, "parquet", IMAGE_SETS.get(dataset, dataset))


def _files(folder: Path, dataset: str) -> list[Path]:
    own = folder / dataset.replace("+", "plus")
    for place in (own, own / "data", folder, folder / "data"):
        if files := sorted(place.glob("*.parquet")):
            return files
    raise UserError(f"no parquet files in {folder} or {own}: --parquet must hold them, or data/ with them")


def _form(file: Path) -> list[str]:
    """Which columns to read.

    Raises:
        UserError: none of the known forms.
    """
    columns = set(_open(file).schema_arrow.names)
    if columns.issuperset(_BY_REF):
        return _BY_REF
    if columns.issuperset(_BY_IMAGE):
        return _BY_IMAGE
    if columns.issuperset(_LMMS_LAB):
        raise UserError(
            f"{file} is lmms-lab's, whose val is not the official one (unc's 3811 refs and google's 5000 together) and "
            "whose masks are one polygon an object, parts are lost: use the REFER files or jxu124's parquet"
        )
    raise UserError(f"{file} has no columns {', '.join(_BY_REF)}: use the REFER files or jxu124's parquet")


def _refs(file: Path, form: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Each ref of a file, normalised, its annotation and its image; a few rows in memory at once, and no pictures."""
    try:
        for batch in _open(file).iter_batches(_ROWS, columns=form):
            for row in batch.to_pylist():
                for ref, annotation, image in _of_row(row, form):
                    if annotation["id"] != ref["ann_id"]:
                        raise ValueError(f"ref {ref['ref_id']} comes with annotation {annotation['id']}")
                    yield normalised_ref(ref), annotation, {k: image[k] for k in IMAGE_KEYS}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is damaged ({type(e).__name__}: {str(e)[:100]}): fetch it again") from None


def _of_row(row: dict[str, Any], form: list[str]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    if form is _BY_REF:
        return [(row, json.loads(row["raw_anns"]), json.loads(row["raw_image_info"]))]
    return [(ref["ref_info"], ref["ann_info"], row["image_info"]) for ref in row["ref_list"]]


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'dit-ds[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is no parquet file ({str(e)[:100]}): fetch it again") from None


def _split(name: str, split_by: str) -> str:
    """REFER's name of a split; the Hugging Face hub has others. By unc there are several tests, and no `test`."""
    if name == "validation":
        return "val"
    return "testA" if name == "test" and split_by == "unc" else name
