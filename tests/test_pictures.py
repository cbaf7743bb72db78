"""Pictures of every kind: the same 8-bit RGB as an independent reading of them, or one line that says what is wrong."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dit_ds.data.exif import exif_orientation, png_chunks, tiff_directories, turn, without_orientation
from dit_ds.data.jpeg import MAX_PIXELS, UnsupportedPicture
from dit_ds.data.picture import decode_picture, load_picture, picture_kind, picture_size, read_picture
from dit_ds.errors import UserError

RNG = np.random.default_rng(0)
H, W = 21, 34
RGB = RNG.integers(0, 256, (H, W, 3)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (H, W)).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """A file of the pixels, by Pillow."""
    out = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(out, kind, **options)
    return out.getvalue()


def saved_by_opencv(samples: np.ndarray, ending: str) -> bytes:
    """A file of grey, RGB or RGBA samples of any type."""
    order = samples if samples.ndim == 2 else samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    return cv2.imencode(ending, order)[1].tobytes()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) in floats."""
    share = alpha[..., None] / 255.0
    return colours * share + 255 * (1 - share)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def samples_up_to(top: int, shape: tuple[int, ...] = (H, W), dtype: type = np.uint16) -> np.ndarray:
    """Random samples of which one is `top` and one is 0."""
    values = RNG.integers(0, top + 1, shape).astype(dtype)
    values.flat[0], values.flat[-1] = top, 0
    return values


def patched_tiff(data: bytes, tag: int, value: int) -> bytes:
    out = bytearray(data)
    for found in next(tiff_directories(data))[tag]:
        struct.pack_into(found.format, out, found.at, value)
    return bytes(out)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG", "PPM"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_pictures_of_8_bits_and_fewer_are_as_pillow_reads_them(kind, mode):
    if (kind, mode) in (("JPEG", "P"), ("PPM", "P")):
        return
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(RGB).convert(mode), kind, **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_picture(data), want)
    assert picture_size(data) == (H, W) and load_picture(data).white is None


@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_samples_of_16_bits_fill_the_range(top, ending, channels):
    """Also those with 10, 12 or 14 bits in 16, which would be almost black."""
    values = samples_up_to(top, (H, W) if channels == 1 else (H, W, channels))
    data = saved_by_opencv(values, ending)
    picture = load_picture(data)
    want = grey(values * (255.0 / top)) if channels == 1 else values[..., :3] * (255.0 / top)
    if channels == 4:
        want = on_white(want, values[..., 3] * (255.0 / top))
    assert np.abs(picture.pixels - want).max() <= (0.5 if channels < 4 else 1.6)
    assert picture.pixels.dtype == np.uint8 and picture.white == top


def test_other_samples_of_more_than_8_bits():
    for dtype in (np.int32, np.uint32, np.int16):
        values = samples_up_to(4095, dtype=dtype)
        np.testing.assert_allclose(
            decode_picture(saved_by_opencv(values, ".tif")), grey(values / 4095 * 255), atol=0.51
        )
    for dtype in (np.float32, np.float64):
        for top in (1, 255):
            for shape in ((H, W), (H, W, 3)):
                values = (RNG.random(shape) * top).astype(dtype)
                values.flat[0] = top
                want = values * (255 / top)
                data = saved_by_opencv(values, ".tif")
                np.testing.assert_allclose(decode_picture(data), grey(want) if len(shape) == 2 else want, atol=0.51)
                assert picture_size(data) == (H, W)
    values = samples_up_to(65535)
    by_pillow = saved(Image.fromarray(values), "PNG", transparency=int(values[3, 3]))
    want = np.where(values == values[3, 3], 255, values / 257)
    np.testing.assert_allclose(decode_picture(by_pillow), grey(want), atol=0.51)
    white_is_zero = patched_tiff(saved_by_opencv(values, ".tif"), 262, 0)
    np.testing.assert_allclose(decode_picture(white_is_zero), grey(255 - values / 257), atol=0.51)


