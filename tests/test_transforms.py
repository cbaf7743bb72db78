"""Pixels: quick ways give what the plain ones give."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import MINILM
from PIL import Image, ImageEnhance
from pycocotools import mask as coco

import dit_ds.torchvision_stub  # noqa: F401
from dit_ds.data.jpeg import decode_jpeg
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import (
    Augmentation,
    SampledAugmentation,
    resize_image,
    resize_image_fast,
    resize_mask,
    resize_mask_fast,
    resized_shape,
)
from dit_ds.data.masks import decode_rle
from dit_ds.models.text_encoder import load_tokenizer


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """A few boxes, holes in them, single pixels; or nothing, or everything."""
    rng, mask = np.random.default_rng(seed), np.zeros((height, width), np.uint8, order="F" if seed % 2 else "C")
    for inside in (1, 1, 0):
        (a, b), (c, d) = (np.sort(rng.integers(0, n + 1, 2)) for n in (height, width))
        mask[a:b, c:d] = inside
    mask[rng.random(mask.shape) < 0.002] = 1
    return {0: np.zeros_like(mask), 1: np.ones_like(mask)}.get(seed, mask)


@pytest.mark.parametrize("resize", ["pad", "stretch"])
@pytest.mark.parametrize("seed", range(12))
def test_masks_are_resized_as_whole_ones_in_floats(seed, resize):
    """The reference resizes the whole mask with Pillow; what differs is rounding: half way, and next to nothing."""
    mask = blobs(seed, *np.random.default_rng(seed).integers(20, 300, 2))
    for side in (16, 50, 128, 333):
        shape = resized_shape(*mask.shape, side, resize)
        share = Image.fromarray(mask.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
        share = np.asarray(share).clip(0, 1)
        half, any_, soft = (resize_mask(mask, side, resize, rule) for rule in ("half", "any", "soft"))
        assert half.shape == any_.shape == soft.shape == shape
        np.testing.assert_allclose(soft, share, atol=1e-4)
        assert np.array_equal(half, share >= 0.5) or np.abs(share[half != (share >= 0.5)] - 0.5).max() < 1 / 128
        assert not share[any_ != (share > 0)].size or share[any_ != (share > 0)].max() < 1e-4
        assert half.dtype == any_.dtype == np.uint8 and soft.dtype == np.float32


@pytest.mark.parametrize("side", [64, 200, 256])
def test_quick_masks_lie_where_quick_pictures_show_them(side):
    for seed in range(2, 8):
        mask = blobs(seed, 240, 320)
        shown = resize_image_fast(np.repeat(mask[..., None] * np.uint8(255), 3, 2), side)[..., 0].astype(int)
        quick = resize_mask_fast(mask, side)
        assert quick.dtype == np.uint8 and quick.shape == shown.shape == resized_shape(240, 320, side)
        clear = np.abs(shown - 127.5) > 2
        assert clear.mean() > 0.9 and np.array_equal(quick[clear], shown[clear] > 127)


def test_quick_pictures_are_close_to_sams_resizing():
    y, x = np.mgrid[:480, :640]
    smooth = np.stack([x / 2.6, y / 2, 128 + 100 * np.sin(x / 40)], -1).astype(np.uint8)
    for side in (150, 512, 800):  # each pixel the mean of what it covers, bilinear, enlarged
        assert np.abs(resize_image_fast(smooth, side).astype(int) - resize_image(smooth, side)).max() <= 3


@pytest.mark.parametrize("shape", [(480, 640), (333, 500), (97, 31)])
def test_evaluation_resizes_as_segment_anything(shape):
    from segment_anything.utils.transforms import ResizeLongestSide

    pixels = noise(*shape, 3)
    for side in (64, 512):
        np.testing.assert_array_equal(resize_image(pixels, side), ResizeLongestSide(side).apply_image(pixels))


@pytest.mark.parametrize("seed", range(20))
def test_rle_decodes_as_by_pycocotools(seed):
    rng = np.random.default_rng(seed)
    for mask in (blobs(seed, *rng.integers(1, 200, 2)), (rng.random(rng.integers(1, 40, 2)) < 0.5).astype(np.uint8)):
        rle = coco.encode(np.asfortranarray(mask))
        np.testing.assert_array_equal(decode_rle(rle | {"counts": rle["counts"].decode()}), mask)


def painted(image: np.ndarray, drawn: SampledAugmentation) -> np.ndarray:
    out = np.empty_like(image)
    drawn.apply_image(image, out)
    return out


def test_colors_change_as_by_pillows_enhancers():
    image = (noise(40, 60, 3) // 3 + 80).astype(np.uint8)  # nothing near 0 or 255, where Pillow cuts off in between
    for factors in ([1.3, 1, 1], [1, 0.6, 1], [1, 1, 1.4], [0.8, 1.2, 0.7]):
        want = Image.fromarray(image)
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            want = enhance(want).enhance(factor)
        difference = np.abs(painted(image, SampledAugmentation(np.array(factors))).astype(int) - np.asarray(want))
        assert difference.max() <= 4 and np.abs(image.astype(int) - np.asarray(want)).max() > 10
    assert painted(np.full((4, 4, 3), 250, np.uint8), SampledAugmentation(np.array([1.4, 1, 1]))).min() == 255


def test_blur_is_gaussian_and_keeps_brightness():
    dot = np.zeros((31, 31, 3), np.uint8)
    dot[15, 15] = 255
    for radius in (0.4, 1.0, 1.5):
        blurred = painted(dot, SampledAugmentation(radius=radius))[..., 0].astype(float)
        assert blurred[15, 15] == blurred.max() < 255 and np.array_equal(blurred, blurred.T)
        spread = np.sqrt((blurred.sum(0) * (np.arange(31) - 15) ** 2).sum() / blurred.sum())
        assert spread == pytest.approx(radius, abs=0.2)
    assert np.array_equal(
        painted(np.full((9, 9, 3), 77, np.uint8), SampledAugmentation(radius=1.5)), np.full((9, 9, 3), 77)
    )


def test_steps_in_one_memory_are_steps_one_after_another():
    image, steps = (
        noise(30, 40, 3),
        [
            SampledAugmentation(np.array([1.2, 0.8, 1.3])),
            SampledAugmentation(radius=1.2),
            SampledAugmentation(flipped=True),
        ],
    )
    square = np.full((64, 64, 3), 7, np.uint8)
    SampledAugmentation(steps[0].factors, 1.2, True).apply_image(image, square[:30, :40])
    for step in steps:
        image = painted(image, step)
    np.testing.assert_array_equal(square[:30, :40], image)
    assert (square[30:] == 7).all() and (square[:, 40:] == 7).all()


def test_settings_shift_no_draw():
    draws = [Augmentation(*how).draw(np.random.default_rng(3)) for how in ((0.4, 1, 1), (0, 1, 0), (0.4, 0, 1))]
    assert draws[0].radius == draws[1].radius and draws[2].radius is None
    assert np.array_equal(draws[0].factors, draws[2].factors) and draws[1].factors is None
    assert [d.flipped for d in draws] == [True, False, True]


@pytest.mark.parametrize("subsampling", [0, 1, 2])  # 4:4:4, 4:2:2, 4:2:0
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_decodes_as_by_pillow(mode, progressive, subsampling):
    smooth = Image.fromarray(noise(9, 13, 3)).resize((131, 93), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.convert(mode).save(file, "JPEG", quality=90, progressive=progressive, subsampling=subsampling)
    want = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(decode_jpeg(file.getvalue()), want)
    assert np.abs(decode_jpeg(file.getvalue(), fast=True).astype(int) - want).mean() < 8


def test_tokens_are_those_of_transformers():
    tokenizer = load_tokenizer(MINILM)
    tokenize = make_tokenize(tokenizer, 12)
    for text in ("", "man in red", "the left woman " * 9, "a-b ünï 12"):
        want = tokenizer(text, padding="max_length", truncation=True, max_length=12)
        ids, real = tokenize(text)
        assert ids.tolist() == want["input_ids"] and real.tolist() == [bool(m) for m in want["attention_mask"]]
    assert len(tokenizer("man")["input_ids"]) == 3  # the tokenizer that was given is as it was
