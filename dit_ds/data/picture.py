"""Pictures of every kind that people have, as 8-bit RGB: the one home of reading them.

- 16-bit, 32-bit and floating-point samples are scaled to 8 bits. What counts as white is the smallest of 255, 1023, 4095,
  16383 and 65535 that no sample exceeds: cameras and microscopes store 10, 12 or 14 bits in 16. Of floats it is 1 or 255.
- What is transparent is shown on white.
- CMYK is converted without a colour profile; CMYK and YCCK JPEGs are taken to be inverted, as Adobe writes them.
- Animated pictures, pages, negative or larger samples, and more than `MAX_PIXELS` are refused.

Pixels are as stored; `read_picture` turns them as viewers do (EXIF orientation).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from dit_ds.data.exif import exif_orientation, png_chunks, tiff_directories, turn, without_orientation
from dit_ds.data.jpeg import MAX_PIXELS, UnsupportedPicture, decode_jpeg, jpeg_size, written_to
from dit_ds.errors import UserError

JPEG_QUALITY = 95
_WHITES = (255, 1023, 4095, 16383, 65535)
# what a file begins with: its kind, and Pillow's name of it
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"\xff\xd8": ("jpg", "JPEG"),
    b"\x89PNG\r\n\x1a\n": ("png", "PNG"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ("tif", "TIFF")),
    b"BM": ("bmp", "BMP"),
    b"GIF8": ("gif", "GIF"),
    b"\0\0\0\x0cjP": ("jp2", "JPEG2000"),
    **{b"P%d" % n: ("ppm", "PPM") for n in range(1, 7)},
}
# of a PNG's chunks those that say something about pixels; a broken text or colour profile is no reason to refuse it
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
# TIFF's tags
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _CHANNELS, _PLANAR, _FORMAT = 256, 257, 258, 262, 277, 284, 339
_SUBFILE, _EXTRA, _STRIPS, _TILES = 254, 338, (273, 279), (324, 325)
_UNSIGNED, _FLOAT, _PREMULTIPLIED = 1, 3, 1


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        pixels: (H, W, 3) uint8, RGB, as stored.
        white: the sample value that became 255, where samples have more than 8 bits; else None.
    """

    pixels: np.ndarray
    white: float | None = None


def picture_kind(data: bytes) -> str:
    """jpg, png, webp, tif, bmp, gif, avif, jp2 or ppm, by the file's first bytes; empty for anything else."""
    return _kind_and_format(data)[0]


def _kind_and_format(data: bytes) -> tuple[str, str]:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif", "AVIF"
    return next((found for magic, found in _MAGIC.items() if data.startswith(magic)), ("", ""))


