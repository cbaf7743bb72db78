"""The embedded sample set: seeded scenes, written in REFER's file formats."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.parallel import forked_map
from dit_ds.data.sample_set.language import expressions
from dit_ds.data.sample_set.scenes import CATEGORIES, Scene, make_scene, render_jpeg
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, full_disk_is_user_error, read_json, write_json

DESCRIPTION = "dit-ds sample set"
_MAX_IMAGES = 500_000
_GROUP = 16  # images that a worker process draws at once
_ANNS_PER_IMAGE = 10  # ids are assigned in blocks, so that an image's ids don't depend on other images


def write_sample_set(
    out: str | Path, images: int = 2000, seed: int = 0, processes: int | None = None
) -> dict[str, int]:
    """Write `OUT/refcoco/{refs(unc).p,instances.json}` and `OUT/images/train2014/*.jpg`.

    The files depend on `images` and `seed` alone. The two annotation files are written last, so that an interrupted
    tree has none.

    Args:
        out: the folder.
        images: how many.
        seed: of scenes, images and expressions.
        processes: that draw images, by default one a core.
    Returns:
        Counts: images, refs, sentences, annotations.
    Raises:
        UserError: a count out of range, a full disk, or another dataset in the folder.
        RunFailed: a worker process was killed.
    """
    if not 20 <= images <= _MAX_IMAGES:
        raise UserError(f"--images {images}: choose from 20 (one for each split at least) to {_MAX_IMAGES}")
    tree, image_folder = Path(out) / "refcoco", Path(out) / "images" / "train2014"
    refs_file, instances_file = tree / "refs(unc).p", tree / "instances.json"
    if instances_file.exists():
        info = read_json(instances_file, "annotation file").get("info", {})
        if info.get("description") != DESCRIPTION:
            raise UserError(f"{tree} holds another dataset: choose another folder than {out}")
    refs_file.unlink(missing_ok=True)
    instances_file.unlink(missing_ok=True)
    with full_disk_is_user_error(image_folder):
        image_folder.mkdir(parents=True, exist_ok=True)

    image_ids = np.random.default_rng(seed).choice(_MAX_IMAGES, images, replace=False) + 1
    jobs = list(enumerate(int(i) for i in image_ids))
    groups = [jobs[i : i + _GROUP] for i in range(0, images, _GROUP)]
    make = functools.partial(_make_images, seed=seed, folder=image_folder)
    records: list[dict[str, Any]] = []
    for made in forked_map(make, groups, processes, "images", size=len, total=images, unit="img"):
        # the refs file's bytes depend on which strings are one object: copied so, it is the same for any `processes`
        records += pickle.loads(pickle.dumps(made))

    refs = [ref for r in records for ref in r["refs"]]
    sentences = _number(refs)
    instances = _instances(records)
    write_json(instances_file, instances, indent=None)
    with atomic_write(refs_file) as f:
        pickle.dump(refs, f, protocol=2)
    return {"images": images, "refs": len(refs), "sentences": sentences, "annotations": len(instances["annotations"])}


def _number(refs: list[dict[str, Any]]) -> int:
    """Set ref_ids and sent_ids in the refs' order; return the number of sentences."""
    sent_id = 0
    for ref_id, ref in enumerate(refs):
        ref["ref_id"] = ref_id
        for sentence in ref["sentences"]:
            sentence["sent_id"] = sent_id
            sent_id += 1
        ref["sent_ids"] = [s["sent_id"] for s in ref["sentences"]]
    return sent_id


def _instances(records: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's annotation file."""
    return {
        "info": {"description": DESCRIPTION, "version": "1.0", "year": 2014, "contributor": "dit-ds", "url": "",
                 "date_created": "2014-01-01"},
        "licenses": [{"id": 1, "name": "CC0", "url": ""}],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for name, i in CATEGORIES.items()],
        "images": [r["image"] for r in records],
        "annotations": [a for r in records for a in r["annotations"]],
    }  # fmt: skip


