"""A picture that is evaluated on is not trained on, whatever its id or name: found by verify, left out by training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import dit_ds, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_files import annotation, image, ref, write_images, write_refer

from dit_ds.config.schema import DataConfig
from dit_ds.data.annotations import published
from dit_ds.data.build import train_index
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.shards import published_counts as official
from dit_ds.data.shards.verify import format_report, verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError


def own_set(
    folder: Path, pictures: list[tuple[int, str, list[str]]], name: str = "mine", split_by: str = "own"
) -> Path:
    """A sharded set of (image id, what is in the picture, its splits); pictures with the same content have the same bytes."""
    images = [image(i, f"{name}_{i}.jpg") for i, _, _ in pictures]
    write_images(folder / "images", images)
    for entry, (_, content, _) in zip(images, pictures):
        like = {**image(1, "x"), "id": sum(map(ord, content)) % 200}
        (source,) = write_images(folder / "content", [like | {"file_name": f"{content}.jpg"}]).glob(f"{content}.jpg")
        shutil.copy(source, folder / "images" / entry["file_name"])
    expressions = [{"image_id": i, "annotation_ids": [i], "text": f"{s} dog", "split": s} for i, _, ss in pictures for s in ss]  # fmt: skip
    file = {"images": images, "annotations": [annotation(i["id"], i["id"]) for i in images], "expressions": expressions}
    (folder / f"{name}.json").write_text(json.dumps(file))
    shard_refer(None, folder / "images", name, split_by, folder / "shards", coco=folder / f"{name}.json", processes=1)
    return folder / "shards" / name / split_by


def trained(root: Path, **more: Any) -> tuple[set[int], list[str]]:
    """The ids of the images that are trained on, and the index's notes."""
    index = train_index(DataConfig(root=str(root / "shards"), **{"dataset": "mine", "split_by": "own"} | more))
    return set(index.images[index.refs[:, 0], 1].tolist()), list(index.notes)


def test_one_picture_under_two_ids(tmp_path):
    folder = own_set(
        tmp_path, [(1, "a", ["train"]), (2, "b", ["train"]), (3, "c", ["train"]), (7, "b", ["val"]), (8, "d", ["test"])]
    )
    found = verify_shards(folder, 1)
    (error,) = found["errors"]
    assert "splits train and val share 1 pictures under different ids, as 000000000002 and 000000000007" in error
    assert found["counts"]["train"]["shared_pictures"] == {"val": 1} and found["counts"]["val"]["shared_pictures"] == {
        "train": 1
    }
    assert "shared_pictures" not in found["counts"]["test"] and any(error in line for line in format_report(found))
    assert trained(tmp_path) == ({1, 3}, [
        "mine/own: 1 of 3 refs left out, their images are evaluated on (0 images by their id, 1 more by their bytes under another id)"
    ])  # fmt: skip


def test_one_id_in_two_splits(tmp_path):
    folder = own_set(tmp_path, [(1, "a", ["train"]), (2, "b", ["train", "val"]), (3, "c", ["train", "train", "test"])])
    assert len(verify_shards(folder, 1)["errors"]) == 2
    used, (note,) = trained(tmp_path)
    assert used == {1} and "3 of 4 refs left out" in note and "(2 images by their id, 0 more" in note
    whole = SplitIndex.load(folder, "train")
    left = train_index(DataConfig(root=str(tmp_path / "shards"), dataset="mine", split_by="own"))
    assert left.manifest_sha != whole.manifest_sha  # a run can't go on with the samples of another


def test_a_set_without_leakage_is_as_before(tmp_path):
    folder = own_set(tmp_path, [(1, "a", ["train"]), (2, "b", ["train"]), (3, "b", ["train"]), (4, "c", ["val"])])
    index = train_index(DataConfig(root=str(tmp_path / "shards"), dataset="mine", split_by="own"))
    whole = SplitIndex.load(folder, "train")
    assert index.manifest_sha == whole.manifest_sha and index.refs.tolist() == whole.refs.tolist() and not index.notes
    assert verify_shards(folder, 1)["ok"]


def test_nothing_left_is_refused(tmp_path):
    own_set(tmp_path, [(1, "a", ["train"]), (2, "a", ["val"])])
    with pytest.raises(UserError, match="every image of mine/own train is one that is evaluated on"):
        trained(tmp_path)


