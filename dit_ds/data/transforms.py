"""From JPEG bytes, a mask and words to what the model reads: sizes, augmentations, padding, tokens."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

_SIDES = {"left": "right", "right": "left"}
_SIDE_WORD = re.compile(r"\b(left|right)(?=\b|most\b|hand\b|ward\b|wards\b|side\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Augmentation:
    """The paper's augmentations (section 4.2) and how strong they are; all zero means none.

    Attributes:
        color: brightness, contrast and saturation are each scaled by a factor from [1 - color, 1 + color].
        blur: the probability of a Gaussian blur with a radius of 0.1 to 1.5 pixels of the resized image.
        flip: the probability of a horizontal flip, in which "left" and "right" change places in the words.
    """

    color: float = 0.0
    blur: float = 0.0
    flip: float = 0.0


def decode_jpeg(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB, bit-equal whichever decoder does it. EXIF rotation is not applied.

    Raises:
        ValueError: the bytes are no whole JPEG.
    """
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as first:
        try:  # CMYK and other rarities that simplejpeg leaves to others
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            raise ValueError(str(first)) from None


def resized_shape(height: int, width: int, image_size: int, resize: str = "pad") -> tuple[int, int]:
    """(h, w) with the longer side `image_size` and the aspect ratio kept, rounded as by SAM's `ResizeLongestSide`; the
    square, where `resize` is stretch."""
    if resize == "stretch":
        return image_size, image_size
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, image_size: int, resize: str = "pad") -> Image.Image:
    """(H, W, 3) uint8 to a PIL image of `resized_shape`."""
    h, w = resized_shape(*image.shape[:2], image_size, resize)
    return Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)


def resize_mask(mask: np.ndarray, image_size: int, resize: str = "pad", rule: str = "half") -> np.ndarray:
    """(H, W) of 0 and 1 to (h, w).

    Args:
        rule: half, uint8 of 0 and 1, a pixel is in where at least half of what it covers was; any, the same where any
            was; soft, float32, the share that was.
    """
    h, w = resized_shape(*mask.shape, image_size, resize)
    if rule != "half":  # in floats: of a large mask's share in bytes too little would be left to be seen
        share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR))
        return share.clip(0, 1) if rule == "soft" else (share > 0).astype(np.uint8)
    covered = Image.fromarray(mask * np.uint8(255)).resize((w, h), Image.Resampling.BILINEAR)
    return (np.asarray(covered) >= 128).astype(np.uint8)


def swap_sides(text: str) -> str:
    """The expression as it reads in the mirror: "left" and "right" change places, also in "leftmost", "right-hand"."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE_WORD.sub(other, text)


def augment(
    image: Image.Image, mask: np.ndarray, text: str, how: Augmentation, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, str]:
    """Augment one resized sample. Every draw is made whatever the settings, so that one of them never shifts another.

    Args:
        mask: (h, w), or several as (h, w, n).
    """
    factors = 1 + how.color * rng.uniform(-1, 1, 3)
    blur, radius, flip = rng.random(), rng.uniform(0.1, 1.5), rng.random()
    if how.color > 0:
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            image = enhance(image).enhance(float(factor))
    if blur < how.blur:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if flip < how.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = np.ascontiguousarray(mask[:, ::-1])
        text = swap_sides(text)
    return image, mask, text


def pad_square(array: np.ndarray, image_size: int) -> np.ndarray:
    """(h, w, ...) to (image_size, image_size, ...): zeros below and to the right, as SAM pads."""
    padding = [(0, image_size - array.shape[0]), (0, image_size - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, padding)
