"""Each form annotations come in, written by hand, gives the same records; what is wrong with one is named."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import dit_ds
from PIL import Image
from pycocotools import mask as coco
from refer_files import H, W, annotation, box, filled, image, python2_pickle, ref, samples_of, write_images, write_refer

from dit_ds.data.annotations.combine import default_split_by, load_source
from dit_ds.data.annotations.refer import load_refer, load_refs
from dit_ds.data.masks import decode_rle
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError

IMAGES = [image(1), image(2), image(3)]
ANNOTATIONS = [
    annotation(10, 1),
    annotation(11, 1, [box(3, 2, 11, 9), box(6, 4, 16, 12)]),  # overlapping
    annotation(20, 2, {"size": [H, W], "counts": [0, 5, H * W - 5]}, iscrowd=1),
    annotation(30, 3, [box(1, 1, 4, 4)]),
    annotation(31, 3),  # nobody refers to it
]
REFS = [
    ref(0, 10, 1, texts=["Left block!", "the block"]),
    ref(1, 11, 1),
    ref(2, 20, 2, "val", ["caf\xe9 crowd"]),
    ref(3, 30, 3, "testA"),
]


def by_ref(r: dict) -> dict:
    """A row of jxu124/refcoco."""
    a, i = (next(x for x in xs if x["id"] == r[k]) for xs, k in ((ANNOTATIONS, "ann_id"), (IMAGES, "image_id")))
    return r | {"raw_anns": json.dumps(a), "raw_image_info": json.dumps(i), "raw_sentences": json.dumps(r["sentences"]),
                "image_path": f"coco/train2014/{i['file_name']}", "bbox": [3.0, 2.0, 11.0, 9.0], "captions": ["x"],
                "global_image_id": f"coco.{i['id']}", "anns_id": f"refcoco.{a['id']}"}  # fmt: skip


def by_image(of_image: list[dict]) -> dict:
    """A row of jxu124/refcoco-benchmark; its annotations have polygons only."""
    refs = [{"ref_info": r, "ann_info": next(a for a in ANNOTATIONS if a["id"] == r["ann_id"])} for r in of_image]
    picture = next(i for i in IMAGES if i["id"] == of_image[0]["image_id"])
    return {"image": {"bytes": b"pixels", "path": None}, "image_info": picture, "ref_list": refs}


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)


def write_mirror(folder: Path, refs: list[dict] = REFS) -> Path:
    """jxu124/refcoco: the hub calls val validation and testA test; the column `split` has REFER's names."""
    for split, name in (("train", "train"), ("val", "validation"), ("testA", "test")):
        rows = [by_ref(r) for r in refs if r["split"] == split]
        write_parquet(folder / f"data/{name}-00000-of-00001-94431d5f.parquet", rows)
    return folder


