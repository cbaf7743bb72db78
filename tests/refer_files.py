"""Hand-made annotation files in each form they come in, and pictures to go with them."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

H, W = 20, 30


def box(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    """A rectangle as a COCO polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def filled(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """(H, W) uint8: 1 in any of the rectangles."""
    mask = np.zeros((H, W), np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = 1
    return mask


class _Python2Pickler(pickle._Pickler):
    """Strings as Python 2 wrote its `str`: bytes without an encoding."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str) -> None:
        data = text.encode("latin1")
        short = len(data) < 256
        self.write(pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
        self.write((bytes([len(data)]) if short else struct.pack("<i", len(data))) + data)
        self.memoize(text)

    dispatch[str] = save_str


def python2_pickle(value: Any) -> bytes:
    """The value pickled with protocol 2 as by Python 2."""
    out = io.BytesIO()
    _Python2Pickler(out, 2).dump(value)
    return out.getvalue()


def ref(ref_id: int, ann_id: int | list[int], image_id: int, split: str = "train", texts: Iterable[str] = ("a block",)):
    """A ref as REFER has it, or gREFER, where `ann_id` is a list."""
    texts = list(texts)
    sentences = [{"sent_id": 10 * ref_id + k, "sent": t.lower(), "raw": t, "tokens": t.lower().split()}
                 for k, t in enumerate(texts)]  # fmt: skip
    return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "category_id": 1,
            "file_name": f"COCO_train2014_{image_id:012d}_7.jpg", "sentences": sentences,
            "sent_ids": [s["sent_id"] for s in sentences]}  # fmt: skip


def image(image_id: int, file_name: str | None = None) -> dict[str, Any]:
    """An entry of COCO's `images`."""
    return {"id": image_id, "file_name": file_name or f"COCO_train2014_{image_id:012d}.jpg", "height": H, "width": W,
            "license": 1, "coco_url": ""}  # fmt: skip


def annotation(ann_id: int, image_id: int, segmentation: Any = None, iscrowd: int = 0) -> dict[str, Any]:
    """An entry of COCO's `annotations`; by default a block."""
    return {"id": ann_id, "image_id": image_id, "category_id": 1, "segmentation": segmentation or [box(3, 2, 11, 9)],
            "bbox": [3, 2, 8, 7], "area": 56, "iscrowd": iscrowd}  # fmt: skip


def write_refer(root: Path, dataset: str, split_by: str, refs: list, images: list, annotations: list) -> Path:
    """`ROOT/DATASET/{refs(SPLIT_BY).p,instances.json}`."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(python2_pickle(refs))
    instances = {"info": {"description": "by hand"}, "images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    return root


def write_images(folder: Path, images: Iterable[dict[str, Any]]) -> Path:
    """A JPEG for each entry."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in images:
        pixels = np.full((entry["height"], entry["width"], 3), 40 + entry["id"] % 200, np.uint8)
        Image.fromarray(pixels).save(folder / entry["file_name"], "JPEG")
    return folder


def own_set(folder: Path, texts: list[str]) -> Path:
    """The shards of an own set: one picture with a block, and these expressions of it."""
    from dit_ds.data.shards.write import shard_refer

    expressions = [{"image_id": 1, "annotation_ids": [10], "text": texts, "split": "train"}]
    file = {"images": [image(1)], "annotations": [annotation(10, 1)], "expressions": expressions}
    (folder / "own.json").write_text(json.dumps(file))
    pictures = write_images(folder / "images", [image(1)])
    shard_refer(None, pictures, "mine", None, folder / "shards", coco=folder / "own.json", processes=1)
    return folder / "shards/mine/own"


def samples_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The json members of a shard folder by image id, split by split the last one wins."""
    import tarfile

    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[int(member.name[:-5])] = json.loads(tar.extractfile(member).read())
    return found
