"""JPEG decoding and JPEG headers: simplejpeg, with Pillow for the files that simplejpeg refuses."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image


def decode_jpeg(data: bytes, fast: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 RGB, bit-equal with either decoder. EXIF rotation is not applied.

    Args:
        data: a JPEG file.
        fast: use libjpeg's fast inverse DCT and chroma upsampling, off by a few levels: for training only.
    Raises:
        ValueError: the bytes are no complete JPEG.
    """
    import simplejpeg

    try:
        if simplejpeg.decode_jpeg_header(data)[2] == "CMYK":
            raise ValueError("CMYK")  # simplejpeg converts it one level off, or not at all
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, fastupsample=fast)
    except ValueError as refusal:
        with _opened_by_pillow(data, refusal) as image:
            return np.asarray(image.convert("RGB"))


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
        ValueError: there is no JPEG header.
    """
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg_header(data)[:2]
    except ValueError as refusal:
        with _opened_by_pillow(data, refusal) as image:
            return image.height, image.width


@contextlib.contextmanager
def _opened_by_pillow(data: bytes, refusal: ValueError) -> Iterator[Image.Image]:
    """The image as Pillow opens it; whatever Pillow raises becomes simplejpeg's `refusal`, which names the cause."""
    try:
        yield Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(str(refusal)) from None