def test_refer_and_parquet_give_the_same_records(tmp_path):
    tree = load_refer(write_refer(tmp_path, "refcoco", "unc", REFS, IMAGES, ANNOTATIONS), "refcoco", "unc")
    mirror = load_source("refcoco", parquet=write_mirror(tmp_path / "mirror"))
    assert tree.splits == mirror.splits and tree.image_set == mirror.image_set == "coco/train2014"
    assert {s: [r.image["id"] for r in rs] for s, rs in tree.splits.items()} == {"train": [1], "val": [2], "testA": [3]}
    train = tree.splits["train"][0]
    assert train.image == {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": H, "width": W}
    assert train.refs[0] == {
        "ref_id": 0, "ann_ids": [10], "no_target": False,
        "sentences": [{"sent_id": 0, "raw": "Left block!", "sent": "left block!"},
                      {"sent_id": 1, "raw": "the block", "sent": "the block"}],
    }  # fmt: skip
    assert tree.splits["val"][0].refs[0]["sentences"][0]["raw"] == "caf\xe9 crowd"  # latin1, as Python 2 left it
    assert list(tree.splits["testA"][0].annotations) == [30]


def test_a_row_an_image_gives_the_same_records(tmp_path):
    tree = load_refer(write_refer(tmp_path, "refcoco", "unc", REFS, IMAGES, ANNOTATIONS), "refcoco", "unc")
    folder = tmp_path / "benchmark/data"
    write_parquet(folder / "refcoco_unc_testA-00000-of-00001-2c68b2dc.parquet", [by_image(REFS[3:])])
    write_parquet(folder / "refcoco_plus_unc_testA-00000-of-00001-2c68b2dc.parquet", [by_image(REFS[:2])])
    got = load_source("refcoco", parquet=tmp_path / "benchmark")
    assert got.splits == {"testA": tree.splits["testA"]} and len(got.sources) == 1
    assert load_source("refcoco+", parquet=tmp_path / "benchmark").splits["train"] == tree.splits["train"]
    with pytest.raises(UserError, match="no file refcocog_umd_SPLIT"):
        load_source("refcocog", parquet=tmp_path / "benchmark")


def test_parquet_shards_are_those_of_the_refer_files(tmp_path):
    write_refer(tmp_path, "refcoco", "unc", REFS, IMAGES, ANNOTATIONS)
    images = write_images(tmp_path / "images", IMAGES)
    shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "a", processes=1)
    dit_ds("data", "shard", "--parquet", write_mirror(tmp_path / "m"), "--images", images, "--out", tmp_path / "b",
           "--processes", "2")  # fmt: skip
    a, b = (sorted((tmp_path / x / "refcoco/unc").glob("*.tar")) for x in "ab")
    assert [p.name for p in a] == [p.name for p in b] and [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_parquet_files_that_will_not_do(tmp_path, monkeypatch):
    folder = tmp_path / "lmms"
    row = {"question_id": "1", "image": b"", "question": "?", "answer": ["a"], "segmentation": [1.0] * 6,
           "bbox": [1.0] * 4, "iscrowd": 0, "file_name": "COCO_train2014_1.jpg"}  # fmt: skip
    write_parquet(folder / "val-00000-of-00001.parquet", [row])
    with pytest.raises(UserError, match="lmms-lab's, whose val is not the official one.*3811.*5000.*parts are lost"):
        load_source("refcoco", parquet=folder)
    write_parquet(tmp_path / "other/a.parquet", [{"text": "x"}])
    with pytest.raises(UserError, match="has no columns ref_id"):
        load_source("refcoco", parquet=tmp_path / "other")
    (tmp_path / "other/a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="no parquet file"):
        load_source("refcoco", parquet=tmp_path / "other")
    with pytest.raises(UserError, match="no parquet files in"):
        load_source("refcoco", parquet=tmp_path / "none")
    with pytest.raises(UserError, match="has the splits of unc, not google"):
        load_source("refcoco", "google", parquet=write_mirror(tmp_path / "m"))
    write_parquet(tmp_path / "bad/a.parquet", [by_ref(REFS[0]) | {"raw_anns": "{}"}])
    with pytest.raises(UserError, match="is damaged"):
        load_source("refcoco", parquet=tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UserError, match=r"pip install 'dit-ds\[parquet\]'"):
        load_source("refcoco", parquet=tmp_path / "m")


def test_the_hubs_names_of_splits(tmp_path):
    rows = [by_ref(r | {"split": s}) for r, s in zip(REFS, ("train", "train", "validation", "test"))]
    write_parquet(tmp_path / "refcocoplus/train.parquet", rows)
    write_parquet(tmp_path / "refcocog/train.parquet", rows)
    assert list(load_source("refcoco+", parquet=tmp_path).splits) == ["train", "val", "testA"]
    assert list(load_source("refcocog", parquet=tmp_path).splits) == ["train", "val", "test"]
    both = load_source("refcoco+,refcocog", parquet=tmp_path)
    assert [(r.image["id"], len(r.refs)) for r in both.splits["train"]] == [(1, 4)]
    write_parquet(tmp_path / "b/refcoco_google_test-00000-of-00001.parquet", [by_image([REFS[3] | {"split": "test"}])])
    assert list(load_source("refcoco", "google", parquet=tmp_path / "b").splits) == ["test"]


def test_splits_that_share_an_image_keep_their_own_refs(tmp_path):
    """refcoco and refcocog by google."""
    refs = [ref(0, 10, 1, "train"), ref(1, 11, 1, "val")]
    write_refer(tmp_path, "refcocog", "google", refs, IMAGES, ANNOTATIONS)
    shard_refer(tmp_path, write_images(tmp_path / "i", IMAGES), "refcocog", "google", tmp_path / "out", processes=1)
    manifest = json.loads((tmp_path / "out/refcocog/google/manifest.json").read_text())
    assert {s: (x["images"], x["refs"]) for s, x in manifest["splits"].items()} == {"train": (1, 1), "val": (1, 1)}
    assert samples_of(tmp_path / "out/refcocog/google")[1]["anns"].keys() == {"11"}  # of val, the last


def refclef(tmp_path: Path) -> tuple[Path, Path]:
    """Masks as lists of RLE dicts, with and without compression; one of the images is known to be bad."""
    images = [image(1, "112.jpg"), image(2, "19579.jpg"), image(3, "25.jpg")]
    packed = coco.encode(np.asfortranarray(filled((3, 2, 11, 9))))["counts"].decode()
    masks = [[{"size": [H, W], "counts": packed}], [{"size": [H, W], "counts": packed}],
             [{"size": [H, W], "counts": [0, 5, H * W - 5]}, {"size": [H, W], "counts": packed}]]  # fmt: skip
    annotations = [annotation(10 * i["id"], i["id"], m) for i, m in zip(images, masks)]
    refs = [ref(k, 10 * k, k) for k in (1, 2, 3)]
    pictures = write_images(tmp_path / "saiapr_tc-12", images)
    Image.new("RGB", (W, H)).save(pictures / "19579.jpg", "GIF")
    return write_refer(tmp_path, "refclef", "unc", refs, images, annotations), pictures


def test_refclef(tmp_path):
    tree, pictures = refclef(tmp_path)
    with pytest.raises(
        UserError, match=r"19579.jpg is one of saiapr_tc-12's three that are known to be bad.*--skip-bad"
    ):
        shard_refer(tree, pictures, "refclef", "unc", tmp_path / "out", processes=1)
    manifest = shard_refer(tree, pictures, "refclef", None, tmp_path / "out", skip_bad=True, processes=1)
    assert manifest["splits"]["train"]["dropped"] == {"images": 1, "refs": 0, "sentences": 0}
    assert manifest["image_set"] == "saiapr_tc-12"
    samples = samples_of(tmp_path / "out/refclef/unc")
    assert decode_rle(samples[1]["anns"]["10"]["rle"]).tolist() == filled((3, 2, 11, 9)).tolist()
    assert decode_rle(samples[3]["anns"]["30"]["rle"]).tolist() == filled((3, 2, 11, 9), (0, 0, 1, 5)).tolist()


def test_a_file_that_only_calls_itself_a_picture_is_refused(tmp_path):
    write_refer(tmp_path, "refcoco", "unc", REFS[:1], IMAGES, ANNOTATIONS)
    images = write_images(tmp_path / "i", IMAGES[:1])
    (images / IMAGES[0]["file_name"]).write_text("<html>not found</html>")
    with pytest.raises(UserError, match="none of a kind that is read"):
        shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", processes=1)


def test_an_annotation_of_another_image_is_no_mask_of_this_one(tmp_path):
    write_refer(tmp_path, "refcoco", "unc", [ref(0, 10, 1), ref(1, 20, 1)], IMAGES, ANNOTATIONS)
    images = write_images(tmp_path / "i", IMAGES)
    with pytest.raises(UserError, match="ref 1: annotation 20 is of image 2, not of 1"):
        shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", processes=1)
    manifest = shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", skip_bad=True, processes=1)
    assert manifest["splits"]["train"]["dropped"]["refs"] == 1 and manifest["splits"]["train"]["refs"] == 1


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0, 3.0, 4.0]], {"a": 1}, {}, [{}], [[1.0] * 7], [["a"] * 6]])
def test_polygons_that_are_none_are_dropped_and_counted(tmp_path, bad):
    write_refer(tmp_path, "refcoco", "unc", REFS[:2], IMAGES, [ANNOTATIONS[0], ANNOTATIONS[1] | {"segmentation": bad}])
    images = write_images(tmp_path / "i", IMAGES)
    with pytest.raises(UserError, match="ref 1: annotation 11"):
        shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", processes=1)
    manifest = shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "out", skip_bad=True, processes=1)
    assert manifest["splits"]["train"]["dropped"] == {"images": 0, "refs": 1, "sentences": 0}


