"""JPEG files: decoded, and measured by their headers."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def decode_jpeg(data: bytes, fast: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 RGB, bit-equal whichever decoder does it. EXIF rotation is not applied.

    Args:
        fast: with libjpeg's quicker inverse DCT and chroma upsampling: off by a few levels, not for evaluation.
    Raises:
        ValueError: the bytes are no whole JPEG.
    """
    import simplejpeg

    try:
        if simplejpeg.decode_jpeg_header(data)[2] == "CMYK":
            raise ValueError("CMYK")  # of which simplejpeg makes an RGB one level off, or none
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, fastupsample=fast)
    except ValueError as first:
        try:  # rarities that simplejpeg leaves to others
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            raise ValueError(str(first)) from None


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width by the header.

    Raises:
        ValueError: there is none.
    """
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg_header(data)[:2]
    except ValueError as first:
        try:  # what `decode_jpeg` leaves to Pillow
            width, height = Image.open(io.BytesIO(data)).size
        except (OSError, SyntaxError, Image.DecompressionBombError):
            raise ValueError(str(first)) from None
        return height, width
