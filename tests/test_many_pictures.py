"""Many pictures: what is asked for, tiles, folders of results that are gone on with, COCO results and their scores."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import MINILM, dit_ds, start_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dit_ds as package
from dit_ds.checkpointing.weights import LoadedModel
from dit_ds.config.load import validate
from dit_ds.data.picture_texts import read_picture_texts
from dit_ds.errors import UserError
from dit_ds.evaluation.many.tiles import Tiling
from dit_ds.evaluation.predictor import Predictor

COCO = "COCO_train2014_"


@pytest.fixture(scope="module")
def folder(refer_tree):
    return refer_tree / "images/train2014"


@pytest.fixture(scope="module")
def asked(folder, tmp_path_factory):
    """Five pictures with three texts each, which stand apart."""
    names = sorted(p.name for p in folder.iterdir())[:5]
    lines = [{"image": n, "text": t} for t in ("the left star", "Circle!", "a red box") for n in names]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def predict(model_file, *args) -> dict:
    from dit_ds.cli.entry import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(a) for a in ("predict", model_file, *args, "--workers", "0", "--json")]) == 0
    return json.loads(out.getvalue())


def test_pictures_in_batches_are_pictures_alone_and_pycocotools_reads_them(model_file, folder, asked, tmp_path):
    from pycocotools.coco import COCO

    said = predict(model_file, "--images", folder, "--texts", asked, "--out", tmp_path / "out")
    assert (said["pictures"], said["expressions"], said["left_out"]) == (5, 15, 0) and said["without_text"] == 35
    with contextlib.redirect_stdout(None):
        results = COCO(str(tmp_path / "out/images.json")).loadRes(str(tmp_path / "out/results.json"))
    found = results.loadAnns(results.getAnnIds())
    assert len(found) == 15 and {r["category_id"] for r in found} == {1}
    model = package.load(str(model_file))
    for r in found:
        mask, score = model.segment(folder / r["image"], r["text"])
        assert (results.annToMask(r) == mask).mean() > 0.999 and r["score"] == pytest.approx(score, abs=1e-3)
        assert results.loadImgs(r["image_id"])[0]["file_name"] == r["image"]


def test_each_picture_is_decoded_once_for_its_texts(model_file, folder, asked, tmp_path, monkeypatch):
    from dit_ds.data.picture import read_picture

    read: list = []
    monkeypatch.setattr("dit_ds.evaluation.many.sources.read_picture", lambda p: read.append(p) or read_picture(p))
    predict(model_file, "--images", folder, "--texts", asked, "--out", tmp_path / "out")
    assert len(read) == len(set(read)) == 5


@pytest.mark.parametrize("form", ["masks", "overlay"])
def test_masks_and_overlays(model_file, folder, asked, tmp_path, form):
    predict(model_file, "--images", folder, "--texts", asked, "--out", tmp_path / "out", "--format", form)
    records = [json.loads(x) for x in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert len({r["file"] for r in records}) == 15
    for r in records[::6]:
        with Image.open(tmp_path / "out" / r["file"]) as drawn, Image.open(folder / r["image"]) as picture:
            assert drawn.width == picture.width
            if form == "masks":
                assert drawn.height == picture.height and set(np.unique(np.asarray(drawn))) <= {0, 255}
                assert (np.asarray(drawn) > 0).mean() == pytest.approx(r["covered"], abs=1e-4)


def test_killed_at_any_time_it_goes_on_without_repeating_or_losing(model_file, folder, tmp_path):
    arguments = ["predict", model_file, "--images", folder, "--text", "the left star", "--batch-size", "2", "--format",
                 "masks"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    dit_ds(*arguments, "--out", whole, "--workers", "0")
    (process,) = start_ranks(1, *arguments, "--out", killed, "--workers", "2")
    lines = killed / "results.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or lines.stat().st_size < 600:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    before = lines.read_bytes()
    assert 0 < before.count(b"\n") < 40
    lines.write_bytes(before + b'{"image_id": 7, "im')  # as by a kill within a write
    times = {p: p.stat().st_mtime_ns for p in (killed / "masks").iterdir()}
    said = json.loads(dit_ds(*arguments, "--out", killed, "--workers", "1", "--json").stdout)
    assert said["before"] == before.count(b"\n") and lines.read_bytes() == (whole / "results.jsonl").read_bytes()
    answered = [json.loads(x)["file"] for x in before.splitlines()]
    assert all((killed / f).stat().st_mtime_ns == times[killed / f] for f in answered)
    again = dit_ds(*arguments, "--out", killed).stdout
    assert re.match(r"40 expressions of \d+ pictures in \d+ s, 40 of them by a former call\n", again), again
    assert again.splitlines()[-1].startswith(f"wrote {killed}/results.jsonl: ")


def test_it_goes_on_within_a_pictures_expressions(model_file, folder, asked, tmp_path):
    arguments = ("--images", folder, "--texts", asked, "--out", tmp_path / "out", "--batch-size", "4")
    predict(model_file, *arguments)
    lines = tmp_path / "out/results.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(b"".join(whole.splitlines(True)[:4]))  # of the second picture's three one is left
    assert predict(model_file, *arguments)["before"] == 4 and lines.read_bytes() == whole


def test_another_request_in_the_folder_is_refused(model_file, folder, tmp_path, refusal):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("mine")
    base = ["predict", model_file, "--images", folder, "--text", "star", "--workers", "0", "--out"]
    assert "holds 'a.txt'" in refusal(*base, tmp_path / "other")
    predict(*base[1:-3], "--out", tmp_path / "out")
    assert "its threshold differ" in refusal(*base, tmp_path / "out", "--threshold", "0.3")
    assert "pictures_and_texts differ" in refusal(*base[:5], "box", *base[6:], tmp_path / "out")
    assert "its format differ" in refusal(*base, tmp_path / "out", "--format", "masks")


def test_a_bad_picture_ends_it_or_is_named(model_file, folder, tmp_path, refusal):
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    bad = sorted(pictures.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    base = ["predict", model_file, "--images", pictures, "--text", "star", "--out", tmp_path / "out"]
    assert bad.name in refusal(*base, "--workers", "0")
    said = predict(*base[1:], "--skip-bad")
    assert said["before"] == 0
    assert said["left_out"] == 1 and bad.name in (tmp_path / "out/left_out.txt").read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) == 39 and bad.name not in {r["image"] for r in results}


# what a split's file says


@pytest.fixture(scope="module")
def answered(model_file, shards, tmp_path_factory):
    """A file of every expression of val, and what `eval` says of it."""
    out = tmp_path_factory.mktemp("split") / "out"
    predict(model_file, "--split", "val", "--out", out, "--batch-size", "4")
    return out / "results.json", json.loads(dit_ds("eval", model_file, "--workers", "0", "--json").stdout)


def score(*args) -> dict:
    from dit_ds.cli.entry import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["eval", *map(str, args), "--json"]) == 0
    return json.loads(out.getvalue())


def test_a_file_of_results_scores_as_the_model_itself(answered, model_file, shards, tmp_path):
    file, wanted = answered
    figures = {k: v for k, v in wanted.items() if k not in ("split", "prompt")}
    assert 0 < figures["miou"] < 1

    def same(found):
        return {k: v for k, v in found.items() if k not in ("split", "predictions")} == figures

    alone = ["--data-root", shards, "--dataset", "refcoco", "--split-by", "unc"]
    assert same(score(model_file, "--predictions", file)) and same(score("--predictions", file, *alone))
    results = json.loads(file.read_text())
    for keys in (("sent_id",), ("image_id", "text")):
        kept = [{k: r[k] for k in (*keys, "segmentation")} for r in results[::-1]]
        for r in kept[::3]:  # run lengths instead of text
            from dit_ds.data.masks import run_lengths

            r["segmentation"] = r["segmentation"] | {"counts": run_lengths(r["segmentation"]).tolist()}
        if "text" in keys:
            for r in kept:
                r["text"] = r["text"].capitalize() + "!"
            kept = list({(r["image_id"], r["text"]): r for r in kept}.values())
        other = tmp_path / "other.json"
        other.write_text(json.dumps(kept))
        assert same(score("--predictions", other, *alone))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r[1:], "no result for 1 of"),
        (lambda r: r + [r[0]], "1 of"),
        (lambda r: r + [r[0] | {"sent_id": 10**7}], "of no expression of this split"),
        (lambda r: [{"segmentation": x["segmentation"]} for x in r], "have ref_id and sent_id, or sent_id, or"),
        (lambda r: [r[0] | {"segmentation": r[0]["segmentation"] | {"size": [5, 5]}}, *r[1:]], "its size is [5, 5]"),
        (lambda r: [r[0] | {"segmentation": r[0]["segmentation"] | {"counts": "0"}}, *r[1:]], "can't be read"),
        (lambda r: [r[0] | {"segmentation": r[0]["segmentation"] | {"counts": [2**40]}}, *r[1:]], "can't be read"),
        (lambda r: [r[0] | {"segmentation": r[0]["segmentation"] | {"counts": [1, -1]}}, *r[1:]], "can't be read"),
        (lambda r: [r[0] | {"segmentation": [[1, 2, 3, 4, 5, 6]]}, *r[1:]], "no segmentation in RLE"),
        (lambda r: [r[0] | {"sent_id": True}, *r[1:]], "which is no int"),
        (lambda r: {"a": r}, "no list of COCO results"),
    ],
)
def test_files_that_cannot_be_scored(answered, shards, tmp_path, refusal, change, says):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(change(json.loads(answered[0].read_text()))))
    assert says in refusal("eval", "--predictions", file, "--data-root", shards)


def test_missing_results_may_be_counted_as_empty(answered, shards, tmp_path, refusal):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(json.loads(answered[0].read_text())[5:]))
    found = score("--predictions", file, "--data-root", shards, "--allow-missing")
    assert found["missing"] == 5 and found["n"] == answered[1]["n"] and found["miou"] < answered[1]["miou"]
    (tmp_path / "masks").mkdir()
    assert "--write-masks" in refusal("eval", "--predictions", tmp_path / "masks", "--data-root", shards)
    assert "--threshold is about a model" in refusal("eval", "--predictions", file, "--threshold", "0.5")


# what is asked for


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.jsonl", "", "no text in"),
        ("t.jsonl", '{"image": "a.png", "text": "dog"}\n{"image": "a.png"', "line 2 of"),
        ("t.jsonl", "5", "is no object"),
        ("t.jsonl", '{"text": "dog"}', "line 1 of {} has no image"),
        ("t.jsonl", '{"image": "a.png", "text": " "}', "has no text"),
        ("t.jsonl", '{"image": "a.png", "text": "?!"}', "without a word"),
        ("t.jsonl", '{"image": "no.png", "text": "dog"}', "'no.png', which is not in"),
        ("t.jsonl", '{"image": "../a.png", "text": "dog"}', "which is not in"),
        ("t.jsonl", '{"image": "a.png", "text": "dog", "sent_id": "x"}', "no whole number"),
        ("t.jsonl", '{"image": "a.png", "text": "dog", "sent_id": 1}\n{"image": "a.png", "text": "cat"}', "no sent_id"),
        ("t.csv", "image,text\na.png,dog,big", "line 2 of {} has 3 fields, its header 2"),
        ("t.csv", "a.png,dog", "let it begin with image,text"),
        ("t.csv", 'image,text\na.png,"dog', "is not CSV"),
        ("t.txt", "dog", "let its name end in .jsonl or .csv"),
        ("t.csv", b"image,text\na.png,\xff", "is not text in UTF-8"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, text, says):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.png").touch()
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        read_picture_texts(str(tmp_path / "p"), str(tmp_path / name), None)
    assert says.format(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)


def test_lists_and_texts_are_counted(tmp_path):
    for name in ("a.png", "sub/b.JPG", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("sub/b.JPG\n\na.png\na.png\n")
    (tmp_path / "t.csv").write_text('text,image\nthe dog,a.png\n,\nThe dog!,a.png\n"a, b",a.png\n')
    found = read_picture_texts(str(tmp_path / "list.txt"), str(tmp_path / "t.csv"), None)
    assert found.names == ["a.png"] and [t.text for t in found.texts[0]] == ["the dog", "a, b"]
    assert found.counts == {"blank_lines": 2, "repeated": 2, "without_text": 1}
    everything = read_picture_texts(str(tmp_path), None, "a dog")
    assert everything.names == ["a.png", "sub/b.JPG", "sub/c.png"] and everything.digest() != found.digest()
    (tmp_path / "list.txt").write_text("nowhere.png\na.png\n")
    with pytest.raises(UserError, match="1 of 2 pictures in the list .* are not there"):
        read_picture_texts(str(tmp_path / "list.txt"), None, "dog")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in"):
        read_picture_texts(str(tmp_path / "empty"), None, "dog")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of --image"),
        (["--image", "a.png", "--images", "x"], "give one of --image"),
        (["--image", "a.png", "--tile", "64"], "--tile is for many pictures"),
        (["--images", "x", "--point", "1,2"], "--point does not go with --images"),
        (["--split", "val", "--text", "dog"], "--text does not go with --split"),
        (["--images", "x", "--text", "a", "--texts", "t.csv"], "give one of them"),
        (["--images", "x", "--text", "a", "--overlap", "5"], "give --tile, too"),
        (["--images", "x", "--text", "a", "--tile", "64", "--overlap", "33"], "more than half of --tile 64"),
        (["--images", "x"], "cannot read the list of pictures x"),
    ],
)
def test_requests_that_do_not_fit_together(arguments, says, refusal):
    assert says in refusal("predict", "run", "--out", "o", *arguments)


# tiles


@pytest.mark.fast
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 120), st.data())
def test_the_shares_of_every_pixel_add_up_to_one(height, width, side, data):
    overlap = data.draw(st.integers(0, side // 2))
    tiling = Tiling(height, width, side, overlap)
    whole = torch.zeros(height, width)
    for i, t in enumerate(tiling.tiles):
        assert t.bottom - t.top == min(side, height) and t.right - t.left == min(side, width)
        tiling.blend(whole, i, torch.ones(t.bottom - t.top, t.right - t.left))
    assert (whole - 1).abs().max() < 1e-5
    tops = sorted({t.top for t in tiling.tiles})
    assert all(a + side - b >= overlap for a, b in zip(tops, tops[1:]))


class _Brightness(torch.nn.Module):
    """Says of a pixel's brightness whether it is meant; at a quarter of the input's size, as SAM."""

    def forward(self, image, size, **prompts):
        return torch.nn.functional.avg_pool2d(image.float().mean(1, keepdim=True), 4)[:, 0] / 16 - 8


def test_tiles_merge_without_seams(tmp_path, monkeypatch):
    """A picture four times as large as a tile: the map of tiles is smooth, and finds what is lost in the whole picture."""
    from dit_ds.data.picture_texts import PictureText, PictureTexts
    from dit_ds.evaluation.many import loop
    from dit_ds.evaluation.many.pictures import Cut
    from dit_ds.evaluation.many.sources import FileSource

    config = validate(
        {"data": {"image_size": 64}, "model": {"size": "vit_t"}, "text": {"name": MINILM, "layers": 1},
         "eval": {"threshold": 0.5}}
    )  # fmt: skip
    y, x = np.mgrid[:230, :200]
    smooth = (127 + 120 * np.sin(x / 40) * np.cos(y / 30)).astype(np.uint8)
    Image.fromarray(np.stack([smooth] * 3, 2)).save(tmp_path / "a.png")
    source = FileSource(PictureTexts(["a.png"], [tmp_path / "a.png"], [[PictureText("star"), PictureText("box")]], {}))
    predictor = Predictor(LoadedModel(_Brightness(), config, {"step": 1}), "cpu")
    maps = []
    scored = loop.ScoredMask.of
    monkeypatch.setattr(loop.ScoredMask, "of", lambda mask, p: maps.append(p.clone()) or scored(mask, p))
    answers = [
        a for found in loop.predict_pictures(predictor, source, Cut(64, 16), batch_size=3, workers=0) for a in found
    ]
    assert [a.expression["text"] for a in answers] == ["star", "box"] and torch.equal(*maps)
    wanted = torch.sigmoid(torch.from_numpy(smooth.astype(np.float32)) / 16 - 8)
    assert (maps[0] - wanted).abs().max() < 0.1  # of pixels in fours
    for axis in (0, 1):  # nowhere a step that the picture does not have
        assert (maps[0].diff(dim=axis).abs().max() - wanted.diff(dim=axis).abs().max()) < 0.02
    assert (answers[0].found.mask == (wanted > 0.5).numpy()).mean() > 0.97