@pytest.mark.parametrize("seed", range(5))
def test_legacy_overlap_is_the_sum_of_the_polygons(tmp_path, seed):
    """Against REFER's own way to a mask: every polygon decoded, summed, and 1 is the object."""
    rng = np.random.default_rng(seed)
    polygons = [(rng.random(2 * n) * np.tile([W, H], n)).round(2).tolist() for n in rng.integers(3, 7, 3)]
    annotations = [annotation(10, 1, polygons), annotation(11, 1)]
    write_refer(tmp_path, "refcoco", "unc", [ref(0, 10, 1), ref(1, 11, 1), ref(2, 10, 1)], IMAGES[:1], annotations)
    images = write_images(tmp_path / "i", IMAGES[:1])
    summed = coco.decode(coco.frPyObjects(polygons, H, W)).sum(2)
    manifests = {}
    for legacy in (False, True):
        out = tmp_path / f"out{legacy}"
        manifests[legacy] = shard_refer(tmp_path, images, "refcoco", "unc", out, legacy_overlap=legacy, processes=1)
        rle = samples_of(out / "refcoco/unc")[1]["anns"]["10"]["rle"]
        np.testing.assert_array_equal(decode_rle(rle), summed == 1 if legacy else summed > 0)
        assert manifests[legacy]["splits"]["train"]["overlapping"] == (2 if (summed > 1).any() else 0)
        assert manifests[legacy]["splits"]["train"]["shards"][0]["overlapping"] == 2
    assert [manifests[x]["mask_policy"] for x in (False, True)] == ["union", "legacy_overlap"]
    with pytest.raises(UserError, match="--overwrite"):
        shard_refer(tmp_path, images, "refcoco", "unc", tmp_path / "outFalse", legacy_overlap=True, processes=1)


