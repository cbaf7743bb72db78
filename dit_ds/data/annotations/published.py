"""Published numbers of images, refs and sentences, and whether a source is one of the published datasets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

# dataset, splitBy, split, then images, refs and sentences. ~ marks a count that no source confirms: a difference is a
# warning, not an error. - is unknown.
_TABLE = """
refcoco  unc    train 16994  42404  120624
refcoco  unc    val    1500   3811   10834
refcoco  unc    testA   750   1975    5657
refcoco  unc    testB   750   1810    5095
refcoco  google train 19213  40000       -
refcoco  google val    4559   5000       -
refcoco  google test   4527   5000       -
refcoco  google total     -      - ~142210
refcoco+ unc    train 16992  42278 ~120191
refcoco+ unc    val    1500   3805  ~10758
refcoco+ unc    testA   750   1975   ~5726
refcoco+ unc    testB   750   1798   ~4889
refcoco+ unc    total     -      -  141564
refcocog umd    train 21899  42226  ~80512
refcocog umd    val    1300   2573   ~4896
refcocog umd    test   2600   5023   ~9602
refcocog google train 24698  44822  ~85474
refcocog google val    4650   5000   ~9536
"""
_GREFCOCO_SENTENCES = 259_859  # of the released file, whose splits nobody counted


@dataclass(frozen=True)
class Figure:
    """A published count, and whether a source confirms it."""

    value: int
    sure: bool


def _parse(table: str) -> dict[tuple[str, str], dict[str, dict[str, Figure]]]:
    official: dict[tuple[str, str], dict[str, dict[str, Figure]]] = {}
    for line in table.split("\n")[1:-1]:
        dataset, split_by, split, *figures = line.split()
        official.setdefault((dataset, split_by), {})[split] = {
            k: Figure(int(f.lstrip("~")), f[0] != "~")
            for k, f in zip(("images", "refs", "sentences"), figures)
            if f != "-"
        }
    return official


OFFICIAL = _parse(_TABLE)


def is_published(dataset: str, split_by: str, refs: list[dict[str, Any]]) -> bool:
    """Whether these refs are those of a published dataset, or all of some of its splits, as their numbers tell.

    Published files are read as published code reads them, faults included: nobody can mend them.

    Args:
        refs: each with its `split` and `sentences`.
    """
    if (dataset, split_by) == ("grefcoco", "unc"):
        return sum(len(r["sentences"]) for r in refs) == _GREFCOCO_SENTENCES
    official = OFFICIAL.get((dataset, split_by), {})
    return bool(refs) and all(
        split in official and "refs" in official[split] and official[split]["refs"].value == n
        for split, n in Counter(str(r["split"]) for r in refs).items()
    )
