"""From an image file to the picture of a WebDataset sample: found, decoded, its EXIF orientation decided, converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_ds.data.annotations.image_files import candidates
from dit_ds.data.annotations.refer import ImageRecord
from dit_ds.data.exif import TRANSPOSED, exif_orientation, turn, without_orientation
from dit_ds.data.jpeg import UnsupportedPicture
from dit_ds.data.masks import UnusableRecord
from dit_ds.data.picture import Picture, encode_jpeg, encode_png, load_picture, picture_kind
from dit_ds.data.shards.manifest import KINDS

# which published code excludes by name; the first is a GIF
_KNOWN_BAD = {"saiapr_tc-12": ("19579.jpg", "17975.jpg", "19575.jpg")}
# whose annotations are of the pixels as stored
_AS_STORED = ("coco/train2014",)
_MAX_NAMED = 5  # pictures that one line names


@dataclass(frozen=True)
class ImageRules:
    """How image files become pictures of samples.

    Attributes:
        exif: turn or ignore: what the annotations mean, of pictures with an EXIF orientation whose width and height
            don't tell; None if that is not known.
        convert: jpeg, to encode pictures of other kinds as JPEG; None keeps PNG, WebP, TIFF and BMP.
    """

    exif: str | None = None
    convert: str | None = None


@dataclass(frozen=True)
class SampleImage:
    """A picture as it goes into a shard; its pixels are those that the annotations mean, without an EXIF orientation.

    Attributes:
        data: the file.
        kind: its extension, one of `KINDS`.
        orientation: EXIF's, of the file that was read.
        turned: by it.
        decided: by size, option, or published (the set's annotations are known to mean the pixels as stored); None:
            that is not known, and the set can't be used without `--exif`.
        converted: from this kind, if it was.
        white: as of `Picture`.
    """

    data: bytes
    kind: str
    orientation: int = 1
    turned: bool = False
    decided: str | None = "size"
    converted: str | None = None
    white: float | None = None


def load_image(images: Path, image_set: str, record: ImageRecord, rules: ImageRules) -> SampleImage:
    """The picture of a record, once it was decoded and has the size that its annotation says.

    All of it is decoded, which takes a millisecond or two, because a truncated file has an intact header. A JPEG, PNG,
    WebP, TIFF or BMP keeps its bytes, but for an EXIF orientation that is set to 1. One that is to be turned is encoded
    anew: a JPEG as JPEG, others as PNG.

    Args:
        image_set: as of `ReferTree`.
    Raises:
        UnusableRecord: the file is missing, damaged, of a kind that is not read, or of another size.
    """
    path, data = _read(images, image_set, record.image["file_name"])
    kind = picture_kind(data)
    if kind and kind not in KINDS and rules.convert is None:
        raise UnusableRecord(f"image {path} is {kind.upper()}, which shards don't hold: take it in with --convert jpeg")
    try:
        picture = load_picture(data)
    except UnsupportedPicture as e:
        raise UnusableRecord(f"image {path} can't be used: {e}") from None
    except ValueError as e:
        raise UnusableRecord(f"image {path} is damaged ({e})") from None
    file = _File(path, data, kind, picture, exif_orientation(data))
    turned, decided = _decide(file, record.image, image_set, rules)
    return _stored(file, turned, decided, rules)


class _File(NamedTuple):
    """An image file that was read and decoded."""

    path: Path
    data: bytes
    kind: str
    picture: Picture
    orientation: int


def _read(images: Path, image_set: str, name: str) -> tuple[Path, bytes]:
    """The file, also where the folder has COCO's pictures of 2014 and the annotation the names of 2017, or the reverse.

    Raises:
        UnusableRecord: there is none, it can't be read, or it is known to be bad.
    """
    path = images / name
    if name in _KNOWN_BAD.get(image_set, ()):
        raise UnusableRecord(f"image {path} is one of {image_set}'s three that are known to be bad")
    for candidate in candidates(images, name):
        try:
            return candidate, candidate.read_bytes()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as e:  # a ValueError for a character that no name has
            raise UnusableRecord(f"image {candidate}: {getattr(e, 'strerror', None) or e}") from None
    raise UnusableRecord(f"no image {path}")


def _decide(file: _File, annotated: dict[str, Any], image_set: str, rules: ImageRules) -> tuple[bool, str | None]:
    """Whether the picture's annotations are of the turned picture, and what says so: see `SampleImage`.

    Raises:
        UnusableRecord: its annotation has another size than the picture, turned or not.
    """
    size, expected = file.picture.pixels.shape[:2], (annotated["height"], annotated["width"])
    swapped = size[::-1] if file.orientation in TRANSPOSED else size
    if expected not in (size, swapped):
        says = f"its annotation says {expected[1]}x{expected[0]}"
        also = f", or {swapped[1]}x{swapped[0]} turned by its EXIF orientation" if swapped != size else ""
        raise UnusableRecord(f"image {file.path} is {size[1]}x{size[0]}{also}, {says}")
    if file.orientation == 1:
        return False, "size"
    if swapped != size:
        return expected == swapped, "size"
    if rules.exif is not None:
        return rules.exif == "turn", "option"
    return False, "published" if image_set in _AS_STORED else None


def _stored(file: _File, turned: bool, decided: str | None, rules: ImageRules) -> SampleImage:
    """The picture's file for the shard."""
    data, kind, white = file.data, file.kind, file.picture.white
    converted = None
    if turned or kind not in KINDS or (kind != "jpg" and rules.convert == "jpeg"):
        pixels = turn(file.picture.pixels, file.orientation) if turned else file.picture.pixels
        to_jpeg = kind == "jpg" or rules.convert == "jpeg"
        data, kind = (encode_jpeg(pixels), "jpg") if to_jpeg else (encode_png(pixels), "png")
        converted = file.kind if kind != file.kind else None
    elif file.orientation != 1:
        data = without_orientation(data)
    return SampleImage(data, kind, file.orientation, turned=turned, decided=decided, converted=converted, white=white)


class PictureNotes:
    """What was done to a split's pictures, beside taking in JPEGs as they are: the manifest's `pictures`.

    Attributes:
        counts: `kinds` (in the shards, but for jpg), `converted` (from which kind) and `white` (the sample value that
            became white, of pictures with more than 8 bits a sample): numbers of pictures; and the file names with
            their EXIF orientations: `turned`, `ignored`, and `undecided`.
        by_option: whether `--exif` decided any.
        undecided: file names and orientations for which it must.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self.by_option = False
        self.undecided: dict[str, int] = {}

    def add(self, name: str, image: SampleImage) -> None:
        """Count one picture that was written, by its file name."""
        if image.kind != "jpg":
            self._count("kinds", image.kind)
        if image.converted is not None:
            self._count("converted", image.converted)
        if image.white is not None:
            self._count("white", f"{image.white:g}")
        if image.orientation == 1:
            return
        self.by_option |= image.decided == "option"
        if image.decided is None:
            self.undecided[name] = image.orientation
        else:
            self.counts.setdefault("turned" if image.turned else "ignored", {})[name] = image.orientation

    def _count(self, what: str, key: str) -> None:
        of = self.counts.setdefault(what, {})
        of[key] = of.get(key, 0) + 1


def named(orientations: dict[str, int]) -> str:
    """The first pictures of a dict of file names and EXIF orientations, as text."""
    first = ", ".join(f"{name} ({n})" for name, n in sorted(orientations.items())[:_MAX_NAMED])
    more = len(orientations) - _MAX_NAMED
    return first + (f" and {more} more" if more > 0 else "")


def picture_lines(manifest: dict[str, Any]) -> list[str]:
    """What was done to the pictures of each split, where it isn't plain, as lines for people."""
    lines = []
    for split, counts in manifest["splits"].items():
        notes = counts.get("pictures", {})
        for what, how in (("turned", "turned by"), ("ignored", "taken as stored, in spite of")):
            if what in notes:
                some = f"{len(notes[what])} pictures" if len(notes[what]) > 1 else "1 picture"
                lines.append(f"split {split}: {some} {how} the EXIF orientation: {named(notes[what])}")
        if "white" in notes:
            taken = ", ".join(f"{n} with {white}" for white, n in sorted(notes["white"].items()))
            lines.append(f"split {split}: more than 8 bits a sample; taken as white, by the largest sample: {taken}")
    return lines


def merge_notes(into: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> None:
    """Add one shard's `PictureNotes.counts` to those of its split."""
    for what, entries in more.items():
        target = into.setdefault(what, {})
        for key, n in entries.items():
            target[key] = n if what in ("turned", "ignored") else target.get(key, 0) + n
