"""A user's own dataset: a COCO file with expressions in it.

Beside COCO's `images` and `annotations` it has
`"expressions": [{"image_id": 1, "annotation_ids": [5], "text": "the left dog", "split": "train"}, ...]`, where `text`
may be a list of several expressions of one target, several `annotation_ids` are one target together, and `[]` says that
the expression has no target in the image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_ds.data.annotations.check import check_refs, coco_tables
from dit_ds.data.annotations.refer import ReferTree, describe, join
from dit_ds.errors import UserError
from dit_ds.files import read_json, sha256_of


def load_coco(path: str | Path, dataset: str, split_by: str) -> ReferTree:
    """Load the file; each entry of `expressions` becomes a ref, with its position as ref_id.

    Args:
        path: the JSON file.
        dataset, split_by: the names to give it.
    Raises:
        UserError: no such file, no expressions in it, or a record that `check.py` refuses.
    """
    path = Path(path)
    file = read_json(path, "annotation file")
    images, annotations = coco_tables(file, path)
    expressions = file.get("expressions")
    if not isinstance(expressions, list) or not expressions:
        raise UserError(
            f"{path} has no 'expressions': a list of {{image_id, annotation_ids, text, split}}, see docs/own-data.md"
        )
    refs, sent_id = [], 0
    for n, expression in enumerate(expressions):
        texts = _texts(path, n, expression)
        ids = expression["annotation_ids"]
        sentences = [{"sent_id": sent_id + k, "raw": text, "sent": ""} for k, text in enumerate(texts)]
        sent_id += len(texts)
        refs.append({"ref_id": n, "image_id": expression["image_id"], "split": expression["split"], "ann_ids": ids,
                     "no_target": not ids, "sentences": sentences})  # fmt: skip
    check_refs(refs, path, noun="expression")
    splits = join(refs, images, annotations, path, "mend the expression or add what it names")
    description = describe(file)
    sources = {path.name: sha256_of(path)}
    return ReferTree(dataset, split_by, splits, sources, description=description, image_set=dataset)


def _texts(path: Path, n: int, expression: Any) -> list[str]:
    """The texts of expression `n`.

    Raises:
        UserError: a key of it is missing or of a wrong type.
    """
    types: dict[str, Any] = {"image_id": int, "annotation_ids": list, "text": (str, list), "split": str}
    for key, expected in types.items():
        if not isinstance(expression, dict) or not isinstance(expression.get(key), expected):
            raise UserError(
                f"{path}: expression {n} has no '{key}' as it should be: write {{image_id, annotation_ids, text, split}}"
            )
    texts = expression["text"] if isinstance(expression["text"], list) else [expression["text"]]
    if not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{path}: expression {n}: its text must be a string or a list of strings")
    return texts
