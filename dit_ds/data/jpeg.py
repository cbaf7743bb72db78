"""JPEG decoding and JPEG headers: simplejpeg, with Pillow for the files that simplejpeg refuses."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

MAX_PIXELS = 178_956_970  # of a picture: beyond it Pillow takes a file for a decompression bomb


class UnsupportedPicture(ValueError):
    """A picture that is not damaged, and still can't be used. The message says why, and what to do."""


def decode_jpeg(data: bytes, fast: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, bit-equal with either decoder. EXIF rotation is not applied.

    Args:
        data: a JPEG file.
        fast: use libjpeg's fast inverse DCT and chroma upsampling, off by a few levels: for training only.
        out: (H, W, 3) uint8, contiguous, to decode to; by default fresh memory.
    Raises:
        UnsupportedPicture: it has more than `MAX_PIXELS` pixels.
        ValueError: the bytes are no complete JPEG, or one of another size than `out`.
    """
    import simplejpeg

    refusal = None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise UnsupportedPicture(f"it has {width}x{height} pixels, more than {MAX_PIXELS}: make it smaller")
        fits = out is None or out.shape == (height, width, 3)  # else `written_to` says so
        if fits and colours not in ("CMYK", "YCCK"):  # which simplejpeg converts one level off, or not at all
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast, fastupsample=fast, buffer=out)
    except UnsupportedPicture:
        raise
    except ValueError as e:
        refusal = e
    with _opened_by_pillow(data, refusal) as image:
        return written_to(out, np.asarray(image.convert("RGB")))


def written_to(out: np.ndarray | None, pixels: np.ndarray) -> np.ndarray:
    """The pixels, copied to `out` where that is given.

    Raises:
        ValueError: it has another size.
    """
    if out is None:
        return pixels
    if out.shape != pixels.shape:
        raise ValueError(f"it has {pixels.shape[1]}x{pixels.shape[0]} pixels, not {out.shape[1]}x{out.shape[0]}")
    out[:] = pixels
    return out


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
def _opened_by_pillow(data: bytes, refusal: ValueError | None) -> Iterator[Image.Image]:
    """The image as Pillow opens it; where Pillow fails, too, simplejpeg's `refusal` mostly names the cause."""
    try:
        with warnings.catch_warnings():  # of sizes within our limit, and of metadata
            warnings.simplefilter("ignore")
            yield Image.open(io.BytesIO(data), formats=["JPEG"])
    except Exception as e:  # a damaged file can raise nearly anything
        raise ValueError(str(refusal or e) or type(e).__name__) from None