def test_other_train_splits_are_trained_on_unless_evaluated(tmp_path):
    own_set(
        tmp_path, [(1, "a", ["train", "train_few"]), (2, "b", ["train", "trainval"]), (3, "c", ["val", "trainval"])]
    )
    assert trained(tmp_path) == ({1, 2}, [])
    assert trained(tmp_path, train_split="trainval")[0] == {2}
    assert trained(tmp_path, val_split="train_few")[0] == {2}
    assert trained(tmp_path, val_split="train") == ({1, 2}, [])  # to see that it can learn them by heart


def test_between_sets_pictures_are_told_by_their_bytes(tmp_path):
    own_set(tmp_path, [(1, "a", ["train"]), (2, "b", ["train"]), (3, "c", ["val"])])
    own_set(tmp_path, [(1, "e", ["train"]), (2, "c", ["train"]), (5, "a", ["val"])], "other")
    both = {"mine/own": 1.0, "other/own": 1.0}
    index = train_index(DataConfig(root=str(tmp_path / "shards"), mixture=both))
    kept = [(Path(index.shards[s]).parts[-3], i) for s, i in index.images[index.refs[:, 0]][:, :2].tolist()]
    assert kept == [("mine", 2), ("other", 1)] and len(index.notes) == 2
    assert trained(tmp_path, val_dataset="other", val_split_by="own")[0] == {2}


def test_googles_splits_share_images_by_design(tmp_path):
    images = [image(1), image(2), image(3)]
    refs = [ref(0, 1, 1), ref(1, 2, 2), ref(2, 1, 1, "val"), ref(3, 3, 3, "val")]
    write_refer(tmp_path, "refcocog", "google", refs, images, [annotation(i, i) for i in (1, 2, 3)])
    shard_refer(tmp_path, write_images(tmp_path / "i", images), "refcocog", "google", tmp_path / "shards", processes=1)
    assert trained(tmp_path, dataset="refcocog", split_by="google") == ({1, 2}, [])
    own_set(tmp_path, [(1, "a", ["train"]), (2, "b", ["train", "val"])], split_by="google")
    assert trained(tmp_path, split_by="google")[0] == {1}  # of no published set
    assert not verify_shards(tmp_path / "shards/mine/google", 1)["ok"]


def test_in_a_published_set_it_is_a_warning(tmp_path, monkeypatch):
    folder = own_set(tmp_path, [(1, "a", ["train"]), (2, "b", ["train"]), (3, "a", ["val"])], "refcoco", "unc")
    counts = {"train": {"refs": published.Figure(2, True)}, "val": {"refs": published.Figure(1, True)}}
    monkeypatch.setattr(official, "OFFICIAL", {("refcoco", "unc"): counts})
    found = verify_shards(folder, 1)
    assert found["ok"] and any("share 1 pictures under different ids" in w for w in found["warnings"])
    assert trained(tmp_path, dataset="refcoco", split_by="unc")[0] == {2}


SPLITS = ["train", "val", "test"]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sets(st.sampled_from(SPLITS), min_size=1)), min_size=2, max_size=8
    )
)
def test_no_picture_is_on_both_sides(tmp_path_factory, drawn):
    """Against a plain loop over ids and contents."""
    tmp_path = tmp_path_factory.mktemp("sets")
    pictures = [(n, content, sorted(splits)) for n, (content, splits) in enumerate(drawn)]
    folder = own_set(tmp_path, pictures)
    evaluated = {c for _, c, s in pictures if set(s) - {"train"}}
    allowed = {n for n, c, s in pictures if "train" in s and c not in evaluated}
    leaks = {a for a, c, s in pictures for b, d, t in pictures for x in s for y in t if x != y and (a == b or c == d)}
    assert verify_shards(folder, 1)["ok"] == (not leaks)
    if not any("train" in s for _, _, s in pictures):
        return
    if allowed:
        assert trained(tmp_path)[0] == allowed
    else:
        with pytest.raises(UserError, match="is one that is evaluated on"):
            trained(tmp_path)


def test_the_log_says_it_at_the_start(tmp_path):
    own_set(tmp_path, [*((n, chr(96 + n), ["train"]) for n in range(1, 9)), (20, "a", ["val"])])
    config = tiny_config(tmp_path / "shards", tmp_path / "run")
    config["data"] |= {"dataset": "mine", "split_by": "own"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", tmp_path / "c.yaml", "--train.max_steps", "1", "--eval.every_epochs", "0")
    note = "mine/own: 1 of 8 refs left out, their images are evaluated on (0 images by their id, 1 more by their bytes"
    assert note in (tmp_path / "run/log.txt").read_text()