def grey_and_alpha_png(values: np.ndarray, alpha: np.ndarray) -> bytes:
    """A PNG of 16-bit grey with alpha, written by hand."""
    rows = np.stack([values, alpha], -1).astype(">u2").reshape(len(values), -1).view(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    )


def test_what_is_transparent_is_shown_on_white():
    rgba = np.dstack([RGB, ALPHA])
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        np.testing.assert_allclose(decode_picture(saved(rgba, kind, **options)), on_white(RGB, ALPHA), atol=0.51)
    la = Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(ALPHA)])
    for kind in ("PNG", "TIFF"):
        np.testing.assert_allclose(decode_picture(saved(la, kind)), on_white(grey(RGB[..., 0]), ALPHA), atol=0.51)
    values, alpha = samples_up_to(4095), samples_up_to(65535)
    want = on_white(grey(values * (255 / 4095)), alpha / 257)
    np.testing.assert_allclose(decode_picture(grey_and_alpha_png(values, alpha)), want, atol=1.6)
    palette = Image.fromarray(RGB).convert("P")
    colours, indices = np.asarray(palette.convert("RGB")), np.asarray(palette)
    index = int(indices[2, 2])
    clear = np.where(indices == index, 0, 255)
    table = bytes(RNG.integers(0, 256, 256).astype(np.uint8))
    for kind in ("PNG", "GIF"):
        data = saved(palette, kind, transparency=index)
        np.testing.assert_allclose(decode_picture(data), on_white(colours, clear), atol=0.51)
    data = saved(palette, "PNG", transparency=table)
    np.testing.assert_allclose(
        decode_picture(data), on_white(colours, np.frombuffer(table, np.uint8)[indices]), atol=0.51
    )
    key = tuple(int(x) for x in RGB[4, 4])
    want = on_white(RGB, np.where((RGB == RGB[4, 4]).all(-1), 0, 255))
    np.testing.assert_allclose(decode_picture(saved(RGB, "PNG", transparency=key)), want, atol=0.51)
    wide = samples_up_to(65535, (H, W, 3))
    data = without_chunk(saved_by_opencv(wide, ".png"), b"none", (b"tRNS", struct.pack(">3H", *wide[5, 5])))
    want = on_white(wide / 257, np.where((wide == wide[5, 5]).all(-1), 0, 255))
    np.testing.assert_allclose(decode_picture(data), want, atol=1.1)


def without_chunk(png: bytes, kind: bytes, added: tuple[bytes, bytes] | None = None, crc: int | None = None) -> bytes:
    """A PNG without the chunks of a kind, and with another before its pixels."""
    out, done = png[:8], False
    for name, start, end in png_chunks(png):
        if name == b"IDAT" and added is not None and not done:
            body, done = added[0] + added[1], True
            out += struct.pack(">I", len(added[1])) + body + struct.pack(">I", zlib.crc32(body) if crc is None else crc)
        if name != kind:
            out += png[start - 8 : end + 4]
    return out


