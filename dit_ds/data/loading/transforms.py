"""Transforms of images, masks and expressions: resizing, augmentation, padding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from dit_ds.data.directions import mirror_expression

# workers are one process a core; and OpenCV's thread pool deadlocks in a forked process
cv2.setNumThreads(1)

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's
_GREY = np.array(GREY)
_IDENTITY = np.eye(3)


@dataclass(frozen=True)
class Augmentation:
    """The paper's augmentations (section 4.2) and their strength; zeros turn them off.

    Attributes:
        color: brightness, contrast and saturation are each scaled by a factor from [1 - color, 1 + color].
        blur: the probability of a Gaussian blur with a radius of 0.1 to 1.5 pixels of the resized image.
        flip: the probability of a horizontal flip, which also swaps "left" and "right" in the expression; a sample whose
            expression can't be mirrored is not flipped.
    """

    color: float = 0.0
    blur: float = 0.0
    flip: float = 0.0

    def draw(self, rng: np.random.Generator) -> SampledAugmentation:
        """Draw one sample's augmentation, with the same number of draws whatever the settings."""
        drawn = rng.random(6)  # in [0, 1): one call takes a quarter of the time of one for each
        factors, (blur, radius, flip) = 1 + self.color * (2 * drawn[:3] - 1), drawn[3:].tolist()
        return SampledAugmentation(
            factors if self.color > 0 else None, 0.1 + 1.4 * radius if blur < self.blur else None, flip < self.flip
        )


@dataclass(frozen=True)
class SampledAugmentation:
    """The augmentation of one sample.

    Attributes:
        factors: (3,) of brightness, contrast and saturation; None leaves the colors unchanged.
        radius: the standard deviation of the blur in pixels; None for no blur.
        flipped: flip horizontally.
    """

    factors: np.ndarray | None = None
    radius: float | None = None
    flipped: bool = False

    def apply_image(self, image: np.ndarray, out: np.ndarray) -> None:
        """Write an (h, w, 3) uint8 image, augmented, to `out`; every step after the first is in place."""
        if self.factors is None:
            out[:] = image
        else:
            cv2.transform(image, color_matrix(image, *self.factors), dst=out)
        if self.radius is not None:
            kernel = blur_kernel(self.radius)
            cv2.sepFilter2D(out, -1, kernel, kernel, dst=out)
        if self.flipped:
            cv2.flip(out, 1, dst=out)

    def apply_mask(self, mask: np.ndarray) -> np.ndarray:
        """(h, w): the mask, flipped with the image."""
        return cv2.flip(mask, 1) if self.flipped else mask

    def with_text(self, text: str) -> tuple[SampledAugmentation, str]:
        """This augmentation and the expression, mirrored if the image is; not flipped if the expression can't be."""
        mirrored = mirror_expression(text) if self.flipped else text
        return (self, mirrored) if mirrored is not None else (replace(self, flipped=False), text)


def blur_kernel(radius: float) -> np.ndarray:
    """(n, 1) float32: a Gaussian's weights, n = 3, 5 or 7 for a radius of up to 0.5, 1 or 1.5 pixels."""
    return cv2.getGaussianKernel(2 * math.ceil(2 * radius) + 1, radius, cv2.CV_32F)


def color_matrix(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """(3, 4) float32: the composition of Pillow's three enhancers as one affine map of a pixel.

    Brightness scales, contrast blends with the image's mean grey, saturation with the pixel's grey. Each is affine and
    maps grey to grey, so they compose. Unlike Pillow's, values are clipped to [0, 255] only once, at the end.

    Args:
        image: (h, w, 3) uint8, for its mean grey.
        brightness, contrast, saturation: factors, 1 for no change.
    """
    grey = brightness * _GREY @ cv2.mean(image[::4])[:3]  # every fourth row estimates the mean well enough
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = brightness * contrast * (saturation * _IDENTITY + (1 - saturation) * _GREY)
    matrix[:, 3] = (1 - contrast) * grey
    return matrix


def resized_shape(height: int, width: int, image_size: int, resize: str = "pad") -> tuple[int, int]:
    """(h, w) with the longer side `image_size`, rounded as by SAM's `ResizeLongestSide.get_preprocess_shape`.

    Args:
        height, width: of the original image.
        resize: pad, which keeps the aspect ratio, or stretch, to a square.
    """
    if resize == "stretch":
        return image_size, image_size
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, image_size: int, resize: str = "pad") -> np.ndarray:
    """(H, W, 3) uint8 to `resized_shape`, bit-equal to SAM's resizing, which is Pillow's: for evaluation."""
    h, w = resized_shape(image.shape[0], image.shape[1], image_size, resize)
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))