# --- a set of one's own -------------------------------------------------------------------------------------------

OWN = {
    "images": [image(7, "a.jpg"), image(8, "b.jpg"), image(9, "c.jpg")],
    "annotations": ANNOTATIONS[:1] + [annotation(5, 7), annotation(6, 7, [box(20, 10, 25, 15)]), annotation(9, 9)],
    "categories": [{"id": 1, "name": "dog"}],
    "expressions": [
        {"image_id": 7, "annotation_ids": [5], "text": "The left dog!", "split": "train"},
        {"image_id": 7, "annotation_ids": [5, 6], "text": ["both dogs", "Dogs"], "split": "train"},
        {"image_id": 8, "annotation_ids": [], "text": "a cat", "split": "train"},
        {"image_id": 9, "annotation_ids": [9], "text": "dog", "split": "val", "id": 77},
    ],
}


def write_own(path: Path, **changes) -> Path:
    path.write_text(json.dumps(OWN | changes))
    return path


def test_a_set_of_ones_own(tmp_path):
    images = write_images(tmp_path / "images", OWN["images"])
    done = dit_ds("data", "shard", "--coco", write_own(tmp_path / "own.json"), "--images", images, "--dataset", "mine",
                  "--split-by", "own", "--out", tmp_path / "out", "--json")  # fmt: skip
    counts = json.loads(done.stdout)
    keys = ("images", "refs", "sentences", "no_target", "overlapping")
    assert {s: [c[k] for k in keys] for s, c in counts.items()} == {"train": [2, 3, 4, 1, 0], "val": [1, 1, 1, 0, 0]}
    assert verify_shards(tmp_path / "out/mine/own")["errors"] == []
    train = samples_of(tmp_path / "out/mine/own")[7]
    assert [(r["ann_ids"], r["no_target"], [s["sent"] for s in r["sentences"]]) for r in train["refs"]] == [
        ([5], False, ["the left dog"]),
        ([5, 6], False, ["both dogs", "dogs"]),
    ]
    assert [s["raw"] for r in train["refs"] for s in r["sentences"]] == ["The left dog!", "both dogs", "Dogs"]


