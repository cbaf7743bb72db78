"""Types of arguments, for argparse: each parses a text or raises `argparse.ArgumentTypeError` with one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def from_one(text: str) -> int:
    """A whole number from 1 on."""
    return _from(1, text)


def from_zero(text: str) -> int:
    """A whole number from 0 on."""
    return _from(0, text)


def _from(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least} on")
    return int(text)


def integers(text: str) -> list[int]:
    """Whole numbers from 0 on, separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' does not read NUMBER,NUMBER,.. as in 1,4,12")
    return [int(part) for part in parts]


def pixels(names: str) -> Callable[[str], tuple[float, ...]]:
    """Makes a type: as many finite numbers as `names` (`X,Y`) has, separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(x) for x in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != len(names.split(",")) or not all(map(math.isfinite, numbers)):
            raise argparse.ArgumentTypeError(f"'{text}' does not read {names}, in pixels of the picture")
        return numbers

    return parse


def seconds(text: str) -> float:
    """A number above 0, up to 3600."""
    if not text.replace(".", "", 1).isdecimal() or not 0 < float(text) <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 0 to 3600")
    return float(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")


def probability(text: str) -> float:
    """A number above 0 and below 1."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 and below 1")


def names(text: str) -> list[str]:
    """Texts separated by commas."""
    return text.split(",")


def shard_counts(text: str) -> dict[str, int]:
    """Shards a split, as `train=256,val=8`."""
    counts = {}
    for part in text.split(","):
        split, _, number = part.partition("=")
        if not split or not number.isdecimal():
            raise argparse.ArgumentTypeError(f"'{part}' does not read SPLIT=NUMBER, as in train=256,val=8")
        counts[split] = int(number)
    return counts
