"""What a run trains on: the sets that its configuration names, each by its weight, without what is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import dit_ds, metrics_of, refused, tiny_config
from refer_files import annotation, box, image, ref, write_images, write_refer

from dit_ds.config.load import validate
from dit_ds.config.schema import DataConfig
from dit_ds.data.build import train_index, val_index
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError

IMAGES = [image(i) for i in range(1, 5)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of the same four images: refcoco's val is image 4, refcoco+'s 3, refcocog's 2."""
    out = tmp_path_factory.mktemp("sets")
    write_images(out / "images", IMAGES)
    annotations = [annotation(i, i, [box(1, 1, 9, 9)]) for i in range(1, 5)]
    for name, way, val in (("refcoco", "unc", 4), ("refcoco+", "unc", 3), ("refcocog", "umd", 2)):
        refs = [ref(i, i, i, "val" if i == val else "train") for i in range(1, 5)]
        write_refer(out / "refer", name, way, refs, IMAGES, annotations)
        shard_refer(out / "refer", out / "images", name, way, out, processes=1)
    return out


def test_the_weight_of_one_set_alone_counts(root):
    index = train_index(DataConfig(root=str(root), mixture={"refcoco/unc": 2}))
    assert index.samples("ref").datasets == [(3, 2.0)]
    other = train_index(DataConfig(root=str(root), mixture={"refcoco/unc": 1}))
    assert other.manifest_sha != index.manifest_sha


def test_another_set_to_evaluate_on_is_another_order(root):
    """Its images are left out, so a run can't go on with the samples of one that left out others."""
    plus, g = (
        train_index(DataConfig(root=str(root), val_dataset=name, val_split_by=way))
        for name, way in (("refcoco+", "unc"), ("refcocog", "umd"))
    )
    assert sorted(plus.images[plus.refs[:, 0], 1].tolist()) == [1, 2]
    assert sorted(g.images[g.refs[:, 0], 1].tolist()) == [1, 3]
    assert plus.manifest_sha != g.manifest_sha


@pytest.fixture(scope="module")
def train_only(tmp_path_factory):
    """Shards of a set of one's own with the split train alone: 40 images of one ref each."""
    out = tmp_path_factory.mktemp("train_only")
    images = [image(i, f"{i}.jpg") for i in range(1, 41)]
    expressions = [{"image_id": i, "annotation_ids": [i], "text": f"block {i}", "split": "train"} for i in range(1, 41)]
    own = {"images": images, "annotations": [annotation(i, i) for i in range(1, 41)], "expressions": expressions}
    (out / "own.json").write_text(json.dumps(own))
    shard_refer(
        None, write_images(out / "images", images), "mine", "own", out, coco=out / "own.json", shards={"train": 4}
    )
    return out


def ids_of(index: SplitIndex) -> set[int]:
    return {int(i) for i in index.images[index.refs[:, 0], 1]}


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.37, 0.999])
def test_a_part_of_the_training_images_is_held_out_never_both(train_only, fraction):
    d = DataConfig(root=str(train_only), dataset="mine", split_by="own", val_fraction=fraction)
    train, val = train_index(d), val_index(d, "val")
    assert ids_of(train) | ids_of(val) == set(range(1, 41)) and not ids_of(train) & ids_of(val)
    assert len(ids_of(val)) == min(39, max(1, round(40 * fraction)))
    assert f"{len(ids_of(val))} of 40 refs left out, their images are evaluated on" in train.notes[0]
    again = val_index(d.model_copy(update={"val_split": "held"}), "held")
    assert ids_of(again) == ids_of(val) and again.manifest_sha == val.manifest_sha != train.manifest_sha
    more = ids_of(val_index(d.model_copy(update={"val_fraction": 0.9995}), "val"))
    assert ids_of(val) <= more  # a larger share has the smaller in it
    assert len(ids_of(val_index(d, "train"))) == 40  # the split itself
    shards_of = {int(val.images[i, 0]) for i in val.refs[:, 0]}
    assert fraction < 0.3 or len(shards_of) > 1  # not those that lie first in the shards


def test_copies_of_what_is_held_out_are_not_trained_on(train_only, tmp_path):
    own = json.loads((train_only / "own.json").read_text())
    held_out = val_index(DataConfig(root=str(train_only), dataset="mine", split_by="own", val_fraction=0.1), "val")
    image_id = min(ids_of(held_out))
    copies = [i for i in range(101, 105)]
    own["images"] += [image(i, f"{image_id}.jpg") for i in copies]
    own["annotations"] += [annotation(i, i) for i in copies]
    own["expressions"] += [{"image_id": i, "annotation_ids": [i], "text": "b", "split": "train"} for i in copies]
    (tmp_path / "own.json").write_text(json.dumps(own))
    shard_refer(None, train_only / "images", "mine", "own", tmp_path, coco=tmp_path / "own.json", processes=1)
    d = DataConfig(root=str(tmp_path), dataset="mine", split_by="own", val_fraction=0.1)
    kept, evaluated = ids_of(train_index(d)), ids_of(val_index(d, "val"))
    same = {image_id, *copies}
    assert not kept & evaluated and (not same & kept if same & evaluated else same <= kept)


def test_what_contradicts_a_held_out_part_is_refused(train_only, shards):
    own = {"root": str(train_only), "dataset": "mine", "split_by": "own", "val_fraction": 0.1}
    for more, says in (
        ({"mixture": {"mine/own": 1}}, "data.mixture"),
        ({"val_dataset": "refcoco"}, "data.val_dataset"),
        ({"val_split": "train"}, "another name"),
        ({"val_fraction": 1}, "less than 1"),
    ):
        with pytest.raises(UserError, match=says):
            validate({"data": own | more})
    with pytest.raises(UserError, match="has a split val, and data.val_fraction"):
        val_index(DataConfig(root=str(shards), val_fraction=0.1), "val")


@pytest.mark.parametrize("more", [["--eval.every_epochs", "0"], ["--data.val_fraction", "0.2"]])
def test_a_set_without_a_split_to_evaluate_on_trains(train_only, tmp_path, more):
    values = tiny_config(train_only, tmp_path / "run")
    values["data"] |= {"root": str(train_only), "dataset": "mine", "split_by": "own"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    common = ("train", "--config", tmp_path / "c.yaml")
    line = refused(dit_ds(*common, check=None))
    assert "no split 'val'" in line and "data.val_fraction 0.05" in line and "eval.every_epochs 0" in line
    dit_ds(*common, "--train.max_steps", "1", "--train.epochs", "1", *more)
    if "0.2" in more:
        assert [m["n"] for m in metrics_of(tmp_path / "run", "eval")] == [8]
        for control in ((), ("--shuffle-text",)):
            done = dit_ds("eval", tmp_path / "run", "--split", "val", "--json", *control)
            assert json.loads(done.stdout)["n"] == 8
        (written,) = (tmp_path / "run/evaluations").iterdir()
        assert json.loads(written.read_text())["dataset"] == "mine"
    else:
        assert not metrics_of(tmp_path / "run", "eval")
