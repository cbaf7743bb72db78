"""What a run trains on: mixtures of sets without the images that are evaluated on, units, and resumption among them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml
from conftest import dit_ds, metrics_of, refused, tiny_config

from dit_ds.config.load import validate
from dit_ds.data.build import build_train_dataset, train_index
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.data.sample_set.write import write_sample_set
from dit_ds.data.shards.manifest import load_manifest
from dit_ds.data.shards.write import shard_refer


@pytest.fixture(scope="module")
def two_sets(shards, tmp_path_factory):
    """The sample set, and a second one of the same pictures, split otherwise: what is val there is train here."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(shards, root, dirs_exist_ok=True)
    tree = tmp_path_factory.mktemp("tree")
    write_sample_set(tree, images=40, seed=3, processes=1)
    (tree / "refcoco").rename(tree / "refcocog")
    refs_file = tree / "refcocog/refs(unc).p"
    refs = pickle.loads(refs_file.read_bytes())
    for ref in refs:
        ref["split"] = {"train": "train", "val": "train", "testA": "val", "testB": "train"}[ref["split"]]
    (tree / "refcocog/refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    shard_refer(tree, tree / "images/train2014", "refcocog", "umd", root, processes=1)
    return root


def data_of(root, **more):
    config = tiny_config(root, "unused")
    config["data"] |= more
    return validate(config)


def ids(manifest: dict, *splits: str) -> set[int]:
    return {s[0] for name in splits for e in manifest["splits"][name]["shards"] for s in e["samples"]}


def test_a_mixture_leaves_out_what_any_of_its_sets_evaluates_on(two_sets):
    index = train_index(data_of(two_sets, mixture={"refcoco/unc": 1, "refcocog/umd": 0.5}).data)
    first, second = (load_manifest(two_sets / x) for x in ("refcoco/unc", "refcocog/umd"))
    held_out = ids(first, "val", "testA", "testB") | ids(second, "val")
    allowed = (ids(first, "train") | ids(second, "train")) - held_out
    assert held_out & ids(second, "train")  # there is something to leave out
    used = {int(i) for i in index.images[index.refs[:, 0], 1]}
    assert used == allowed
    assert [p.name for p in index.datasets] == ["refcoco/unc", "refcocog/umd"]
    # by hand: the refs of each set's train split whose image is allowed
    for part, manifest in zip(index.datasets, (first, second)):
        samples = [s for e in manifest["splits"]["train"]["shards"] for s in e["samples"]]
        assert part.refs == sum(len(s[7]) for s in samples if s[0] in allowed)
        assert part.sentences == sum(sum(s[7]) for s in samples if s[0] in allowed)
    lost = len(
        [1 for e in second["splits"]["train"]["shards"] for s in e["samples"] for _ in s[7] if s[0] not in allowed]
    )
    assert [n.split(" refs ")[0] for n in index.notes] == [
        f"refcocog/umd: {lost} of {len(SplitIndex.load(two_sets / 'refcocog/umd', 'train').refs)}"
    ]
    assert sum(len(p) for p in (index.refs,)) == sum(p.refs for p in index.datasets)


def test_another_validation_set_keeps_its_images_out_of_training(two_sets):
    alone = train_index(data_of(two_sets, dataset="refcocog", split_by="umd").data)
    index = train_index(
        data_of(two_sets, dataset="refcocog", split_by="umd", val_dataset="refcoco", val_split_by="unc").data
    )
    held_out = ids(load_manifest(two_sets / "refcoco/unc"), "val", "testA", "testB")
    used = {int(i) for i in index.images[index.refs[:, 0], 1]}
    assert not used & held_out and len(index.refs) < len(alone.refs)


def test_a_mixture_reads_each_sample_from_its_own_set(two_sets):
    """Each sample of the mixture is, bit for bit, that of its set alone, and comes as often as the weight says."""
    config = data_of(two_sets, mixture={"refcoco/unc": 1, "refcocog/umd": 2}, unit="sentence")
    mixed = build_train_dataset(config)
    sampler = TrainBatchSampler(mixed.index.samples("sentence"), 16, 4, 0, 1, 0)
    seen = Counter(s for batch in sampler for _, s, w in batch if w)
    first = mixed.index.datasets[0].sentences
    assert {seen[s] for s in range(first)} == {1}
    assert {seen[s] for s in range(first, len(mixed))} == {2}
    # the second set's own index, after what was left out of it
    single = SplitIndex.load(two_sets / "refcocog/umd", "train")
    evaluated = [ExpressionDataset(i, "sentence", 64, mixed.tokenize) for i in (mixed.index, single)]
    of_single = {(s["image_id"], s["text"], s["mask"].tobytes()) for s in map(evaluated[1].__getitem__, items(single))}
    for k in range(first, len(mixed), 5):
        sample = evaluated[0][0, k, 1.0]
        assert (sample["image_id"], sample["text"], sample["mask"].tobytes()) in of_single


def items(index):
    return [(0, k, 1.0) for k in range(len(index.sentences))]


@pytest.mark.slow
def test_training_on_a_mixture_does_not_depend_on_the_world_or_a_stop(two_sets, tmp_path):
    config = tiny_config(two_sets, tmp_path / "run")
    weights = {"refcoco/unc": 1, "refcocog/umd": 2}
    config["data"] |= {"mixture": weights, "unit": "image", "workers": 1}
    config["log"]["samples"] = True
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", path, "--run_dir", tmp_path / "one")
    stopped = ["train", "--config", path, "--run_dir", tmp_path / "two"]
    dit_ds(*stopped, "--train.max_steps", "7", ranks=2)
    dit_ds(*stopped, "--resume")
    losses = [[m["loss"] for m in metrics_of(tmp_path / n)] for n in ("one", "two")]
    assert len(losses[0]) > 10 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    meta = json.loads((sorted((tmp_path / "two/checkpoints").glob("step_*"))[-1] / "meta.json").read_text())
    assert {"epoch", "samples_seen", "seed", "manifest_sha"} <= meta.keys()
    # other data, another order: refused
    for more, says in [
        (["--data.mixture", "{refcoco/unc: 2}"], "manifest_sha"),
        (["--data.unit", "sentence"], "unit"),
    ]:
        assert f"was saved with {says}" in refused(dit_ds(*stopped, "--resume", *more, check=None))


def test_an_image_is_decoded_once_for_its_refs(shards, monkeypatch):
    from dit_ds.data.loading import dataset as module

    decoded = []
    decode = module.decode_picture
    monkeypatch.setattr(module, "decode_picture", lambda *a: decoded.append(1) or decode(*a))
    data = build_train_dataset(data_of(shards, unit="image"))
    sampler = TrainBatchSampler(data.index.samples("image"), 24, 24, 0, 1, 0)
    batches = list(iterate(make_loader(data, sampler, 0, pin=False)))
    images = len(np.unique(data.index.refs[:, 0]))
    fillers = sum(bool((b["weight"] == 0).any()) for b in batches)
    assert images <= len(decoded) <= images + fillers < len(data)
