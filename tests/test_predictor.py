"""The interface for Python programs: `dit_ds.load(..).segment(..)`."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment
from PIL import Image

import dit_ds
from dit_ds.data.picture import read_picture
from dit_ds.errors import UserError


@pytest.fixture(scope="module")
def model(model_file):
    return dit_ds.load(str(model_file))


@pytest.fixture(scope="module")
def pictures(refer_tree):
    return sorted((refer_tree / "images/train2014").iterdir())[:3]


def test_it_imports_torch_only_when_a_model_is_loaded_and_never_deepspeed(model_file, pictures):
    code = f"""import sys, dit_ds
assert 'torch' not in sys.modules
mask, score = dit_ds.load({str(model_file)!r}).segment({str(pictures[0])!r}, "the left star")
print(mask.dtype, mask.shape, 0 <= score <= 1, 'deepspeed' in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    height, width = read_picture(pictures[0]).shape[:2]
    assert done.stdout == f"bool ({height}, {width}) True False\n", done.stderr[-2000:]


def same(found, wanted):
    """Masks and scores, but for what another batch's sums change in the last digits."""
    assert len(found) == len(wanted)
    for (mask, score), (want, want_score) in zip(found, wanted):
        assert mask.dtype == bool and mask.shape == want.shape and (mask == want).mean() > 0.999
        assert score == pytest.approx(want_score, abs=1e-3)


def test_a_picture_may_be_a_path_an_image_or_an_array(model, pictures):
    text = "The left, red star!"
    wanted = model.segment(str(pictures[0]), "the left red star")
    assert 0.01 < wanted.mask.mean() < 0.99 and model.config.eval.threshold < wanted.score < 1
    with Image.open(pictures[0]) as opened:
        given = [pictures[0], opened.copy(), read_picture(pictures[0])]
    same([model.segment(g, text) for g in given], [wanted] * 3)


def test_a_picture_of_pillows_is_turned_as_its_file_is(model, pictures):
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(pictures[0]) as opened:
        opened.resize((60, 40)).save(data, "PNG", exif=exif)
    with Image.open(data) as turned:
        assert model.segment(turned, "star").mask.shape == (60, 40)


def test_lists(model, pictures, monkeypatch):
    """More than a batch of them; one picture with several texts is decoded once."""
    texts = ["star", "left star", "the box", "a red circle", "green"]
    one_by_one = [model.segment(pictures[0], t) for t in texts]
    read: list = []
    monkeypatch.setattr(
        "dit_ds.evaluation.predictor.read_picture", lambda path: read.append(path) or read_picture(path)
    )
    same(model.segment(pictures[0], texts), one_by_one)
    assert len(read) == 1
    same(model.segment(pictures, "star"), [model.segment(p, "star") for p in pictures])
    same(model.segment(pictures, texts[:3]), [model.segment(p, t) for p, t in zip(pictures, texts)])
    assert model.segment([], "star") == model.segment([], []) == model.segment(pictures[0], []) == []


def test_points_and_boxes(model, pictures):
    point, box = model.segment(pictures[0], points=[(10, 20)]), model.segment(pictures[0], box=(5, 6, 40, 50))
    both = model.segment(pictures[0], "the left star", box=(5, 6, 40, 50))
    assert not (point.mask == box.mask).all() and not (box.mask == both.mask).all()
    array = model.segment(pictures[0], points=np.array([[10, 20]]), box=None)
    assert (array.mask == point.mask).all()


@pytest.mark.parametrize(
    ("image", "prompt", "says"),
    [
        (0, {}, "nothing says what to segment"),
        (0, {"text": " ."}, "has no word"),
        (0, {"text": 5}, "5 is no text"),
        (0, {"text": ["star", None]}, "None is no text"),
        (0, {"points": [(9999, 1)]}, "outside the picture"),
        (0, {"box": (9, 9, 3, 20)}, "has no inside"),
        ([0, 1], {"text": "star", "points": [(1, 1)]}, "of one picture"),
        ([0, 1], {"text": ["star"]}, "2 pictures and 1 texts"),
        ("nowhere.png", {"text": "star"}, "nowhere.png"),
        (np.zeros((5, 5), np.uint8), {"text": "star"}, "an array of uint8 (5, 5)"),
        (np.zeros((5, 5, 3)), {"text": "star"}, "an array of float64 (5, 5, 3)"),
        (b"x", {"text": "star"}, "a bytes"),
    ],
)
def test_what_cannot_be_segmented(model, pictures, image, prompt, says):
    if isinstance(image, (int, list)):
        image = [pictures[i] for i in image] if isinstance(image, list) else pictures[image]
    with pytest.raises(UserError) as refused:
        model.segment(image, **prompt)
    assert says in str(refused.value) and "\n" not in str(refused.value)
