"""A segmentation is read as a whole or refused by name: no part of a mask is lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import dit_ds, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from refer_files import H, W, annotation, box, filled, image, ref, samples_of, write_images, write_refer

from dit_ds.data.masks import UnusableRecord, decode_rle, merge_parts
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError

GOOD = box(3, 2, 11, 9)
BLOCK = filled((3, 2, 11, 9))
RUNS = [3 * H + 2] + [7, H - 7] * 7 + [7, H - 9 + 18 * H + H]  # BLOCK down the columns, zeros first

MALFORMED: list[Any] = [
    [], [1.0, 2.0], [20, 10, 5, 5], [1.0] * 7, [[20, 10], [25, 10]], [[20, 10], [25, 10], [25]], [[20, 10], [25, 10], 5, 5],
    [[20, 10, 2], [25, 10, 2], [25, 15, 2]], [0.1, 0.1, 0.9, 0.1, 0.9, 0.9], [[0.1, 0.1], [0.9, 0.1], [0.9, 1.0]],
    [float("nan")] * 6, [20, 10, 25, 10, 25, float("nan")], [20, 10, 25, 10, 25, float("inf")], ["20", "10"] * 3,
    [20, 10, 25, None, 25, 15], [True, False] * 3, "polygon", None, 5, {}, {"counts": RUNS}, {"size": [H, W]},
    {"size": [W, H], "counts": RUNS}, {"size": [H, W], "counts": [float(n) + 0.5 for n in RUNS]},
    {"size": [H, W], "counts": RUNS[:-1]}, {"size": [H, W], "counts": "~"}, [W + 1, 1, W + 5, 1, W + 5, 5],
    [1, -9, 5, -9, 5, -1], [10**400, 1, 5, 5, 1, 5], [[[1, 2]], [[3, 4]], [[5, 6]]], [[], [], []],
]  # fmt: skip


def mask_of(segmentation: Any, **options: Any) -> np.ndarray:
    return decode_rle(merge_parts({"id": 7, "segmentation": segmentation}, H, W, **options)[0])


@pytest.mark.parametrize("n", range(len(MALFORMED)))
def test_a_malformed_part_refuses_the_whole_wherever_it_stands(n):
    part = MALFORMED[n]
    for parts, at in (([GOOD, part], 2), ([part, GOOD], 1), ([GOOD, part, GOOD], 2)):
        with pytest.raises(UnusableRecord, match="^annotation 7: its (segmentation can't be read|mask is)") as e:
            mask_of(parts)
        assert len(str(e.value).splitlines()) == 1 and (
            f"part {at} of" in str(e.value) or "its mask is" in str(e.value)
        )
    for alone in ([part], part):
        with pytest.raises(UnusableRecord, match="annotation 7"):
            mask_of(alone)


corner = st.tuples(st.floats(-5, W + 5).map(lambda x: round(x, 2)), st.floats(-5, H + 5).map(lambda y: round(y, 2)))
polygon = st.lists(corner, min_size=3, max_size=6)
parts = st.lists(
    st.tuples(polygon, st.sampled_from(["flat", "nested", "counts", "compressed"])), min_size=1, max_size=4
)


def inside(corners: list[tuple[float, float]]) -> bool:
    xs, ys = zip(*corners)
    return max(xs) >= 0 and max(ys) >= 0 and min(xs) <= W and min(ys) <= H and max(map(abs, xs + ys)) > 1.01


@settings(max_examples=300, deadline=None)
@given(parts, st.none() | st.tuples(st.integers(0, 4), st.sampled_from(MALFORMED)))
def test_good_parts_are_united_and_one_bad_one_refuses_them(drawn, bad):
    """Against pycocotools, part by part."""
    segmentation: list[Any] = []
    truth = np.zeros((H, W), bool)
    for corners, form in drawn:
        flat = [x for c in corners for x in c]
        rle = coco.frPyObjects([flat], H, W)[0]
        pixels = coco.decode(rle)
        truth |= pixels > 0
        if form == "flat":
            segmentation.append(flat)
        elif form == "nested":
            segmentation.append([list(c) for c in corners])
        elif form == "compressed":
            segmentation.append({"size": [H, W], "counts": rle["counts"].decode()})
        else:
            runs = np.diff(np.flatnonzero(np.diff(np.r_[2, 0, pixels.T.ravel(), 2]))).tolist()
            runs[0] -= 1  # of the zero put in front
            segmentation.append({"size": [H, W], "counts": runs})
    drawn_inside = all(inside(c) or form in ("counts", "compressed") for c, form in drawn)
    if bad is not None:
        segmentation.insert(*bad)
    if bad is None and drawn_inside and truth.any():
        np.testing.assert_array_equal(mask_of(segmentation), truth)
        return
    with pytest.raises(UnusableRecord, match="annotation 7"):
        mask_of(segmentation)


@settings(max_examples=100, deadline=None)
@given(st.lists(polygon.filter(inside), min_size=1, max_size=3), st.booleans())
def test_corners_with_visibility_are_read_when_asked(polygons, nested):
    plain = [[x for c in p for x in c] for p in polygons]
    marked = [[[*c, 1 + n % 2] for n, c in enumerate(p)] for p in polygons]
    segmentation = marked if nested else [[x for c in p for x in c] for p in marked]
    try:
        truth = mask_of(plain)
    except UnusableRecord:
        with pytest.raises(UnusableRecord):
            mask_of(segmentation, with_visibility=True)
        return
    np.testing.assert_array_equal(mask_of(segmentation, with_visibility=True), truth)
    if nested:
        with pytest.raises(UnusableRecord, match="--corners xyv"):
            mask_of(segmentation)
    with pytest.raises(UnusableRecord):  # three corners have six numbers, which is no multiple of three corners
        mask_of([GOOD], with_visibility=True)


def test_a_corner_that_was_not_labelled_is_no_corner():
    with pytest.raises(UnusableRecord, match="visibility is neither 1 nor 2"):
        mask_of([[3, 2, 2, 11, 2, 2, 11, 9, 2, 0, 0, 0]], with_visibility=True)


def test_one_polygon_without_the_list_around_it():
    np.testing.assert_array_equal(mask_of(GOOD), BLOCK)
    np.testing.assert_array_equal(mask_of([[3, 2], [11, 2], [11, 9], [3, 9]]), BLOCK)
    np.testing.assert_array_equal(mask_of([[3, 2, 1], [11, 2, 1], [11, 9, 1], [3, 9, 1]], with_visibility=True), BLOCK)


@pytest.mark.parametrize("seed", range(3))
def test_published_sets_are_read_as_before(seed):
    """Bit for bit what pycocotools gives for the parts with three corners or more, faults of the others whatever."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        polygons = [(rng.random(n) * max(H, W) * 1.2).round(2).tolist() for n in rng.integers(0, 12, 4)]
        kept = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
        due = coco.merge(coco.frPyObjects(kept, H, W)) if kept else None
        if due is None or not coco.area(due):
            with pytest.raises(UnusableRecord, match="covers no pixel" if kept else "no polygon with three corners"):
                mask_of(polygons, published=True)
            continue
        got = merge_parts({"id": 7, "segmentation": polygons}, H, W, published=True)[0]
        assert got == {"size": [H, W], "counts": due["counts"].decode()}
    np.testing.assert_array_equal(
        mask_of([[0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], published=True), filled((0, 0, 1, 1))
    )


def own_set(folder: Path, segmentation: Any) -> list:
    """The command that shards a set of one picture with a good annotation and this one."""
    file = {"images": [image(1)], "annotations": [annotation(5, 1), annotation(6, 1, segmentation)],
            "expressions": [{"image_id": 1, "annotation_ids": [a], "text": "a dog", "split": "train"} for a in (5, 6)]}  # fmt: skip
    (folder / "own.json").write_text(json.dumps(file))
    images = write_images(folder / "images", file["images"])
    return [
        "data",
        "shard",
        "--coco",
        folder / "own.json",
        "--images",
        images,
        "--dataset",
        "mine",
        "--out",
        folder / "out",
    ]


def test_the_command_refuses_counts_or_reads(tmp_path):
    marked = [[[3, 2, 2], [11, 2, 2], [11, 9, 1], [3, 9, 1]]]
    command = own_set(tmp_path, [GOOD, [20, 10, 5, 5]])
    line = refused(dit_ds(*command, check=None))
    assert "ref 1: annotation 6: its segmentation can't be read (part 2 of 2: it has 4 numbers, as a box" in line
    assert not (tmp_path / "out/mine/own/manifest.json").exists()
    done = dit_ds(*command, "--skip-bad", "--json")
    assert json.loads(done.stdout)["train"]["dropped"]["refs"] == 1 and "left out: ref 1: annotation 6" in done.stderr
    command = own_set(tmp_path, marked)
    assert "--corners xyv reads" in refused(dit_ds(*command, "--overwrite", check=None))
    for a in ("a", "b"):  # all polygons of a set have the same corners
        own_set(tmp_path, marked)
        file = json.loads((tmp_path / "own.json").read_text())
        file["annotations"][0]["segmentation"] = marked
        (tmp_path / "own.json").write_text(json.dumps(file))
        dit_ds(*command[:-1], tmp_path / a, "--corners", "xyv")
    folder = tmp_path / "a/mine/own"
    np.testing.assert_array_equal(decode_rle(samples_of(folder)[1]["anns"]["6"]["rle"]), BLOCK)
    assert json.loads((folder / "manifest.json").read_text())["corners"] == "xyv"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "b/mine/own").iterdir()}  # fmt: skip
    assert "--overwrite replaces it" in refused(dit_ds(*command[:-1], tmp_path / "a", check=None))


def test_a_refer_tree_is_read_alike(tmp_path):
    write_refer(tmp_path, "refcoco", "unc", [ref(0, 10, 1)], [image(1)], [annotation(10, 1, [GOOD, [1, 2, 3, 4]])])
    images = write_images(tmp_path / "images", [image(1)])
    with pytest.raises(UserError, match="ref 0: annotation 10: its segmentation can't be read .part 2 of 2"):
        shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", processes=1)
