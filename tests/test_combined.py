"""Several sets as one to train on: what each says of an image, and no image that any of them tests on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import dit_ds, refused
from refer_files import H, W, annotation, box, filled, image, ref, samples_of, write_images, write_refer

from dit_ds.data.annotations.combine import load_source
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.masks import decode_rle
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError

SETS = "refcoco,refcoco+,refcocog"
IMAGES = [image(i) for i in range(1, 8)]
BLOCK, OTHER = [box(3, 2, 11, 9)], [box(1, 1, 4, 4)]
PACKED = {"size": [H, W], "counts": [3 * H + 2] + [7, H - 7] * 7 + [7, H - 9 + 18 * H + H]}  # BLOCK as runs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sets over seven images. Image i has annotation 10 i, which is the same in all sets but for images 1 and 5."""
    texts = {1: ["a"], 2: ["a", "b"], 3: ["a", "b", "c"]}
    refcoco = [ref(0, 10, 1, "train", texts[1]), ref(1, 20, 2, "train", texts[2]), ref(2, 30, 3, "train", texts[3]),
               ref(3, 30, 3, "train", texts[1]), ref(4, 40, 4, "val")]  # fmt: skip
    plus = [ref(0, 10, 1, "train", texts[3]), ref(1, 20, 2, "train", texts[1]), ref(2, 40, 4, "train", texts[2]),
            ref(3, 30, 3, "testA")]  # fmt: skip
    google = [ref(0, 10, 1, "train", texts[2]), ref(1, 40, 4, "train", texts[1]), ref(2, 50, 5, "train", texts[1]),
              ref(3, 20, 2, "val"), ref(4, 60, 6, "test"), ref(5, 70, 7, "train"), ref(6, 70, 7, "val")]  # fmt: skip
    for name, way, refs in (("refcoco", "unc", refcoco), ("refcoco+", "unc", plus), ("refcocog", "umd", google)):
        masks = {50: OTHER, 10: {"refcoco": BLOCK, "refcoco+": PACKED, "refcocog": OTHER}[name]}
        annotations = [annotation(10 * i["id"], i["id"], masks.get(10 * i["id"], BLOCK)) for i in IMAGES]
        write_refer(tmp_path / "refer", name, way, refs, IMAGES, annotations)
    write_images(tmp_path / "images", IMAGES)
    return tmp_path


def test_images_of_any_val_or_test_are_dropped_and_counted(root):
    """By hand: 4 is refcoco's val, 3 is refcoco+'s testA, 2, 6 and 7 are refcocog's val and test; 1 and 5 are left."""
    done = dit_ds("data", "shard", "--refer-root", root / "refer", "--images", root / "images", "--dataset", SETS,
                  "--out", root / "out", "--json", real=True)  # fmt: skip
    leakage = {
        "refcoco": {"images": 2, "refs": 3, "sentences": 2 + 3 + 1},
        "refcoco+": {"images": 2, "refs": 2, "sentences": 1 + 2},
        "refcocog": {"images": 2, "refs": 2, "sentences": 1 + 1},
    }
    report = json.loads(done.stdout)
    assert report["leakage"] == leakage
    folder = root / "out" / SETS / "unc,unc,umd"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["leakage"] == leakage and (manifest["dataset"], manifest["split_by"]) == (SETS, "unc,unc,umd")
    assert list(manifest["splits"]) == ["train"] and manifest["image_set"] == "coco/train2014"
    assert {k: report["train"][k] for k in ("images", "refs", "sentences")} == {"images": 2, "refs": 4, "sentences": 7}
    assert sorted(manifest["sources"]) == sorted(
        f"{s}/{f}"
        for s in SETS.split(",")
        for f in ("instances.json", f"refs({'umd' if s == 'refcocog' else 'unc'}).p")
    )
    assert verify_shards(folder)["ok"]


