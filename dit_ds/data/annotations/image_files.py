"""Where an image's file may lie: COCO's pictures of 2014 have other names in COCO 2017."""

from __future__ import annotations

import re
from pathlib import Path

_NAME_2014, _NAME_2017 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)"), re.compile(r"\d{12}\.jpg")


def candidates(folder: Path, name: str) -> list[Path]:
    """The paths to look for an image's file at, the one that the annotation names first.

    Args:
        folder: that holds the files.
        name: the annotation's file name.
    """
    path = folder / name
    others: list[str] = []
    if found := _NAME_2014.fullmatch(path.name):
        others = [found[1]]
    elif _NAME_2017.fullmatch(path.name):
        others = [f"COCO_{part}2014_{path.name}" for part in ("train", "val")]
    return [path, *(path.with_name(other) for other in others)]
