"""Types of arguments, for argparse: each parses a text or raises `argparse.ArgumentTypeError` with one line.

Every number has a range: `number` of a type is that of the numbers it reads. Where nothing else bounds one, what C code can
count does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Number:
    """A number in a range.

    Attributes:
        kind: int or float.
        least, most: the range, with both.
        above, below: the range is without `least`, without `most`, too.
        unit: as "of seconds", for people.
    """

    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False
    below: bool = False
    unit: str = ""

    @property
    def number(self) -> Number:
        """This one."""
        return self

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = float("nan")
        if not self.least <= value <= self.most or (self.above and value == self.least) or (
            self.below and value == self.most
        ):  # fmt: skip
            raise argparse.ArgumentTypeError(f"'{text[:60]}' is not {self}")
        return value

    def __str__(self) -> str:
        least, most = (str(x) if self.kind is int else f"{x:g}" for x in (self.least, self.most))
        what = " ".join(filter(None, ["a whole number" if self.kind is int else "a number", self.unit]))
        if not self.above:
            return f"{what} from {least} to {most}"
        return f"{what} above {least} and below {most}" if self.below else f"{what} above {least}, up to {most}"


def whole(least: int, most: int = _MOST) -> Number:
    """Whole numbers from `least` to `most`."""
    return Number(int, least, most)


def positive(most: float) -> Number:
    """Numbers above 0, up to `most`."""
    return Number(float, 0, most, above=True)


from_one, from_zero = whole(1), whole(0)
processes = whole(1, 4096)
seed = whole(0, 2**63 - 1)  # as the configuration's
nodes = gpus = whole(1, 65536)
share = Number(float, 0, 1)  # from 0 to 1
probability = Number(float, 0, 1, above=True, below=True)
seconds = Number(float, 0, 3600, above=True, unit="of seconds")


@dataclass(frozen=True)
class Several:
    """Numbers separated by commas.

    Attributes:
        number: each of them.
    """

    number: Number

    def __call__(self, text: str) -> list[float]:
        try:
            return [self.number(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"'{text[:60]}' does not read NUMBER,NUMBER,.. as in 1,4,12, each {self.number}"
            ) from None


@dataclass(frozen=True)
class Coordinates:
    """As many numbers as `names` (`X,Y`) has, separated by commas, in pixels of a picture."""

    names: str
    number: Number = Number(float, -1_000_000, 1_000_000)

    def __call__(self, text: str) -> tuple[float, ...]:
        try:
            read = tuple(self.number(x) for x in text.split(","))
        except argparse.ArgumentTypeError:
            read = ()
        if len(read) != len(self.names.split(",")):
            raise argparse.ArgumentTypeError(f"'{text[:60]}' does not read {self.names}, in pixels of the picture")
        return read


@dataclass(frozen=True)
class ShardCounts:
    """Shards a split, as `train=256,val=8`."""

    number: Number = whole(1, 99_999)

    def __call__(self, text: str) -> dict[str, float]:
        counts = {}
        for part in text.split(","):
            split, _, number = part.partition("=")
            if not split or not number:
                raise argparse.ArgumentTypeError(f"'{part[:60]}' does not read SPLIT=NUMBER, as in train=256,val=8")
            counts[split] = self.number(number)
        return counts


def names(text: str) -> list[str]:
    """Texts separated by commas."""
    return text.split(",")
