"""Shards: what goes in comes out, byte for byte the same again, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import ROOT, dit_ds, environment, refused, small_disk
from tqdm import tqdm

from dit_ds.data.annotations.refer import load_refer
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.masks import annotation_rle, decode_rle
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import RunFailed, UserError


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def shard(tree: Path, out: Path, **options):
    return shard_refer(tree, tree / "images/train2014", "refcoco", "unc", out, **{"processes": 1} | options)


def shard_arguments(tree: Path, *more) -> list:
    """`dit-ds data shard` of a tree that lies as the sample set's does."""
    return ["data", "shard", "--refer-root", tree, "--images", tree / "images/train2014", *more]


def copy_of(tree: Path, to: Path) -> Path:
    shutil.copytree(tree, to)
    return to


def edit_instances(tree: Path, change) -> None:
    path = tree / "refcoco/instances.json"
    instances = json.loads(path.read_text())
    change(instances)
    path.write_text(json.dumps(instances))


def edit_refs(tree: Path, change) -> None:
    path = tree / "refcoco/refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def test_webdataset_reads_back_every_image_ref_and_mask(refer_tree, shards):
    tree = load_refer(refer_tree, "refcoco", "unc")
    folder = shards / "refcoco/unc"
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, records in tree.splits.items():
        entries = manifest["splits"][split]["shards"]
        assert max(e["images"] for e in entries) - min(e["images"] for e in entries) <= 1
        urls = [str(folder / e["name"]) for e in entries]
        samples = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
        assert set(samples) == {f"{r.image['id']:012d}" for r in records}
        for record in records:
            sample = samples[f"{record.image['id']:012d}"]
            meta = json.loads(sample["json"])
            assert sample["jpg"] == (refer_tree / "images/train2014" / record.image["file_name"]).read_bytes()
            assert [r["ref_id"] for r in meta["refs"]] == [r["ref_id"] for r in record.refs]
            for ref, original in zip(meta["refs"], record.refs):
                assert [s["sent"] for s in ref["sentences"]] == [s["sent"] for s in original["sentences"]]
                truth = annotation_rle(record.annotations[original["ann_ids"][0]], meta["height"], meta["width"])
                coded = meta["anns"][str(ref["ann_ids"][0])]["rle"]
                np.testing.assert_array_equal(decode_rle(coded), decode_rle(truth))
    assert verify_shards(folder)["ok"]


@pytest.mark.fast
def test_bytes_do_not_depend_on_the_number_of_processes(refer_tree, shards, tmp_path):
    shard(refer_tree, tmp_path, shards={"train": 4}, processes=3)
    assert digest(tmp_path / "refcoco/unc") == digest(shards / "refcoco/unc")


