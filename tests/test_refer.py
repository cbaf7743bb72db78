"""REFER's files: every mask encoding, the joins, and files that are not what they should be."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco
from refer_files import H, W, box, filled

from dit_ds.data.annotations.refer import clean_sentence, load_refer
from dit_ds.data.masks import UnusableRecord, annotation_rle, decode_rle
from dit_ds.errors import UserError

BLOCK = filled((3, 2, 11, 9))
RUNS = [3 * H + 2] + [7, H - 7] * 7 + [7, H - 9 + 18 * H + H]  # down the columns, zeros first


@pytest.mark.parametrize(
    ("segmentation", "truth"),
    [
        ([box(3, 2, 11, 9)], BLOCK),
        ([box(3, 2, 11, 9), box(20, 10, 25, 15)], filled((3, 2, 11, 9), (20, 10, 25, 15))),
        ([box(3, 2, 11, 9), box(6, 4, 16, 12)], filled((3, 2, 11, 9), (6, 4, 16, 12))),  # overlap counts once
        ([box(3, 2, 11, 9), [[20, 10], [25, 10], [25, 15], [20, 15]]], filled((3, 2, 11, 9), (20, 10, 25, 15))),
        ([[20, 10], [25, 10], [25, 15], [20, 15]], filled((20, 10, 25, 15))),  # the list around it is missing
        (box(3, 2, 11, 9), BLOCK),
        ({"size": [H, W], "counts": RUNS}, BLOCK),  # a crowd
        ([{"size": [H, W], "counts": RUNS}], BLOCK),  # refclef
        ([{"size": [H, W], "counts": coco.encode(np.asfortranarray(BLOCK))["counts"].decode()}], BLOCK),
    ],
)
def test_every_encoding_gives_the_union(segmentation, truth):
    rle = annotation_rle({"id": 1, "segmentation": segmentation}, H, W)
    assert isinstance(rle["counts"], str)
    np.testing.assert_array_equal(decode_rle(rle), truth)


@pytest.mark.parametrize("segmentation", [[], [[]], None, [[1, 2, 3, 4]], {"size": [H, W]}, "polygon"])
def test_what_encloses_nothing_is_named(segmentation):
    with pytest.raises(UnusableRecord, match="annotation 7"):
        annotation_rle({"id": 7, "segmentation": segmentation}, H, W)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1e300, 0, 1e300, 1e300, 0, 1e300]],
        [[float("inf"), 1, 2, 3, 4, 5]],
        [[float("nan")] * 6],
        [["a"] * 6],
        {"size": [H, W], "counts": [0, H * W + 1]},
        {"size": [H, W], "counts": [10, -5, H * W - 5]},
        {"size": [H, W], "counts": [10, 20]},
        {"size": [H, W], "counts": "zzz~~~"},
    ],
)
def test_what_pycocotools_would_die_of_is_named(segmentation):
    with pytest.raises(UnusableRecord, match="annotation 7: its segmentation can't be read"):
        annotation_rle({"id": 7, "segmentation": segmentation}, H, W)


def test_a_mask_of_another_size_is_refused():
    rle = {"size": [H, W], "counts": RUNS}
    with pytest.raises(UnusableRecord, match="annotation 7"):
        annotation_rle({"id": 7, "segmentation": rle}, H + 1, W)


def test_sentences():
    assert clean_sentence({"sent_id": 1, "sent": " left cup ", "raw": "Left cup!"}) == "left cup"
    assert clean_sentence({"sent_id": 1, "sent": "", "raw": "Left cup!"}) == "left cup"
    with pytest.raises(UnusableRecord, match="sentence 5 is empty"):
        clean_sentence({"sent_id": 5, "sent": " ", "raw": "?!"})


def write_tree(root: Path, refs=None, **changes) -> Path:
    """A hand-made tree: two images, three refs in two splits, written as Python 2 would."""

    def ref(ref_id, ann_id, image_id, split):
        sentences = [{"sent_id": ref_id, "sent": "left block", "raw": "Left block", "tokens": ["left", "block"]}]
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "category_id": 1,
                "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg", "sentences": sentences, "sent_ids": [ref_id]}  # fmt: skip

    refs = refs or [ref(0, 10, 1, "train"), ref(1, 11, 1, "train"), ref(2, 20, 2, "val")]
    instances = {
        "images": [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": H, "width": W} for i in (1, 2)],
        "annotations": [
            {"id": a, "image_id": a // 10, "category_id": 1, "segmentation": [box(3, 2, 11, 9)], "bbox": [3, 2, 8, 7],
             "area": 56, "iscrowd": 0}
            for a in (10, 11, 20)
        ],
    }  # fmt: skip
    folder = root / "refcoco"
    folder.mkdir(parents=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    (folder / "instances.json").write_text(json.dumps(instances | changes))
    return root


def test_refs_join_on_image_id(tmp_path):
    tree = load_refer(write_tree(tmp_path), "refcoco", "unc")
    assert {s: [(r.image["id"], [x["ref_id"] for x in r.refs]) for r in rs] for s, rs in tree.splits.items()} == {
        "train": [(1, [0, 1])],
        "val": [(2, [2])],
    }
    record = tree.splits["train"][0]
    assert record.image["file_name"] == "COCO_train2014_000000000001.jpg"  # not the ref's own file_name
    assert sorted(record.annotations) == [10, 11]


class Explosive:
    """What a malicious pickle would run."""

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_code_in_a_pickle_never_runs(tmp_path):
    write_tree(tmp_path)
    bomb = Explosive()
    bomb.path = str(tmp_path / "ran")
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps([bomb]))
    with pytest.raises(UserError, match="not a plain REFER pickle"):
        load_refer(tmp_path, "refcoco", "unc")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "damage", [b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps([{"ref_id": 1}]), pickle.dumps([1])]
)
def test_a_damaged_pickle_is_one_line(tmp_path, damage):
    write_tree(tmp_path)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(damage)
    with pytest.raises(UserError, match="refs"):
        load_refer(tmp_path, "refcoco", "unc")


def test_what_is_missing_is_named(tmp_path):
    write_tree(tmp_path)
    with pytest.raises(UserError, match="did you mean refcoco"):
        load_refer(tmp_path, "refcocoo", "unc")
    with pytest.raises(UserError, match="--split-by can be unc"):
        load_refer(tmp_path, "refcoco", "google")
    write_tree(tmp_path / "b", images=[])
    with pytest.raises(UserError, match="ref 0: image 1"):
        load_refer(tmp_path / "b", "refcoco", "unc")
    write_tree(tmp_path / "c", annotations=[])
    with pytest.raises(UserError, match="ref 0: annotation 10"):
        load_refer(tmp_path / "c", "refcoco", "unc")
    (tmp_path / "c/refcoco/instances.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_refer(tmp_path / "c", "refcoco", "unc")