def decode_picture(data: bytes, fast: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8: the pixels of `load_picture`, which has the arguments and errors.

    Args:
        out: as for `decode_jpeg`, of a picture of any kind.
    """
    if picture_kind(data) == "jpg":
        return decode_jpeg(data, fast, out)
    return written_to(out, load_picture(data, fast).pixels)


def load_picture(data: bytes, fast: bool = False) -> Picture:
    """Decode a picture's file; EXIF orientation is not applied.

    Args:
        fast: as for `decode_jpeg`, which decodes JPEGs.
    Raises:
        UnsupportedPicture: it has no 8-bit RGB form: see the module's docstring.
        ValueError: it is damaged. The message completes "the picture can't be read: ..".
    """
    kind, _ = _kind_and_format(data)
    if kind == "jpg":
        return Picture(decode_jpeg(data, fast))
    if kind == "png":
        data = _without_other_chunks(data)
    directories = list(tiff_directories(data)) if kind == "tif" else []
    tags = {tag: [v.value for v in values] for tag, values in directories[0].items()} if directories else {}
    if kind == "tif":
        _check_tiff(directories, tags, len(data))
        data = without_orientation(data)  # else Pillow and OpenCV would turn it
    if max(tags.get(_BITS, [1])) in (16, 32, 64):
        return _scaled(_by_opencv(data, tags), tags)
    with _opened(data) as image:
        frames = 1 if kind == "tif" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise UnsupportedPicture(f"it has {frames} frames: save one of them as a picture")
        if kind == "avif" and image.getexif().get(0x0112, 1) != 1:  # which it has in boxes of its own
            raise UnsupportedPicture("it is to be turned, which is read of JPEG, PNG, WebP and TIFF: save it as one")
        image.load()
        if kind == "png" and data[24] == 16 and image.mode not in ("I", "I;16", "I;16B"):
            return _scaled(_by_opencv(data, tags), tags)  # Pillow would drop the lower 8 bits
        return _of_pillow(image, kind, tags)


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8: an image that Pillow has opened, read as a file of ours is and turned as viewers turn it.

    Raises:
        UnsupportedPicture: it has no 8-bit RGB form.
        ValueError: it is damaged.
    """
    _check_size(image.width, image.height)
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as e:
        raise ValueError(" ".join(str(e).split())) from None
    return _of_pillow(image, "", {}).pixels


def _of_pillow(image: Image.Image, kind: str, tags: dict[int, list[int]]) -> Picture:
    if image.mode[0] in "IF" or tags.get(_FORMAT, [_UNSIGNED])[0] != _UNSIGNED:
        return _scaled(_grey_samples(image, tags), tags)
    return Picture(_flattened(image, kind))


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width of the stored pixels, from the file's header alone.

    Raises:
        ValueError: there is none.
    """
    kind, _ = _kind_and_format(data)
    if kind == "jpg":
        return jpeg_size(data)
    if kind == "tif":
        tags = next(tiff_directories(data), {})
        if _HEIGHT not in tags or _WIDTH not in tags:
            raise ValueError("its TIFF directory is damaged")
        return tags[_HEIGHT][0].value, tags[_WIDTH][0].value
    with _opened(data) as image:
        return image.height, image.width


def read_picture(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8: the picture in a file, turned as viewers turn it.

    Raises:
        UserError: the file can't be read, is no picture, or one that can't be used.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the picture {path} ({e.strerror or e})") from None
    return turned_picture(data, path)


def turned_picture(data: bytes, name: str | Path) -> np.ndarray:
    """`read_picture` of a file that is in memory.

    Args:
        name: of the file, for the message.
    Raises:
        UserError: it is no picture, or one that can't be used.
    """
    try:
        return turn(decode_picture(data), exif_orientation(data))
    except OSError as e:
        raise UserError(f"cannot read the picture {name} ({e.strerror or e})") from None
    except ValueError as e:
        raise UserError(f"cannot read the picture {name} ({e})") from None


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a JPEG of quality `JPEG_QUALITY`, its colours in full resolution."""
    import simplejpeg

    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), JPEG_QUALITY, colorsubsampling="444")


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture as Pillow opens it, by the decoder of its kind alone.

    Raises:
        UnsupportedPicture: it is of no kind that is read, or too large.
        ValueError: it is damaged.
    """
    kind, name = _kind_and_format(data)
    if not kind:
        what = (
            "is none of a kind that is read (JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000)" if data else "is empty"
        )
        raise UnsupportedPicture(f"it {what}")
    try:
        with warnings.catch_warnings():  # of sizes that are within our limit, and of metadata
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[name])
            _check_size(image.width, image.height)
            yield image
    except Image.DecompressionBombError:
        raise UnsupportedPicture(f"it has more than {MAX_PIXELS} pixels: make it smaller") from None
    except UnsupportedPicture:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"its {name} header is damaged, or of a form that is not read") from None
    except Exception as e:  # a damaged picture can raise nearly anything
        raise ValueError(" ".join(str(e).split()) or type(e).__name__) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnsupportedPicture(f"it has {width}x{height} pixels, more than {MAX_PIXELS}: make it smaller")


def _check_tiff(directories: list[dict[int, Any]], tags: dict[int, list[int]], length: int) -> None:
    """Refuse several pages, and strips that are not there: OpenCV would leave them black."""
    pages = [d for d in directories if not (d[_SUBFILE][0].value if _SUBFILE in d else 0) & 0b101]  # copies and masks
    if len(pages) > 1:
        raise UnsupportedPicture(f"it has {len(pages)} pages: save one of them as a picture")
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise ValueError("its TIFF directory is damaged")
    _check_size(tags[_WIDTH][0], tags[_HEIGHT][0])
    for offsets, sizes in (_STRIPS, _TILES):
        if any(a + b > length for a, b in zip(tags.get(offsets, []), tags.get(sizes, []))):
            raise ValueError("image file is truncated")


def _without_other_chunks(data: bytes) -> bytes:
    """A PNG without the chunks that say nothing about pixels; what follows the last whole chunk is kept."""
    kept, end = [data[:8]], 8
    for kind, start, stop in png_chunks(data):
        end = stop + 4
        if kind in _PNG_PIXELS:
            kept.append(data[start - 8 : end])
    return b"".join([*kept, data[end:]])


def _by_opencv(data: bytes, tags: dict[int, list[int]]) -> np.ndarray:
    """(H, W) grey or (H, W, 3 or 4) RGB or RGBA samples of more than 8 bits, unchanged.

    Raises:
        UnsupportedPicture: neither grey nor RGB; of a TIFF, in separate planes.
        ValueError: it is damaged, or of a form that OpenCV does not read.
    """
    channels = tags.get(_CHANNELS, [1])[0]
    colours = tags.get(_PHOTOMETRIC, [1])[0]
    if (channels, colours) not in ((1, 0), (1, 1), (3, 2), (4, 2)) and tags:
        raise UnsupportedPicture("its samples of more than 8 bits are neither grey nor RGB: save it with 8 bits")
    if tags.get(_PLANAR, [1])[0] != 1 and channels > 1:
        raise UnsupportedPicture("its samples of more than 8 bits lie in separate planes: save it with 8 bits")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        samples = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if samples is None or (tags and samples.shape[2:] != (() if channels == 1 else (channels,))):
        raise ValueError("its samples can't be decoded, or are of a form that is not read")
    return samples if samples.ndim == 2 else samples[..., [2, 1, 0, 3][: samples.shape[2]]]


def _grey_samples(image: Image.Image, tags: dict[int, list[int]]) -> np.ndarray:
    """(H, W) samples, or (H, W, 2) with alpha, of a picture that Pillow has in a grey mode of 8 bits or more."""
    samples = np.asarray(image)
    if tags.get(_FORMAT, [_UNSIGNED])[0] != _UNSIGNED:
        samples = samples.view(np.int8)  # Pillow reads signed bytes as unsigned
    clear = image.info.get("transparency")
    if clear is None:
        return samples
    return np.stack([samples, np.where(samples == clear, 0, 65535).astype(samples.dtype)], -1)


def _scaled(samples: np.ndarray, tags: dict[int, list[int]]) -> Picture:
    """Samples of any type to 8-bit RGB, on white where they are transparent.

    Args:
        samples: (H, W), or (H, W, C): 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    """
    channels = samples.reshape(*samples.shape[:2], -1)
    extra = tags.get(_EXTRA, [2])[0]  # none written: alpha, as by OpenCV
    has_alpha = channels.shape[2] in (2, 4) and extra != 0
    colours = channels[..., : 3 if channels.shape[2] > 2 else 1]
    pixels, white = _eight_bits(colours, least=4095 if tags.get(_BITS) == [12] else 1)
    if tags.get(_PHOTOMETRIC) == [0]:
        pixels = 255 - pixels
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if has_alpha:
        alpha, _ = _eight_bits(channels[..., -1:], least=1 if samples.dtype.kind == "f" else int(white))
        pixels = _on_white(pixels, alpha, premultiplied=extra == _PREMULTIPLIED)
    return Picture(np.ascontiguousarray(pixels), white)


def _eight_bits(samples: np.ndarray, least: int = 1) -> tuple[np.ndarray, float]:
    """Samples as uint8, and the value that became 255.

    Args:
        least: what that is at least.
    Raises:
        UnsupportedPicture: they are not all finite, from 0 to 65535, and of floats to 255.
    """
    if not np.isfinite(samples).all():
        raise UnsupportedPicture("not all of its samples are finite numbers: save it with 8 bits")
    low, high = samples.min(), samples.max()
    whites: tuple[float, ...] = (1.0, 255.0) if samples.dtype.kind == "f" else _WHITES
    white = next((w for w in whites if w >= max(high, least)), None)
    if low < 0 or white is None:
        raise UnsupportedPicture(
            f"its samples are from {low:g} to {high:g}, where 0 to {whites[0]:g} or {whites[-1]:g} are read: "
            "save it with 8 bits"
        )
    if samples.dtype.kind == "f":
        return np.rint(samples.astype(np.float64) * (255 / white)).astype(np.uint8), white
    whole = int(white)
    return ((samples.astype(np.uint32) * 255 + whole // 2) // whole).astype(np.uint8), white


def _flattened(image: Image.Image, kind: str) -> np.ndarray:
    """(H, W, 3): a picture of 8-bit samples or a palette as RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    if image.mode == "La":
        image = image.convert("LA")
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3:]
    if kind == "bmp" and not alpha.any():  # the fourth byte was never meant to be alpha
        return rgba[..., :3].copy()
    return _on_white(rgba[..., :3], alpha)


def _on_white(colours: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 colours over white, by (H, W, 1) uint8 alpha.

    Raises:
        UnsupportedPicture: nothing of it is visible.
    """
    if not alpha.any():
        raise UnsupportedPicture("it is wholly transparent: save it without transparency")
    white = 255 - alpha.astype(np.uint16)
    if premultiplied:
        return np.minimum(colours + white, 255).astype(np.uint8)
    return ((colours.astype(np.uint16) * alpha + 255 * white + 127) // 255).astype(np.uint8)