def test_a_killed_run_leaves_no_manifest_and_is_continued(tmp_path):
    """kill -9 in the middle; the second run keeps what was finished and ends as an uninterrupted one."""
    tree = tmp_path / "tree"
    dit_ds("data", "sample", tree, "--images", "200", "--seed", "1")
    arguments = shard_arguments(tree, "--shards", "train=40", "--processes", "1")
    dit_ds(*arguments, "--out", tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_ds.cli", *map(str, arguments), "--out", str(tmp_path / "cut")],
        cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    folder = tmp_path / "cut/refcoco/unc"
    deadline = time.time() + 60
    while len(list(folder.glob("train-*.tar"))) < 3 and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    finished = {p.name: p.stat().st_mtime_ns for p in folder.glob("train-*.tar")}
    assert 3 <= len(finished) < 40 and not (folder / "manifest.json").exists()
    assert "no manifest" in refused(dit_ds("data", "verify", folder, check=None))
    dit_ds(*arguments, "--out", tmp_path / "cut")
    assert digest(folder) == digest(tmp_path / "whole/refcoco/unc")
    noted = [name for name, at in finished.items() if (folder / name).stat().st_mtime_ns == at]
    assert len(noted) >= 2  # kept, not written again
    manifest = (folder / "manifest.json").stat().st_mtime_ns
    dit_ds(*arguments, "--out", tmp_path / "cut")  # nothing to do
    assert (folder / "manifest.json").stat().st_mtime_ns == manifest


def test_a_worker_that_is_ended_ends_the_run(refer_tree, tmp_path, monkeypatch):
    """As for want of memory: it is said, not waited for."""
    monkeypatch.setattr("dit_ds.data.shards.write.load_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunFailed, match="fewer --processes"):
        shard(refer_tree, tmp_path, processes=2)
    assert not list((tmp_path / "refcoco/unc").iterdir())


def test_ctrl_c_ends_it_and_the_next_run_goes_on(refer_tree, shards, tmp_path, monkeypatch):
    class Interrupted(tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("dit_ds.data.parallel.progress_bar", Interrupted)
        shard(refer_tree, tmp_path, shards={"train": 32})
    folder = tmp_path / "refcoco/unc"
    assert len(list(folder.glob("*.tar"))) < 35 and not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*.tmp"))
    shard(refer_tree, tmp_path, shards={"train": 4})
    assert digest(folder) == digest(shards / "refcoco/unc")


def test_another_set_is_not_overwritten_unasked(refer_tree, tmp_path):
    shard(refer_tree, tmp_path)
    before = digest(tmp_path / "refcoco/unc")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        shard(refer_tree, tmp_path, shards={"train": 4})
    assert digest(tmp_path / "refcoco/unc") == before
    shard(refer_tree, tmp_path, shards={"train": 4}, overwrite=True)
    assert len(list((tmp_path / "refcoco/unc").glob("train-*.tar"))) == 4
    assert verify_shards(tmp_path / "refcoco/unc")["ok"]


def truncate_image(tree: Path) -> None:
    path = sorted((tree / "images/train2014").iterdir())[0]
    path.write_bytes(path.read_bytes()[:2000])


def remove_image(tree: Path) -> None:
    sorted((tree / "images/train2014").iterdir())[0].unlink()


def empty_polygon(tree: Path) -> None:
    referred = pickle.loads((tree / "refcoco/refs(unc).p").read_bytes())[0]["ann_id"]
    edit_instances(tree, lambda x: [a.update(segmentation=[]) for a in x["annotations"] if a["id"] == referred])


def empty_sentence(tree: Path) -> None:
    edit_refs(tree, lambda refs: refs[0]["sentences"][0].update(sent="", raw=" "))


def wrong_size(tree: Path) -> None:
    edit_instances(tree, lambda x: [i.update(width=i["width"] + 1) for i in x["images"]])


@pytest.mark.parametrize(
    ("damage", "says", "droppable"),
    [
        (truncate_image, "is damaged", True),
        (remove_image, "no image", True),
        (empty_polygon, "has no polygon", True),
        (empty_sentence, "is empty", True),
        (wrong_size, "its annotation says", False),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_published(refer_tree, tmp_path, damage, says, droppable):
    tree = copy_of(refer_tree, tmp_path / "tree")
    damage(tree)
    arguments = shard_arguments(tree, "--out", tmp_path / "out")
    line = refused(dit_ds(*arguments, check=None))
    assert says in line and "--skip-bad" in line
    folder = tmp_path / "out/refcoco/unc"
    assert not (folder / "manifest.json").exists() and not list(folder.glob(".*.tmp"))
    if droppable:
        report = json.loads(dit_ds(*arguments, "--skip-bad", "--json").stdout)
        assert sum(sum(split["dropped"].values()) for split in report.values()) >= 1
        assert verify_shards(folder)["ok"]


def test_a_shard_of_which_nothing_is_left(refer_tree, tmp_path):
    tree = shutil.copytree(refer_tree, tmp_path / "tree")
    images = {r["image_id"]: r["split"] for r in pickle.loads((tree / "refcoco/refs(unc).p").read_bytes())}
    bad = [i for i, s in images.items() if s == "testA"] + [i for i, s in images.items() if s == "val"][:1]
    for i in bad:
        (tree / f"images/train2014/COCO_train2014_{i:012d}.jpg").write_bytes(b"gone")
    counts = {"val": sum(s == "val" for s in images.values())}
    folder = tmp_path / "refcoco/unc"
    shard_refer(tree, tree / "images/train2014", "refcoco", "unc", tmp_path, shards=counts, processes=1, skip_bad=True)
    assert verify_shards(folder)["errors"] == []
    index = SplitIndex.load(folder, "val")
    assert len(index.images) == len(index.shards) - 1 == counts["val"] - 1
    with pytest.raises(UserError, match="split testA in .* has no samples"):
        SplitIndex.load(folder, "testA")


def test_requests_that_cannot_be_met(refer_tree, tmp_path):
    images = refer_tree / "images/train2014"
    base = ["data", "shard", "--refer-root", refer_tree, "--out", tmp_path]
    assert "no image folder" in refused(dit_ds(*base, "--images", tmp_path / "none", check=None))
    base += ["--images", images]
    assert "did you mean refcoco?" in refused(dit_ds(*base, "--dataset", "refcocco", check=None))
    assert "--split-by can be unc" in refused(dit_ds(*base, "--split-by", "google", check=None))
    assert "no split 'dev'" in refused(dit_ds(*base, "--shards", "dev=2", check=None))
    assert "choose from 1 to its 32 images" in refused(dit_ds(*base, "--shards", "train=33", check=None))


def test_verify_names_a_shard_that_was_cut_short_changed_or_lost(shards, tmp_path):
    folder = tmp_path / "unc"
    shutil.copytree(shards / "refcoco/unc", folder)
    cut, changed, lost = sorted(folder.glob("train-*.tar"))[:3]
    cut.write_bytes(cut.read_bytes()[:-5120])
    data = bytearray(changed.read_bytes())
    data[5000] ^= 1
    changed.write_bytes(data)
    lost.unlink()
    done = dit_ds("data", "verify", folder, "--json", check=1, real=True)
    errors = json.loads(done.stdout)["errors"]
    assert len(errors) == 3
    assert any(cut.name in e and "bytes" in e for e in errors)
    assert any(changed.name in e and "SHA-256" in e for e in errors)
    assert any(lost.name in e and "missing" in e for e in errors)


@pytest.fixture
def full_soon(tmp_path):
    """A file system of one megabyte."""
    with small_disk(tmp_path / "small", "1m") as folder:
        yield folder


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(refer_tree, full_soon):
    line = refused(dit_ds("data", "shard", "--refer-root", refer_tree, "--images", refer_tree / "images/train2014", "--out", full_soon,
                          "--shards", "train=2", check=None))  # fmt: skip
    assert "no space left" in line
    folder = full_soon / "refcoco/unc"
    assert not (folder / "manifest.json").exists() and not list(folder.glob(".*.tmp"))
    assert "no space left" in refused(dit_ds("data", "sample", full_soon / "s", check=None))
    assert not list((full_soon / "s").glob("refcoco/*"))
