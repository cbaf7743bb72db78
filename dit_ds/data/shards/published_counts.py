"""Comparison of a sharded dataset with the published counts."""

from __future__ import annotations

from typing import Any

from dit_ds.data.annotations.published import OFFICIAL, Figure
from dit_ds.data.shards.manifest import COUNTS

TOTAL = "total"


def compare(dataset: str, split_by: str, splits: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a dataset's counts with the published ones.

    Missing items that `data shard --skip-bad` left out, as counted in the manifest, are a warning only.

    Args:
        dataset, split_by: REFER's names, as refcoco and unc.
        splits: the manifest's, each with `images`, `refs`, `sentences` and `dropped`.
    Returns:
        Errors and warnings, a line each.
    """
    official = OFFICIAL.get((dataset, split_by), {})
    errors: list[str] = []
    warnings: list[str] = []
    for name, figures in official.items():
        if name != TOTAL and name not in splits:
            errors.append(f"there is no split {name}, which {dataset} {split_by} has: shard the official files")
            continue
        parts = list(splits.values()) if name == TOTAL else [splits[name]]
        have = {k: sum(p[k] for p in parts) for k in COUNTS}
        dropped = {k: sum(p.get("dropped", {}).get(k, 0) for p in parts) for k in COUNTS}
        for what, figure in figures.items():
            if have[what] != figure.value:
                is_error, line = _describe_difference(name, what, have[what], figure, dropped)
                (errors if is_error else warnings).append(line)
    if official:
        warnings += [f"split {s} is none of {dataset} {split_by}'s" for s in splits if s not in official]
    return errors, warnings


def _describe_difference(name: str, what: str, have: int, figure: Figure, dropped: dict[str, int]) -> tuple[bool, str]:
    """Whether a count's difference to the published one is an error, and the line that says so."""
    missing = figure.value - have
    line = f"{name} has {have} {what}, published are {figure.value}"
    # refs of a dropped image and sentences of a dropped ref were not counted one by one
    larger = any(dropped[k] for k in COUNTS[: COUNTS.index(what)])
    if missing > 0 and (missing == dropped[what] or (larger and missing > dropped[what])):
        left_out = ", ".join(f"{n} {k}" for k, n in dropped.items() if n)
        return False, f"{line}: --skip-bad left out {left_out}"
    if figure.sure:
        return True, f"{line}: these are not the official files, or not all of them; fetch them and shard again"
    return False, f"{line} (not sure): compare with the files' source"


def shared_images_severity(dataset: str, split_by: str, splits: tuple[str, str]) -> str:
    """What it means that two splits share images: `error`, `warning`, or `design`.

    Google's splits were made by object, not by image. refclef's three test splits were made by the kind of object, and
    no source says that they are disjoint.
    """
    if split_by == "google" and (dataset, split_by) in OFFICIAL:
        return "design"
    return "warning" if dataset == "refclef" and "train" not in splits else "error"


def shares_by_design(manifest: dict[str, Any]) -> bool:
    """Whether the dataset's train and evaluation splits were made to share images."""
    return shared_images_severity(manifest["dataset"], manifest["split_by"], ("train", "val")) == "design"


def has_published_refs(manifest: dict[str, Any]) -> bool:
    """Whether a sharded dataset is a published one, as the number of refs of each split tells."""
    official = OFFICIAL.get((manifest["dataset"], manifest["split_by"]), {})
    refs = {name: split["refs"] for name, split in manifest["splits"].items()}
    return refs == {s: figures["refs"].value for s, figures in official.items() if "refs" in figures}
