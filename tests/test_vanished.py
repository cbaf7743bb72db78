"""Targets of which nothing is left at the model's resolution: kept or skipped by rule, counted, never silently nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from conftest import MINILM
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from refer_files import box

from dit_ds.cli.entry import main
from dit_ds.config.schema import RunConfig
from dit_ds.data.input_check import InputCheck
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.transforms import Augmentation, pad_square, resize_mask_fast, resized_shape
from dit_ds.data.masks import holds_square, run_lengths
from dit_ds.data.shards.write import shard_refer


def rle_of(mask: np.ndarray) -> dict:
    rle = coco.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@st.composite
def masks(draw) -> np.ndarray:
    """Boxes, lines and single pixels, of any share of the picture; or none."""
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    mask = np.zeros((height, width), np.uint8, order="F")
    for _ in range(draw(st.integers(0, 3))):
        h, w = (draw(st.one_of(st.integers(1, 4), st.integers(1, n))) for n in mask.shape)
        y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[y : y + h, x : x + w] = draw(st.sampled_from([1, 1, 1, 0]))
    return mask


sides, resizes = st.integers(8, 200), st.sampled_from(["pad", "stretch"])


def decoded(mask: np.ndarray, resize: str, rule: str = "half") -> DecodedImage:
    meta = {"height": mask.shape[0], "width": mask.shape[1], "anns": {"1": {"rle": rle_of(mask)}}}
    return DecodedImage(meta, np.zeros((*mask.shape, 3), np.uint8), resize, rule, fast=True)


@given(masks(), sides, resizes)
def test_a_target_keeps_the_pixel_that_it_covers_most(mask, side, resize):
    image, resized = decoded(mask, resize), resize_mask_fast(mask, side, resize)
    gone = bool(mask.any()) and not resized.any()
    assert image.vanishes([1], side) == gone
    np.testing.assert_array_equal(image.resized_mask([1], side), resized)
    if not gone:
        return
    kept = image.best_covered_pixel([1], side)
    shape = resized_shape(*mask.shape, side, resize)
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR))
    assert kept.dtype == np.uint8 and kept.shape == shape and kept.sum() == 1
    assert share[kept > 0].item() == pytest.approx(share.max(), abs=1e-5) and share.max() > 0


@given(masks(), sides, st.sampled_from(["any", "soft"]))
def test_the_released_codes_rules_lose_no_target(mask, side, rule):
    assert not decoded(mask, "pad", rule).vanishes([1], side)


def squares(mask: np.ndarray, side: int) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view
    return min(mask.shape) >= side and bool(windows(mask, (side, side)).all((2, 3)).any())


@given(masks(), st.integers(1, 12), sides, resizes)
def test_a_square_that_is_found_is_there_and_outlasts_resizing(mask, square, side, resize):
    """The shortcut of `InputCheck`, against the masks themselves."""
    rle = rle_of(mask)
    assert not holds_square(run_lengths(rle), mask.shape[0], square) or squares(mask, square)
    scale = max(a / b for a, b in zip(mask.shape, resized_shape(*mask.shape, side, resize)))
    if holds_square(run_lengths(rle), mask.shape[0], int(np.ceil(2 * scale)) + 1):
        assert resize_mask_fast(mask, side, resize).any()


def test_a_box_holds_its_square():
    for y, x, n in ((0, 0, 5), (7, 3, 5), (15, 25, 5)):
        mask = np.zeros((20, 30), np.uint8)
        mask[y : y + n, x : x + n] = 1
        assert holds_square(run_lengths(rle_of(mask)), 20, n) and not holds_square(run_lengths(rle_of(mask)), 20, n + 1)
    assert holds_square(run_lengths(rle_of(np.ones((20, 30), np.uint8))), 20, 20)


H, W = 480, 640
OBJECTS = {"the big box": [100, 100, 300, 300], "a speck": [500, 50, 503, 53], "a thin line": [10, 400, 600, 401]}


@pytest.fixture(scope="module")
def small_things(tmp_path_factory):
    """The shards of a picture with a box, a speck, a thin line, and an expression without a target."""
    folder = tmp_path_factory.mktemp("small")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "segmentation": [box(*xyxy)], "iscrowd": 0}
        for i, xyxy in enumerate(OBJECTS.values())
    ]
    expressions = [
        {"image_id": 1, "annotation_ids": ids, "text": text, "split": "train"}
        for text, ids in [*((t, [i]) for i, t in enumerate(OBJECTS)), ("nothing", []), ("both small ones", [1, 2])]
    ]
    images = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
    (folder / "own.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "expressions": expressions})
    )
    Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(folder / "a.jpg")
    shard_refer(None, folder, "mine", None, folder / "shards", coco=folder / "own.json", processes=1)
    return folder / "shards/mine/own"


def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(4, np.int64), np.ones(4, bool)


def samples(folder, augmentation: Augmentation | None = Augmentation(), **options) -> list:  # noqa: B008
    index = SplitIndex.load(folder, "train")
    dataset = ExpressionDataset(index, "sentence", 64, tokenize, augmentation, **options)
    return [dataset[(0, i, 1.0)] for i in range(len(dataset))]


BIG, SPECK, LINE, NOTHING, BOTH = range(5)


def test_training_keeps_a_pixel_of_what_vanishes_or_skips_it(small_things):
    as_evaluated, kept = samples(small_things, None), samples(small_things)
    skipped, flipped = samples(small_things, on_vanished_target="skip"), samples(small_things, Augmentation(flip=1.0))
    assert np.argwhere(kept[SPECK]["mask"]).tolist() == [[5, 50]]  # (501, 51) at a tenth
    assert np.argwhere(flipped[SPECK]["mask"]).tolist() == [[5, 13]]
    assert np.argwhere(kept[LINE]["mask"])[:, 0].tolist() == [40] and kept[BOTH]["mask"].sum() == 1
    for i in (SPECK, LINE, BOTH):
        assert not skipped[i]["mask"].any() and skipped[i]["weight"] == 0 and kept[i]["weight"] == 1
        assert not as_evaluated[i]["mask"].any() and as_evaluated[i]["original"].any()
    for of in (kept, skipped):
        assert of[BIG]["weight"] == of[NOTHING]["weight"] == 1 and not of[NOTHING]["mask"].any()
        whole = resize_mask_fast(as_evaluated[BIG]["original"], 64)
        np.testing.assert_array_equal(of[BIG]["mask"], pad_square(whole, 64))
    soft = samples(small_things, mask_rule="soft")
    assert 0 < soft[SPECK]["mask"].sum() < 1 and soft[SPECK]["weight"] == 1


def test_prompts_of_what_vanishes_lie_in_what_is_kept(small_things):
    index = SplitIndex.load(small_things, "train")
    for kind in ("point", "box"):
        dataset = ExpressionDataset(index, "sentence", 64, tokenize, Augmentation(), prompts=Prompts.of([kind], 3))
        sample = dataset[(0, SPECK, 1.0)]
        given = sample["points"][np.isin(sample["labels"], (1, 2, 3))].astype(int)
        assert len(given) and all(sample["mask"][y, x] for x, y in given)


def test_vanished_targets_are_counted_at_the_configured_sizes(small_things, tmp_path, capsys):
    def count(**data) -> int:
        config = RunConfig.model_validate({"data": data, "text": {"name": MINILM}})
        return InputCheck(config).losses(small_things, "train", 1).counts["targets_vanished"]

    assert count(image_size=64) == 3 and count(image_size=512) == 0
    assert count(image_size=512, scales=[512, 64]) == 3 and count(image_size=64, train_mask_rule="soft") == 0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"text": {"name": MINILM}, "data": {"image_size": 64}}))
    arguments = [str(small_things), "--config", str(tmp_path / "c.yaml"), "--processes", "1"]
    assert main(["data", "verify", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (warning,) = found["warnings"]
    assert found["counts"]["train"]["targets_vanished"] == 3
    assert "3 targets have nothing left at 64 pixels" in warning and "000000000001 ref 1" in warning
    assert main(["data", "stats", *arguments]) == 0
    assert "3 targets have nothing left at 64 pixels" in capsys.readouterr().out


def test_every_target_of_a_set_is_counted_as_training_finds_it(shards):
    """The sample set at a size where some of its dots vanish, against resizing each mask."""
    index, config = (
        SplitIndex.load(shards / "refcoco/unc", "train"),
        {"data": {"image_size": 16}, "text": {"name": MINILM}},
    )
    counted = InputCheck(RunConfig.model_validate(config)).losses(shards / "refcoco/unc", "train", 2).counts
    skipping = ExpressionDataset(index, "ref", 16, tokenize, Augmentation(), on_vanished_target="skip")
    assert counted["targets_vanished"] == sum(skipping[(0, i, 1.0)]["weight"] == 0 for i in range(len(skipping))) > 0