@pytest.mark.parametrize("adobe", ["CMYK", "YCCK"])
def test_cmyk_jpegs_are_taken_to_be_inverted(adobe):
    """Smooth colours, as YCCK has its own rounding. Pillow writes Adobe's inverted CMYK; YCCK is the same, transformed."""
    y, x = np.mgrid[0:64, 0:64].astype(np.uint8)
    picture = np.dstack([3 * x, 3 * y, 255 - 2 * x - y])
    cmyk = Image.fromarray(picture).convert("CMYK")
    data = saved(cmyk, "JPEG", quality=98, subsampling=0)
    if adobe == "YCCK":
        luma = np.asarray(Image.fromarray(np.asarray(cmyk)[..., :3]).convert("YCbCr"))  # libjpeg inverts once, too
        planes = [Image.fromarray(255 - p) for p in luma.transpose(2, 0, 1)]
        data = saved(Image.merge("CMYK", [*planes, cmyk.getchannel(3)]), "JPEG", quality=98, subsampling=0)
        at = data.index(b"Adobe")
        data = data[: at + 11] + b"\x02" + data[at + 12 :]  # the transform: YCCK
    assert np.abs(decode_picture(data).astype(int) - picture).max() < 12
    with pytest.raises(ValueError, match="truncated"):
        decode_picture(data[: len(data) // 2])


def test_alpha_of_tiffs_and_bitmaps():
    """Premultiplied, of no meaning, and of a BMP that has a fourth byte of zeros."""
    values = samples_up_to(65535, (H, W, 4))
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])  # as premultiplied colours are
    values[0, 0] = 65535
    entry = struct.pack("<HHII", 338, 3, 1, 1)  # ExtraSamples
    data = saved_by_opencv(values, ".tif")
    (at,) = struct.unpack_from("<I", data, 4)
    (n,) = struct.unpack_from("<H", data, at)
    entries = [data[at + 2 + 12 * k :][:12] for k in range(n)] + [entry]
    directory = (
        struct.pack("<H", n + 1) + b"".join(sorted(entries, key=lambda e: struct.unpack("<H", e[:2]))) + bytes(4)
    )
    premultiplied = data[:4] + struct.pack("<I", len(data)) + data[8:] + directory
    want = values[..., :3] / 257 + (255 - values[..., 3:] / 257)
    np.testing.assert_allclose(decode_picture(premultiplied), want, atol=1.1)
    unspecified = patched_tiff(premultiplied, 338, 0)
    np.testing.assert_allclose(decode_picture(unspecified), values[..., :3] / 257, atol=0.51)
    header = struct.pack("<IiiHHIIiiII", 108, W, -H, 1, 32, 3, 4 * H * W, 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    for fourth, want in ((0, RGB), (ALPHA, on_white(RGB, ALPHA))):
        pixels = np.dstack([RGB[..., ::-1], np.broadcast_to(fourth, (H, W))]).astype(np.uint8).tobytes()
        bitmap = struct.pack("<2sIII", b"BM", 122 + len(pixels), 0, 122) + header + pixels
        np.testing.assert_allclose(decode_picture(bitmap), want, atol=0.51)


def test_cmyk_tiff():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(decode_picture(saved(cmyk, "TIFF")), RGB)


def test_broken_text_and_profiles_are_no_reason_to_refuse_a_picture():
    png = saved(RGB, "PNG")
    for kind, body, crc in (
        (b"zTXt", b"Comment\0\0not deflated", None),
        (b"tEXt", b"Comment\0text", 12345),
        (b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(b"a" * 70_000_000, 9), None),
        (b"iCCP", b"p\0\0broken", None),
        (b"eXIf", b"II*\0broken", 5),
    ):
        np.testing.assert_array_equal(decode_picture(without_chunk(png, b"none", (kind, body), crc)), RGB)


def test_above_the_limit_of_pillow_is_one_line_and_below_it_no_warning(monkeypatch):
    wide = Image.new("L", (MAX_PIXELS // 8 + 1, 8))
    for kind in ("PNG", "BMP", "TIFF"):
        with pytest.raises(UnsupportedPicture, match="more than 178956970"):
            decode_picture(saved(wide, kind))
    jpeg = bytearray(saved(RGB, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(UnsupportedPicture, match="60000x60000 pixels, more than"):
        decode_picture(bytes(jpeg))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)  # from here on Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_picture(saved(RGB, "PNG")), RGB)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"<html>", "is none of a kind that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of a kind that is read"),
        (saved(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "it has 2 frames"),
        (saved(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "it has 2 frames"),
        (saved(RGB, "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "it has 2 frames"),
        (saved(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "it has 2 pages"),
        (saved(np.dstack([RGB, 0 * ALPHA]), "PNG"), "wholly transparent"),
        (saved_by_opencv(samples_up_to(70000, dtype=np.int32), ".tif"), "from 0 to 70000"),
        (saved_by_opencv(samples_up_to(9, dtype=np.int32) - 5, ".tif"), "samples are from -5 to 4"),
        (saved_by_opencv(samples_up_to(9, dtype=np.int8) - 5, ".tif"), "samples are from -5 to 4"),
        (saved_by_opencv(samples_up_to(9).astype(np.float32) * np.nan, ".tif"), "finite"),
        (saved_by_opencv(samples_up_to(300).astype(np.float32), ".tif"), "0 to 1 or 255 are read"),
        (patched_tiff(saved_by_opencv(samples_up_to(9, (H, W, 4)), ".tif"), 262, 5), "neither grey nor RGB"),
        (patched_tiff(saved_by_opencv(samples_up_to(9, (H, W, 3)), ".tif"), 284, 2), "separate planes"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_line(data, says, tmp_path):
    with pytest.raises(ValueError, match=says) as raised:
        decode_picture(data)
    assert "\n" not in str(raised.value)
    (tmp_path / "picture").write_bytes(data)
    with pytest.raises(UserError, match=f"cannot read the picture .*{says}"):
        read_picture(tmp_path / "picture")


def test_a_smaller_copy_in_a_tiff_is_no_page():
    copy = Image.fromarray(RGB[::2, ::2])
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    data = saved(RGB, "TIFF", save_all=True, append_images=[copy])
    if [254 in d for d in tiff_directories(data)] == [False, True]:
        np.testing.assert_array_equal(decode_picture(data), RGB)


FILES = {
    "png": saved(RGB, "PNG"), "webp": saved(RGB, "WEBP"), "bmp": saved(RGB, "BMP"), "tif": saved(RGB, "TIFF"),
    "lzw": saved(RGB, "TIFF", compression="tiff_lzw"), "jpg": saved(RGB, "JPEG"), "gif": saved(RGB, "GIF"),
    "cmyk": saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "png16": saved_by_opencv(samples_up_to(9999), ".png"),
    "rgb16": saved_by_opencv(samples_up_to(9999, (H, W, 3)), ".png"),
    "tif16": saved_by_opencv(samples_up_to(9999, (H, W, 3)), ".tif"),
    "exif": saved(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_picture_is_never_half_a_picture(name):
    data = FILES[name]
    whole = decode_picture(data)
    for end in sorted({0, 1, 3, 8, 20, len(data) - 1, len(data) - 3, *range(30, len(data), max(1, len(data) // 37))}):
        try:
            pixels = decode_picture(data[:end])
        except ValueError as e:
            assert str(e) and "\n" not in str(e)
        else:  # a few bytes behind the last pixel
            np.testing.assert_array_equal(pixels, whole)
            assert end > len(data) - 13


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_bytes_at_random_raise_nothing_else(name, data):
    """Nor do they in the metadata."""
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1) | st.integers(0, min(160, len(damaged) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged)
    assert exif_orientation(damaged) in range(1, 9) and len(without_orientation(damaged)) == len(damaged)
    assert exif_orientation(without_orientation(damaged)) == 1
    for read in (decode_picture, picture_size):
        try:
            read(damaged)
        except ValueError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_read_applied_and_taken_away(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    data = saved(RGB, kind, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert exif_orientation(data) == orientation and picture_size(data) == (H, W)
    stored = decode_picture(data)
    assert stored.shape == (H, W, 3)
    np.testing.assert_array_equal(turn(stored, orientation), shown)
    (tmp_path / "picture").write_bytes(data)
    np.testing.assert_array_equal(read_picture(tmp_path / "picture"), shown)
    neutral = without_orientation(data)
    opened = Image.open(io.BytesIO(neutral))
    assert opened.getexif().get(0x0112, 1) == 1 and opened.getexif()[0x010F] == "maker"
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(opened).convert("RGB")), stored)
    assert exif_orientation(neutral) == 1 and picture_kind(neutral) == picture_kind(data)
    assert (neutral == data) == (orientation == 1)


def test_an_avif_that_is_to_be_turned_is_refused():
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        try:
            data = saved(RGB, "AVIF", exif=exif, quality=100)
        except (OSError, KeyError):
            pytest.skip("this Pillow has no AVIF")
        if orientation == 1:
            assert decode_picture(data).shape == RGB.shape
        else:
            with pytest.raises(UnsupportedPicture, match="to be turned"):
                decode_picture(data)


def test_orientations_that_are_none():
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        assert exif_orientation(saved(RGB, "JPEG", exif=exif)) == 1
