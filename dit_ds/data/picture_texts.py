"""Pictures in a folder or a list, and the texts that a file has for them: what `dit-ds predict` is asked for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_ds.data.expressions import normalise_expression
from dit_ds.errors import UserError
from dit_ds.files import parse_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2", ".ppm", ".pgm")


class PictureText(NamedTuple):
    """An expression for a picture.

    Attributes:
        text: as typed; it has a word.
        sent_id: the number that the file gives it, if any.
    """

    text: str
    sent_id: int | None = None


@dataclass(frozen=True)
class PictureTexts:
    """Pictures, each with its expressions, and what was left out.

    Attributes:
        names: of the pictures: their paths below the folder, or as the list has them; in the order of the texts.
        paths: of the same.
        texts: of each at least one.
        counts: `blank_lines` and `repeated` lines, and `without_text` pictures, as far as there are any.
    """

    names: list[str]
    paths: list[Path]
    texts: list[list[PictureText]]
    counts: dict[str, int]

    def digest(self) -> str:
        """SHA-256 over names and texts."""
        return hashlib.sha256(json.dumps([self.names, self.texts]).encode()).hexdigest()


def read_picture_texts(images: str, texts: str | None, text: str | None) -> PictureTexts:
    """Read what is to be segmented.

    Args:
        images: a folder, whose pictures are found at any depth; or a text file with a picture's path a line, from the
            file's own folder.
        texts: a JSON Lines file of `{"image": .., "text": .., "sent_id": ..}`, or a CSV file with such a header; images by
            their paths below the folder, or as the list has them. `sent_id`, a whole number, may be left out everywhere.
        text: or one text for every picture.
    Raises:
        UserError: there are no pictures or texts, or a line is wrong.
    """
    counts: Counter[str] = Counter()
    found = _pictures(Path(images), counts)
    if texts is None:
        if text is None or not normalise_expression(text):
            raise UserError("nothing says what to segment: give --texts FILE, or words for every picture with --text")
        return PictureTexts(list(found), list(found.values()), [[PictureText(text)] for _ in found], dict(counts))
    chosen: dict[str, list[PictureText]] = {}
    for where, line in _lines(Path(texts), counts):
        image, wanted = _entry(where, line)
        if image not in found:
            raise UserError(f"{where} names the picture {image[:200]!r}, which is not in {images}: name what is there")
        chosen.setdefault(image, []).append(wanted)
    if not chosen:
        raise UserError(f"no text in {texts}: give a line a text")
    _refuse_repeated_ids(texts, [w.sent_id for line in chosen.values() for w in line])
    for name, given in chosen.items():  # the same words for the same picture would be the same answer
        once = {(w.sent_id, normalise_expression(w.text)): w for w in reversed(given)}
        counts["repeated"] += len(given) - len(once)
        chosen[name] = list(once.values())[::-1]
    counts["without_text"] = len(found) - len(chosen)
    return PictureTexts(list(chosen), [found[n] for n in chosen], list(chosen.values()), dict(+counts))


def _pictures(images: Path, counts: Counter[str]) -> dict[str, Path]:
    """Paths by name, in order."""
    if images.is_dir():
        files = sorted(p for p in images.rglob("*") if p.is_file())
        found = {p.relative_to(images).as_posix(): p for p in files if p.suffix.lower() in SUFFIXES}
        if not found:
            raise UserError(f"no picture in {images}, of {len(files)} files: theirs end in {', '.join(SUFFIXES)}")
        return found
    names = []
    for name in _text_of(images, "list of pictures").splitlines():
        if name.strip():
            names.append(name.strip())
        else:
            counts["blank_lines"] += 1
    found = {name: images.parent / name for name in names}
    missing = [n for n, p in found.items() if not p.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} pictures in the list {images} are not there: {missing[0][:200]!r}"
        )
    if not found:
        raise UserError(f"the list of pictures {images} is empty: give it a path a line")
    counts["repeated"] += len(names) - len(found)
    return found


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read the {what} {path} ({e.strerror}): see that it is there") from None
    except ValueError:
        raise UserError(f"the {what} {path} is not text in UTF-8: give a text file, or a folder") from None


def _lines(path: Path, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and what it holds."""
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv"):
        raise UserError(f"{path} is neither JSON Lines nor CSV: let its name end in .jsonl or .csv")
    text = _text_of(path, "file of texts")
    if ending == ".csv":
        yield from _csv_lines(path, text, counts)
        return
    for number, line in enumerate(text.split("\n"), 1):  # not at other separators, which JSON may hold
        if not line.strip():
            counts["blank_lines"] += line != "" or number <= text.count("\n")
            continue
        try:
            yield f"line {number} of {path}", parse_json(line)
        except ValueError as e:
            raise UserError(f"line {number} of {path} is not JSON ({e})") from None


def _csv_lines(path: Path, text: str, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not {"image", "text"} <= set(header) or len(set(header)) < len(header):
            raise UserError(f"{path} begins with {','.join(header)[:100]!r}: let it begin with image,text")
        for row in reader:
            if not any(x.strip() for x in row):
                counts["blank_lines"] += 1
                continue
            where = f"line {reader.line_num} of {path}"
            if len(row) != len(header):
                raise UserError(
                    f"{where} has {len(row)} fields, its header {len(header)}: quote texts that have commas"
                )
            entry: dict[str, Any] = dict(zip(header, row))
            if "sent_id" in entry:
                entry["sent_id"] = int(entry["sent_id"]) if entry["sent_id"].strip().isdecimal() else entry["sent_id"]
            yield where, entry
    except csv.Error as e:
        raise UserError(f"line {reader.line_num} of {path} is not CSV ({e})") from None


def _entry(where: str, line: Any) -> tuple[str, PictureText]:
    """A line's picture and text."""
    if not isinstance(line, dict):
        raise UserError(f'{where} is no object: let it read {{"image": "photo.jpg", "text": "the left dog"}}')
    for key in ("image", "text"):
        if not isinstance(line.get(key), str) or not line[key].strip():
            raise UserError(f"{where} has no {key}: let each line name a picture and a text")
    if not normalise_expression(line["text"]):
        raise UserError(f"{where} has a text without a word, {line['text'][:50]!r}: say what to segment")
    sent_id = line.get("sent_id")
    if sent_id is not None and type(sent_id) is not int:
        raise UserError(f"{where} has the sent_id {sent_id!r}, which is no whole number")
    return line["image"], PictureText(line["text"], sent_id)


def _refuse_repeated_ids(path: str, ids: list[int | None]) -> None:
    given = [i for i in ids if i is not None]
    if given and len(given) < len(ids):
        raise UserError(
            f"{len(ids) - len(given)} of {len(ids)} texts in {path} have no sent_id: give it to all, or none"
        )
    if len(set(given)) < len(given):
        twice = next(i for i, n in Counter(given).items() if n > 1)
        raise UserError(f"the sent_id {twice} stands more than once in {path}: give each text its own")