def resize_image_fast(image: np.ndarray, image_size: int, resize: str = "pad") -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 to `resized_shape`, for training: an eighth of Pillow's time.

    Bilinear without a filter, whose slight aliasing is less than the augmentations change. Below half the size bilinear
    would skip pixels, so each pixel is the mean of the area that it covers.
    """
    h, w = resized_shape(image.shape[0], image.shape[1], image_size, resize)
    area = takes_area_mean(image.shape[:2], (h, w))
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)


def takes_area_mean(shape: tuple[int, ...], resized: tuple[int, int]) -> bool:
    """Whether `resize_image_fast` of (H, W) to (h, w) takes the mean of areas: below half the size."""
    return min(resized[0] / shape[0], resized[1] / shape[1]) < 0.5


def resize_mask_fast(mask: np.ndarray, image_size: int, resize: str = "pad") -> np.ndarray:
    """(H, W) uint8 of 0 and 1 to (h, w), by the rule half, aligned with `resize_image_fast`.

    Args:
        mask: in column-major memory, as from `decode_rle`, for speed.
    """
    covered = resize_image_fast(mask.T * np.uint8(255), image_size, resize)
    return cv2.threshold(cv2.transpose(covered), 127, 1, cv2.THRESH_BINARY)[1]


def resize_mask(mask: np.ndarray, image_size: int, resize: str = "pad", rule: str = "half") -> np.ndarray:
    """(H, W) uint8 of 0 and 1 to (h, w), with Pillow's bilinear filter; only the mask's bounding box is computed.

    Args:
        mask: in column-major memory, as from `decode_rle`, for speed.
        rule: of a pixel, by the share of its area that the mask covers: half, uint8, 1 from one half on; any, uint8, 1
            above zero; soft, float32, the share.
    """
    shape = resized_shape(mask.shape[0], mask.shape[1], image_size, resize)
    out = np.zeros(shape, np.float32 if rule == "soft" else np.uint8)
    y, x, height, width = cv2.boundingRect(mask.T)
    if not width:
        return out
    source, target, box = [], [], []
    for low, high, long, short in zip((y, x), (y + height, x + width), mask.shape, shape):
        scale = long / short
        reach = math.ceil(max(scale, 1)) + 1  # the filter's extent on either side of a resized pixel's centre
        first = max(0, int((low - reach) / scale))
        last = min(short, math.ceil((high + reach) / scale))
        start, end = max(0, int(first * scale) - reach), min(long, math.ceil(last * scale) + reach)
        source.append(slice(start, end))
        target.append(slice(first, last))
        box.append((first * scale - start, last * scale - start))
    part = mask[tuple(source)].T  # (W, H)
    # in floats where the smallest share counts: in bytes it would round to zero
    part = part * np.uint8(255) if rule == "half" else part.astype(np.float32)
    size = tuple(t.stop - t.start for t in target)
    corners = tuple(np.transpose(box).ravel())  # of the box in `part`, whose x are the rows
    covered = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, corners)).T
    if rule == "soft":
        out[tuple(target)] = covered.clip(0, 1)
    else:
        out[tuple(target)] = covered >= 128 if rule == "half" else covered > 0
    return out


def vanished(resized: np.ndarray, mask: np.ndarray) -> bool:
    """Whether nothing is left in the resized mask, (h, w), of one, (H, W), that is not empty."""
    return not cv2.countNonZero(resized) and bool(mask.any())


def best_covered_pixel(mask: np.ndarray, image_size: int, resize: str = "pad") -> np.ndarray:
    """(h, w) uint8 with a single 1: the pixel of which an (H, W) mask that is not empty covers the most."""
    share = resize_mask(mask, image_size, resize, "soft")
    out = np.zeros(share.shape, np.uint8)
    out.flat[share.argmax()] = 1
    return out


def pad_square(array: np.ndarray, image_size: int) -> np.ndarray:
    """(h, w, ...) to (image_size, image_size, ...): zeros below and to the right, as SAM pads."""
    padding = [(0, image_size - array.shape[0]), (0, image_size - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding)
