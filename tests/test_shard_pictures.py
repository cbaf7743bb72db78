"""Sets of pictures of every kind and with EXIF orientations: what is in the shards, and what training reads of it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import dit_ds, refused
from PIL import Image, ImageOps
from refer_files import annotation, box, ref, write_refer

from dit_ds.data.exif import exif_orientation
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import EvalBatchSampler
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.data.picture import decode_picture
from dit_ds.data.shards.manifest import load_manifest
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.errors import UserError

H, W = 40, 60
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}


def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    """As the loader wants it, of no words."""
    return np.zeros(1, np.int64), np.ones(1, bool)


def smooth(height: int, width: int) -> np.ndarray:
    """(height, width, 3) colours that differ everywhere, and that a JPEG keeps within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 255 - 127 * (x + y) / max(height, width)], -1).astype(np.uint8)


def write_picture(path: Path, pixels: np.ndarray, kind: str = "JPEG", orientation: int | None = None) -> Path:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(path, kind, exif=exif, **options)
    return path


def own_set(path: Path, sizes: dict[str, tuple[int, int]], splits: dict[str, str] | None = None) -> Path:
    """A COCO file with expressions: of each picture (file name: height, width) the block from (4, 2) to (12, 8)."""
    images = [{"id": i, "file_name": n, "height": h, "width": w} for i, (n, (h, w)) in enumerate(sizes.items(), 1)]
    annotations = [annotation(i["id"], i["id"], [box(4, 2, 12, 8)]) for i in images]
    expressions = [{"image_id": i["id"], "annotation_ids": [i["id"]], "text": f"the block of {i['id']}",
                    "split": (splits or {}).get(i["file_name"], "train")} for i in images]  # fmt: skip
    path.write_text(json.dumps({"images": images, "annotations": annotations, "expressions": expressions}))
    return path


def shard(images: Path, coco: Path, out: Path, **options: Any) -> dict[str, Any]:
    return shard_refer(None, images, "mine", "own", out, coco=coco, processes=1, **options)


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """Each sample by its image's file name, as webdataset reads it; the picture is the member that isn't json."""
    found = {}
    for s in webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False):
        kind = next(k for k in s if k not in ("json", "__key__", "__url__", "__local_path__"))
        found[json.loads(s["json"])["file_name"]] = {"kind": kind, "picture": s[kind], "meta": json.loads(s["json"])}
    return found


def pictures_of(folder: Path, streamed: bool = False) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Pixels and mask of each image as the evaluation's loader gives them, by image id."""
    index = SplitIndex.load(folder, "train")
    dataset = ExpressionDataset(index, "sentence", 64, tokenize, streamed=streamed)
    found = {}
    for batch in iterate(make_loader(dataset, EvalBatchSampler(len(dataset), 4, 0, 1), 0, pin=False)):
        for i, image_id in enumerate(batch["image_id"]):
            if batch["weight"][i]:
                h, w = (int(x) for x in batch["size"][i])
                pixels = batch["image"][i, :, :h, :w].permute(1, 2, 0).numpy()
                found[int(image_id)] = pixels, np.asarray(batch["original"][i])
    return found