def scene_of(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of the set with this seed, and the generator that its image and expressions draw from next."""
    rng = np.random.default_rng([seed, index])
    return make_scene(rng), rng


def _make_images(jobs: list[tuple[int, int]], seed: int, folder: Path) -> list[dict[str, Any]]:
    return [_make_image(job, seed, folder) for job in jobs]


def _make_image(job: tuple[int, int], seed: int, folder: Path) -> dict[str, Any]:
    """Write one image; return its `image` entry, `annotations` and `refs`."""
    index, image_id = job
    scene, rng = scene_of(seed, index)
    name = f"COCO_train2014_{image_id:012d}.jpg"
    with atomic_write(folder / name) as f:
        f.write(render_jpeg(scene, rng))
    referred: dict[int, list[str]] = {}
    for i in rng.permutation(len(scene.things)):
        texts = expressions(scene, int(i), rng)
        if len(texts) >= 3 and len(referred) < 3:
            referred[int(i)] = texts
    first = index * _ANNS_PER_IMAGE + 1
    annotations = [annotation(scene, i, first + i, image_id, i in referred) for i in range(len(scene.things))]
    refs = [_ref(annotations[i], split_of(index), texts) for i, texts in referred.items()]
    image = {"id": image_id, "file_name": name, "width": scene.width, "height": scene.height, "license": 1,
               "coco_url": "", "flickr_url": "", "date_captured": "2014-01-01 00:00:00"}  # fmt: skip
    return {"image": image, "annotations": annotations, "refs": refs}


def split_of(index: int) -> str:
    """The split of an image: of 20 images 16 are train, 2 val, 1 testA, 1 testB."""
    return (["train"] * 16 + ["val"] * 2 + ["testA", "testB"])[index % 20]


def _ref(target: dict[str, Any], split: str, texts: list[str]) -> dict[str, Any]:
    """REFER's ref of an annotation, its ids still to be set by `_number`."""
    ann_id, image_id = target["id"], target["image_id"]
    sentences = [{"raw": t[0].upper() + t[1:] + ".", "sent": t, "sent_id": -1, "tokens": t.split()} for t in texts]
    return {
        "ref_id": -1, "ann_id": ann_id, "image_id": image_id, "category_id": target["category_id"],
        "split": split, "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg", "sent_ids": [],
        "sentences": sentences,
    }  # fmt: skip


def annotation(scene: Scene, i: int, ann_id: int, image_id: int, referred: bool) -> dict[str, Any]:
    """COCO's annotation of thing `i`: polygons, or RLE for a mask with a hole and for a group of dots.

    Args:
        referred: a ref is to it. REFER's `getMask` can't read COCO's crowds, and no ref of its files is to one: a group
            of dots is a crowd only if none is.
    """
    thing, mask = scene.things[i], scene.mask(i)
    group = thing.shape == "dots"
    crowd = group and not referred
    if crowd:  # as COCO writes crowds: one dict with uncompressed run lengths
        segmentation: Any = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    elif not scene.occluded(i) and thing.hole is None and not group:
        segmentation = [np.round(thing.outlines[0], 2).ravel().tolist()]
    else:
        polygons = None if group else _polygons(mask)
        segmentation = polygons or _rle_list(mask)  # None where a part has a hole
    ys, xs = np.nonzero(mask)
    bbox = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
    return {"id": ann_id, "image_id": image_id, "category_id": CATEGORIES[thing.shape], "iscrowd": int(crowd),
            "area": int(mask.sum()), "bbox": bbox, "segmentation": segmentation}  # fmt: skip


def _rle_list(mask: np.ndarray) -> list[dict[str, Any]]:
    """A list of one compressed RLE, as refclef has."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return [{"size": list(mask.shape), "counts": rle["counts"].decode()}]


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: run lengths in column-major order, the first of zeros."""
    column_major = np.concatenate([[0], mask.T.ravel().astype(np.int8), [2]])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(column_major))])).tolist()


def _polygons(mask: np.ndarray) -> list[list[float]] | None:
    """The mask's outlines as COCO polygons, one a part; None where a part has a hole, which polygons can't express."""
    import contourpy

    padded = np.pad(mask, 1).astype(float)
    generator = contourpy.contour_generator(z=padded, fill_type="OuterOffset")
    filled: tuple[list[np.ndarray], list[np.ndarray]] = generator.filled(0.5, 2.0)  # type: ignore[assignment]
    parts, offsets = filled
    if any(len(o) > 2 for o in offsets):
        return None
    outlines = [np.asarray(p)[:-1] - 0.5 for p in parts]  # -1 for the padding, +0.5 from centres to edges
    return [np.round(o[_corners(o)], 2).ravel().tolist() for o in outlines if len(o) >= 6]


def _corners(outline: np.ndarray) -> np.ndarray:
    """(points,) bool: the vertices at which the outline changes direction; the others are redundant."""
    before, after = outline - np.roll(outline, 1, 0), np.roll(outline, -1, 0) - outline
    return np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