def test_an_image_has_the_refs_of_all_sets_and_each_mask_once(root):
    shard_refer(root / "refer", root / "images", SETS, None, root / "out", processes=1)
    folder = root / "out" / SETS / "unc,unc,umd"
    samples = samples_of(folder)
    assert sorted(samples) == [1, 5]
    assert [(r["dataset"], r["ref_id"], r["ann_ids"]) for r in samples[1]["refs"]] == [
        ("refcoco", 0, [10]),
        ("refcoco+", 0, [10]),  # its mask is written otherwise, and is the same
        ("refcocog", 0, ["10@refcocog"]),  # another mask under the same id
    ]
    masks = {k: decode_rle(a["rle"]) for k, a in samples[1]["anns"].items()}
    assert masks.keys() == {"10", "10@refcocog"}
    np.testing.assert_array_equal(masks["10"], filled((3, 2, 11, 9)))
    np.testing.assert_array_equal(masks["10@refcocog"], filled((1, 1, 4, 4)))
    index = SplitIndex.load(folder, "train")
    dataset = ExpressionDataset(index, "sentence", 32, lambda text: (np.zeros(4, np.int64), np.ones(4, bool)))
    assert len(dataset) == 7
    areas = sorted(int(dataset[0, s, 1.0]["original"].sum()) for s in range(7))
    assert areas == [9, 9, 9, 56, 56, 56, 56]


def test_bytes_do_not_depend_on_the_number_of_processes(root):
    for n in (1, 3):
        shard_refer(root / "refer", root / "images", SETS, None, root / f"out{n}", shards={"train": 2}, processes=n)
    a, b = (root / f"out{n}" / SETS / "unc,unc,umd" for n in (1, 3))
    assert len(list(a.iterdir())) == 3
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_sets_that_cannot_be_combined(root):
    def refusal(dataset: str, split_by: str | None = None) -> str:
        with pytest.raises(UserError) as e:
            load_source(dataset, split_by, refer_root=root / "refer")
        return str(e.value)

    assert "not of the same images" in refusal("refcoco,refclef")
    assert "names a set twice" in refusal("refcoco,refcoco")
    assert "--split-by unc is for 1 sets" in refusal("refcoco,refcoco+", "unc")
    assert "--split-by can be unc here" in refusal("refcoco,refcoco+", "unc,google")
    write_refer(root / "refer", "grefcoco", "unc", [ref(0, 40, 4, "val")], IMAGES, [annotation(40, 4)])
    assert "grefcoco unc has no train split" in refusal("refcoco,grefcoco")
    write_refer(
        root / "refer", "grefcoco", "x", [ref(0, 10, 1, "train"), ref(1, 10, 1, "val")], IMAGES, [annotation(10, 1)]
    )
    write_refer(root / "refer", "refcocog", "x", [ref(0, 10, 1, "train")], IMAGES, [annotation(10, 1)])
    assert "every train image" in refusal("grefcoco,refcocog", "x,x")
    line = refused(dit_ds("data", "shard", "--refer-root", root / "refer", "--images", root / "images", "--dataset",
                          "refcoco,refclef", check=None))  # fmt: skip
    assert "combine sets of COCO's train2014" in line


def test_a_copy_of_an_evaluated_image_is_dropped_too(root):
    """Image 5, which 1 stays beside, has the bytes of refcoco's val, 4."""
    pictures = {i["id"]: root / "images" / i["file_name"] for i in IMAGES}
    pictures[5].write_bytes(pictures[4].read_bytes())
    pictures[7].unlink()  # that no split of the combined set has
    manifest = shard_refer(root / "refer", root / "images", SETS, None, root / "out", processes=1)
    assert sorted(samples_of(root / "out" / SETS / "unc,unc,umd")) == [1]
    assert manifest["leakage"]["refcocog"] == {"images": 3, "refs": 3, "sentences": 3}
    pictures[1].write_bytes(pictures[4].read_bytes())
    with pytest.raises(UserError, match="every train image"):
        shard_refer(root / "refer", root / "images", SETS, None, root / "out2", processes=1)


def test_one_id_of_two_images_is_refused(root):
    write_refer(root / "refer", "refcoco+", "unc", [ref(0, 10, 1)], [image(1, "other.jpg")], [annotation(10, 1)])
    with pytest.raises(UserError, match="image 1 is 'other.jpg' in refcoco., and 'COCO_train2014_000000000001.jpg'"):
        load_source("refcoco,refcoco+", refer_root=root / "refer")