def test_pictures_keep_their_bytes_and_kind(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for ending, kind in KINDS.items():
        write_picture(images / f"a.{ending}", smooth(H, W), kind)
    deep = (np.linspace(0, 4095, H * W).reshape(H, W)).astype(np.uint16)
    Image.fromarray(deep).save(images / "deep.png")
    shutil.copy(images / "a.png", images / "called.jpg")  # of another kind than its name says
    names = [p.name for p in sorted(images.iterdir())]
    coco = own_set(tmp_path / "own.json", dict.fromkeys(names, (H, W)))
    done = dit_ds("data", "shard", "--coco", coco, "--images", images, "--dataset", "mine", "--out", tmp_path, "--json")
    kinds = {"kinds": {"png": 3, "webp": 1, "tif": 1, "bmp": 1}, "white": {"4095": 1}}
    assert json.loads(done.stdout)["train"]["pictures"] == kinds
    assert "1 with 4095" in done.stderr
    folder = tmp_path / "mine/own"
    assert load_manifest(folder)["splits"]["train"]["pictures"] == kinds
    assert verify_shards(folder, 1)["errors"] == []
    found = members(folder)
    assert {n: m["picture"] for n, m in found.items()} == {n: (images / n).read_bytes() for n in names}
    assert found["called.jpg"]["kind"] == "png" and found["a.tif"]["kind"] == "tif"
    read = pictures_of(folder)
    streamed = pictures_of(folder, streamed=True)
    for number, name in enumerate(names, 1):
        pixels, mask = read[number]
        np.testing.assert_array_equal(pixels, streamed[number][0])
        want = decode_picture((images / name).read_bytes())
        wide = np.asarray(Image.fromarray(want).resize((64, 43), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pixels, wide)
        assert mask[2:8, 4:12].all() and mask.sum() == 48
    train = ExpressionDataset(SplitIndex.load(folder, "train"), "ref", 64, tokenize, augmentation=Augmentation())
    means = sorted(float(train[0, i, 1.0]["image"].mean()) for i in range(len(train)))
    np.testing.assert_allclose(
        means, sorted(np.pad(p, ((0, 21), (0, 0), (0, 0))).mean() for p, _ in read.values()), atol=3
    )
    dit_ds("data", "stats", folder, "--sheet", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


def test_pictures_are_converted_by_choice(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for ending, kind in (KINDS | {"gif": "GIF"}).items():
        write_picture(images / f"a.{ending}", smooth(H, W), kind)
    names = [p.name for p in sorted(images.iterdir())]
    coco = own_set(tmp_path / "own.json", dict.fromkeys(names, (H, W)))
    with pytest.raises(UserError, match=r"a.gif is GIF, which shards don't hold: take it in with --convert jpeg"):
        shard(images, coco, tmp_path / "out")
    manifest = shard(images, coco, tmp_path / "out", convert="jpeg")
    assert manifest["convert"] == "jpeg"
    assert manifest["splits"]["train"]["pictures"] == {"converted": {"png": 1, "webp": 1, "tif": 1, "bmp": 1, "gif": 1}}
    found = members(tmp_path / "out/mine/own")
    assert {m["kind"] for m in found.values()} == {"jpg"}
    assert found["a.jpg"]["picture"] == (images / "a.jpg").read_bytes()
    for name in names:
        difference = np.abs(decode_picture(found[name]["picture"]).astype(int) - smooth(H, W))
        assert difference.max() < (40 if name == "a.gif" else 8)
    assert verify_shards(tmp_path / "out/mine/own", 1)["ok"]
    with pytest.raises(UserError, match="--overwrite"):
        shard(images, coco, tmp_path / "out")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_annotations_mean_of_pictures_with_an_orientation(kind, tmp_path):
    """All eight, of pictures where sizes tell and where they don't: as stored, and as viewers show them."""
    images = tmp_path / "images"
    images.mkdir()
    sizes, shown, stored = {}, {}, {}
    for orientation in range(1, 9):
        for shape, (h, w) in (("wide", (H, W)), ("square", (H, H))):
            path = write_picture(images / f"{shape}{orientation}", smooth(h, w), kind, orientation)
            turned = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
            for view, pixels in (("turned", turned), ("stored", smooth(h, w))):
                name = f"{shape}{orientation}-{view}"
                shutil.copy(path, images / name)
                sizes[name], shown[name], stored[name] = pixels.shape[:2], turned, smooth(h, w)
    told = {n: s for n, s in sizes.items() if n[:5] == "wide5" or n[:5] > "wide5" and n.startswith("wide") or "1" in n}
    manifest = shard(images, own_set(tmp_path / "told.json", told), tmp_path / "told")
    notes = manifest["splits"]["train"]["pictures"]
    assert set(notes["turned"]) == {n for n in told if "1" not in n and n.endswith("turned")}
    assert set(notes["ignored"]) == {n for n in told if "1" not in n and n.endswith("stored")}
    coco = own_set(tmp_path / "own.json", sizes)
    undecided = {n for n in sizes if n not in told}
    with pytest.raises(
        UserError, match=rf"^pictures with an EXIF orientation: {len(undecided)}, .*square2-stored \(2\)"
    ):
        shard(images, coco, tmp_path / "out", skip_bad=True)
    for rule in ("turn", "ignore"):
        manifest = shard(images, coco, tmp_path / "out", exif=rule, skip_bad=True, overwrite=True)
        assert manifest["exif"] == rule and manifest["splits"]["train"]["images"] == len(sizes)
        folder = tmp_path / "out/mine/own"
        assert verify_shards(folder, 1)["errors"] == []
        found, read = members(folder), pictures_of(folder)
        for number, name in enumerate(sizes, 1):
            turned = name.endswith("turned") if name in told else rule == "turn"
            want = (shown if turned else stored)[name]
            data = found[name]["picture"]
            assert np.abs(decode_picture(data).astype(int) - want).max() <= (8 if kind == "JPEG" else 0)
            for opened in (Image.open(io.BytesIO(data)), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))):
                assert opened.size == want.shape[1::-1]  # whether a reader follows the tag or not
            assert exif_orientation(data) == 1
            assert read[number][1].shape == want.shape[:2]
        noted = manifest["splits"]["train"]["pictures"]
        assert len(noted.get("turned", {})) + len(noted.get("ignored", {})) == len([n for n in sizes if "1" not in n])


def test_published_sets_on_coco_need_no_option(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    entries, refs = [], []
    for n in range(1, 9):
        name = f"COCO_train2014_{n:012d}.jpg"
        write_picture(images / name, smooth(H, H), "JPEG", n)
        entries.append({"id": n, "file_name": name, "height": H, "width": H})
        refs.append(ref(n, 10 * n, n))
    annotations = [annotation(10 * n, n) for n in range(1, 9)]
    for dataset, known in (("refcoco+", True), ("mine", False)):
        write_refer(tmp_path, dataset, "unc", refs, entries, annotations)
        if not known:
            assert "orientation: 7," in refused(dit_ds("data", "shard", "--refer-root", tmp_path, "--images", images, "--dataset",
                                                  dataset, "--out", tmp_path / "out", check=None))  # fmt: skip
            continue
        manifest = shard_refer(tmp_path, images, dataset, "unc", tmp_path / "out", processes=1)
        notes = manifest["splits"]["train"]["pictures"]
        assert notes == {"ignored": {f"COCO_train2014_{n:012d}.jpg": n for n in range(2, 9)}}
        for m in members(tmp_path / "out" / dataset / "unc").values():
            np.testing.assert_allclose(decode_picture(m["picture"]), smooth(H, H), atol=8)


def test_only_shards_that_the_option_decides_on_are_written_again(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    names = [f"{n}.jpg" for n in range(8)]
    for n, name in enumerate(names):
        write_picture(images / name, smooth(H, H), "JPEG", 3 if n == 5 else None)
    coco = own_set(tmp_path / "own.json", dict.fromkeys(names, (H, H)))
    with pytest.raises(UserError, match=r"orientation: 1, .*5.jpg \(3\): say it with --exif"):
        shard(images, coco, tmp_path / "out", shards={"train": 4})
    folder = tmp_path / "out/mine/own"
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    shard(images, coco, tmp_path / "out", shards={"train": 4}, exif="turn")
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    assert sum(before[n] != after[n] for n in after) == 1
    shown = decode_picture(members(folder)["5.jpg"]["picture"])
    np.testing.assert_allclose(shown, smooth(H, H)[::-1, ::-1], atol=8)


def test_coco_pictures_are_found_by_the_names_of_2014_and_2017(tmp_path):
    old, new = "COCO_train2014_000000000007.jpg", "000000000007.jpg"
    for there, asked in ((old, new), (new, old)):
        images = tmp_path / there
        images.mkdir()
        write_picture(images / there, smooth(H, W))
        shard(images, own_set(tmp_path / "own.json", {asked: (H, W)}), tmp_path / f"out {there}")
        write_picture(images / "COCO_train2014_000000000008.jpg", smooth(H, W))
        with pytest.raises(UserError, match="no image .*000000000009.jpg"):
            shard(images, own_set(tmp_path / "o.json", {"000000000009.jpg": (H, W)}), tmp_path / "none")


def test_nothing_left_is_an_error_and_says_why(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(b"\xff\xd8gone")
    coco = own_set(tmp_path / "own.json", {"a.jpg": (H, W), "b.jpg": (H, W)})
    line = refused(dit_ds("data", "shard", "--coco", coco, "--images", images, "--dataset", "mine", "--out", tmp_path,
                          "--skip-bad", check=None))  # fmt: skip
    assert "nothing is left to shard" in line and ("a.jpg is damaged" in line or "no image" in line)
    assert [p.name for p in (tmp_path / "mine/own").iterdir()] == ["left_out.txt"]


def test_another_size_is_told_with_both(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_picture(images / "a.jpg", smooth(H, W), "JPEG", 6)
    with pytest.raises(UserError, match=r"a.jpg is 60x40, or 40x60 turned .*, its annotation says 50x40"):
        shard(images, own_set(tmp_path / "own.json", {"a.jpg": (40, 50)}), tmp_path)


def test_verify_names_pictures_that_are_turned_or_of_another_kind(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    write_picture(images / "a.jpg", smooth(H, W), "JPEG", 6)
    write_picture(images / "b.png", smooth(H, W), "PNG")
    coco = own_set(tmp_path / "own.json", {"a.jpg": (H, W), "b.png": (H, W)})
    monkeypatch.setattr("dit_ds.data.shards.image.without_orientation", lambda data: data)
    monkeypatch.setattr("dit_ds.data.shards.image.picture_kind", lambda data: "jpg")
    shard(images, coco, tmp_path)
    errors = verify_shards(tmp_path / "mine/own", 1)["errors"]
    assert len(errors) == 2 and any("EXIF orientation 6" in e for e in errors)
    assert any("its picture is no jpg, but png" in e for e in errors)
