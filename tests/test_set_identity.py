"""What a run trains on: the sets that its configuration names, each by its weight, without what is evaluated on."""

from __future__ import annotations

from pathlib import Path

import pytest
from refer_files import annotation, box, image, ref, write_images, write_refer

from dit_ds.config.schema import DataConfig
from dit_ds.data.build import train_index
from dit_ds.data.shards.write import shard_refer

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
