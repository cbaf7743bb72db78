"""RefCOCO, RefCOCO+ and RefCOCOg from parquet files instead of the REFER files, in two schemas.

`jxu124/refcoco`, `refcocoplus`, `refcocog`: a row is a ref, with its annotation and image entry as JSON text.
`jxu124/refcoco-benchmark`: a row is an image, with its pixels and a list of refs; no train split. The pixels are not
read: image files are found by the image entry's file_name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_ds.data.annotations.check import add_annotation, add_image, check_refs
from dit_ds.data.annotations.published import is_published
from dit_ds.data.annotations.refer import IMAGE_SETS, ReferTree, join, normalised_ref
from dit_ds.errors import UserError
from dit_ds.files import sha256_of

_PUBLISHED = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # splitBy of the files with one row a ref
_ROWS = 512  # in memory at once
_BY_REF = ["ref_id", "ann_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info"]
_BY_IMAGE = ["image_info", "ref_list"]
_LMMS_LAB = {"question_id", "question", "answer", "segmentation"}


def load_parquet(folder: str | Path, dataset: str, split_by: str) -> ReferTree:
    """Load one dataset from a folder of parquet files, or from its subfolder `refcoco`, `refcocoplus` or `refcocog`.

    Raises:
        UserError: pyarrow is missing, the files are missing, damaged, of an unknown schema, or lmms-lab's, or they have
            a record that `check.py` refuses.
    """
    folder = Path(folder)
    files = _files(folder, dataset)
    refs: list[dict[str, Any]] = []
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    sources = {}
    for file in files:
        schema = _schema(file)
        if schema is _BY_IMAGE and not file.name.startswith(f"{dataset.replace('+', '_plus')}_{split_by}_"):
            continue
        if schema is _BY_REF and _PUBLISHED.get(dataset, split_by) != split_by:
            raise UserError(f"{file} has the splits of {_PUBLISHED[dataset]}, not {split_by}: leave out --split-by")
        sources[file.name] = sha256_of(file)
        for ref, annotation, image in _refs(file, schema):
            refs.append(ref | {"split": _refer_split(ref["split"], split_by)})
            add_image(images, image, str(file), repeated=True)
            add_annotation(annotations, annotation, str(file), repeated=True)
    if not refs:
        raise UserError(f"no file {dataset.replace('+', '_plus')}_{split_by}_SPLIT-*.parquet in {files[0].parent}")
    published = is_published(dataset, split_by, refs)
    check_refs(refs, files[0].parent, same_sentence_ids=published)
    splits = join(refs, images, annotations, files[0].parent, "fetch the files again")
    image_set = IMAGE_SETS.get(dataset, dataset)
    return ReferTree(
        dataset, split_by, splits, sources, description="parquet", image_set=image_set, published=published
    )


def _files(folder: Path, dataset: str) -> list[Path]:
    subfolder = folder / dataset.replace("+", "plus")
    for candidate in (subfolder, subfolder / "data", folder, folder / "data"):
        if files := sorted(candidate.glob("*.parquet")):
            return files
    raise UserError(f"no parquet files in {folder} or {subfolder}: --parquet must hold them, or data/ with them")


def _schema(file: Path) -> list[str]:
    """The columns to read, which tell the two schemas apart.

    Raises:
        UserError: the file has neither.
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


def _refs(file: Path, schema: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Each ref of a file, normalised, with its annotation and image entry; `_ROWS` rows in memory at once."""
    try:
        for batch in _open(file).iter_batches(_ROWS, columns=schema):
            for row in batch.to_pylist():
                for ref, annotation, image in _refs_of_row(row, schema):
                    if annotation["id"] != ref["ann_id"]:
                        raise ValueError(f"ref {ref['ref_id']} comes with annotation {annotation['id']}")
                    yield normalised_ref(ref, file), annotation, image
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is damaged ({type(e).__name__}: {str(e)[:100]}): fetch it again") from None


def _refs_of_row(row: dict[str, Any], schema: list[str]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    if schema is _BY_REF:
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


def _refer_split(name: str, split_by: str) -> str:
    """REFER's name for a split of the Hugging Face hub; unc has testA and testB, and no `test`."""
    if name == "validation":
        return "val"
    return "testA" if name == "test" and split_by == "unc" else name