def changed(n: int, **changes) -> dict:
    """OWN's expressions with one changed."""
    return {"expressions": [e | changes if k == n else e for k, e in enumerate(OWN["expressions"])]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expressions": None}, "has no 'expressions'"),
        (changed(2, image_id=99), "ref 2: image 99 is not in"),
        (changed(0, annotation_ids=[5, 99]), "ref 0: annotation 99 is not in"),
        (changed(1, text=5), "expression 1 has no 'text'"),
        (changed(1, text=[]), "expression 1: its text"),
        (changed(3, split=None), "expression 3 has no 'split'"),
        (changed(3, annotation_ids=9), "expression 3 has no 'annotation_ids'"),
        (changed(3, annotation_ids=["9"]), "must be whole numbers"),
        ({"expressions": ["a cat"]}, "expression 0 has no 'image_id'"),
        ({"images": None}, "is not a COCO annotation file"),
        ({"images": [image(7) | {"id": "seven"}]}, "image ids must be whole numbers"),
        ({"images": [image(2**70)]}, "image ids must be whole numbers"),
        ({"images": [image(7) | {"file_name": 5}]}, "a file_name must be a string"),
        ({"images": [image(7), image(7, "b.jpg")]}, "two of its images have the same id"),
        ({"annotations": [annotation(5, 7), annotation(5, 7)]}, "two of its annotations have the same id"),
        (changed(1, text="a \ud83d dog"), "expression 1: its text has half a character"),
        (changed(3, split="../val"), "ref 3: its split '../val' can't name files"),
        (changed(3, split=""), "ref 3: its split '' can't name files"),
    ],
)
def test_what_is_wrong_with_ones_own_file_is_one_line(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        load_source("mine", coco=write_own(tmp_path / "own.json", **changes))


def test_exactly_one_source_is_read(tmp_path, refusal):
    shard = ("data", "shard", "--images", tmp_path, "--out", tmp_path / "out")
    assert "required" in refusal(*shard)
    assert "not allowed with" in refusal(*shard, "--coco", "a.json", "--refer-root", "b")
    assert "--coco is one set" in refusal(*shard, "--coco", "a.json", "--dataset", "a,b")
    with pytest.raises(UserError, match="give one of --refer-root, --coco and --parquet"):
        load_source("refcoco", refer_root="a", parquet="b")


def test_the_splits_of_the_papers_are_the_default(tmp_path):
    for name in ("refcoco", "refcocog"):
        write_refer(tmp_path, name, default_split_by(name), REFS, IMAGES, ANNOTATIONS)
        assert load_source(name, refer_root=tmp_path).split_by == {"refcoco": "unc", "refcocog": "umd"}[name]


def test_code_in_a_grefer_pickle_never_runs(tmp_path):
    path = tmp_path / "grefs(unc).p"
    path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError, match="it asks to load posix.system"):
        load_refs(path)
    assert pickle.loads(python2_pickle({"a": ["b", 1, "x" * 300]}), encoding="latin1") == {"a": ["b", 1, "x" * 300]}
