"""Checks of a sharded dataset: its manifest, each shard, and properties of all shards together."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_ds.data.parallel import forked_map
from dit_ds.data.sample_set.write import DESCRIPTION
from dit_ds.data.shards import published_counts as official
from dit_ds.data.shards.manifest import COUNTS, load_manifest, manifest_errors, size_errors
from dit_ds.data.shards.storage import local
from dit_ds.data.shards.verify_shard import REPLACE, Id, ShardReport, check_shard

_MAX_NAMED = 5  # masks that one line names


def verify_shards(folder: str | Path, processes: int | None = None) -> dict[str, Any]:
    """Check a sharded dataset; `data_shards/README.md` lists the checks.

    Args:
        folder: as data_shards/refcoco/unc.
        processes: that check shards, by default one a core.
    Returns:
        `ok`, `errors` and `warnings` (a line each) and `counts` by split.
    Raises:
        UserError: the manifest is missing or damaged, so that nothing can be checked.
    """
    folder = local(folder)
    manifest = load_manifest(folder)
    splits = manifest["splits"]
    errors = [f"{e}: remove its manifest and shard the dataset again" for e in manifest_errors(folder, manifest)]
    wrong_size = size_errors(folder, manifest)
    errors += [f"{e}: {REPLACE}" for e in wrong_size]
    skipped = {e.split(".tar ", 1)[0] for e in wrong_size}
    jobs = [(s, e) for s in splits for e in splits[s]["shards"] if str(folder / e["name"])[:-4] not in skipped]
    reports = list(forked_map(functools.partial(check_shard, folder, manifest), jobs, processes, "verify"))
    errors += [e for r in reports for e in r.errors]

    by_split = {s: [r for r in reports if r.split == s] for s in splits}
    errors += _stray_tars(folder, manifest)
    warnings: list[str] = []
    for split, found in by_split.items():
        errors += _repeated(f"split {split}: ref", (x for r in found for x in r.refs))
        errors += _repeated(f"split {split}: sentence", (x for r in found for x in r.sentences))
        seen, expected = sum(r.counts["no_target"] for r in found), splits[split].get("no_target")
        if expected not in (None, seen) and sum(r.counts["samples"] for r in found) == splits[split]["images"]:
            errors.append(
                f"split {split} has {seen} refs without target, the manifest says {expected}: remove its manifest and shard the dataset again"
            )
        warnings += _area_warnings(split, found, manifest.get("mask_policy", "union"))
    shared = _shared_images(manifest, errors, warnings)
    if manifest["description"] != DESCRIPTION:  # the sample set has refcoco unc's name, not its counts
        more_errors, more_warnings = official.compare(manifest["dataset"], manifest["split_by"], splits)
        errors += more_errors
        warnings += more_warnings
    counts = {s: _counts(splits[s], found) | shared.get(s, {}) for s, found in by_split.items()}
    return {"ok": not errors, "errors": errors, "warnings": warnings, "counts": counts}


def format_report(found: dict[str, Any]) -> list[str]:
    """The result of `verify_shards` as text lines."""
    rows = [f"{s}: " + ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in c.items() if isinstance(n, int) and n)
            for s, c in found["counts"].items()]  # fmt: skip
    problems = [f"{kind}: {line}" for kind in ("note", "warning", "error") for line in found.get(f"{kind}s", ())]
    return [*rows, *problems, "ok" if found["ok"] else f"{len(found['errors'])} errors"]


def _counts(split: dict[str, Any], reports: list[ShardReport]) -> dict[str, Any]:
    """Counts of a split, from the manifest and from its samples."""
    seen = sum((r.counts for r in reports), collections.Counter())
    counts = {k: split[k] for k in COUNTS} | {"shards": len(split["shards"])}
    counts |= {k: seen[k] for k in ("annotations", "no_target", "several_targets")}
    counts |= {"area_differs": sum(len(r.areas) for r in reports), "overlapping": split.get("overlapping", 0)}
    return counts | {f"dropped_{k}": n for k, n in split.get("dropped", {}).items()}


def _repeated(what: str, ids: Iterable[tuple[Id, str]]) -> list[str]:
    """A line for each id that is not unique."""
    first: dict[Id, str] = {}
    errors = []
    for (dataset, number), key in ids:
        if (dataset, number) in first:
            where = f"in {first[dataset, number]} and in {key}"
            errors.append(
                f"{what} {number} of {dataset} is there more than once, {where}: remove its manifest and shard the dataset again"
            )
        first.setdefault((dataset, number), key)
    return errors


def _area_warnings(split: str, reports: list[ShardReport], mask_policy: str) -> list[str]:
    """A line on the masks whose area is not their annotation's, the worst ones named."""
    off = sorted((x for r in reports for x in r.areas), reverse=True)
    if not off:
        return []
    total = sum(r.counts["annotations"] for r in reports)
    why = "overlapping polygons, or parts that were lost" + (
        "; this set left overlaps out" if mask_policy == "legacy_overlap" else ""
    )
    worst = ", ".join(line for _, line in off[:_MAX_NAMED])
    return [
        f"split {split}: {len(off)} of {total} masks differ from `area` by more than their outline ({why}): {worst}"
    ]


def _stray_tars(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """A line for each tar that the manifest doesn't list."""
    known = {e["name"] for s in manifest["splits"].values() for e in s["shards"]}
    strays = sorted(p.name for p in folder.glob("*-of-*.tar") if p.name not in known)
    return [f"{folder / s} is none of the manifest's shards: remove it, or shard the dataset again" for s in strays]


def _shared_images(manifest: dict[str, Any], errors: list[str], warnings: list[str]) -> dict[str, dict[str, Any]]:
    """By split, the number of images in common with each other split; adds to `errors` and `warnings`.

    `shared_images` counts those with the same id, `shared_pictures` those with the same bytes (their length and CRC-32)
    under different ids.
    """
    samples = {name: [x for e in s["shards"] for x in e["samples"]] for name, s in manifest["splits"].items()}
    ids = {name: {x[0] for x in of_split} for name, of_split in samples.items()}
    contents = {name: {(x[2], x[3]): x[0] for x in of_split} for name, of_split in samples.items()}
    shared: dict[str, dict[str, Any]] = {}

    def found(what: str, n: int, a: str, b: str, line: str) -> None:
        for one, other in ((a, b), (b, a)):
            shared.setdefault(one, {}).setdefault(what, {})[other] = n
        severity = official.shared_images_severity(manifest["dataset"], manifest["split_by"], (a, b))
        if severity == "error" and what == "shared_pictures" and official.has_published_refs(manifest):
            severity = "warning"  # nobody can mend them
        if severity != "design":
            (errors if severity == "error" else warnings).append(line)

    for a, b in itertools.combinations(samples, 2):
        if both := ids[a] & ids[b]:
            line = f"splits {a} and {b} share {len(both)} images, as {min(both):012d}: give an image one split and shard again"
            found("shared_images", len(both), a, b, line)
        same = [
            (x[0], contents[b][x[2], x[3]]) for x in samples[a] if (x[2], x[3]) in contents[b] and x[0] not in ids[b]
        ]
        same = same or [
            (contents[a][x[2], x[3]], x[0]) for x in samples[b] if (x[2], x[3]) in contents[a] and x[0] not in ids[a]
        ]
        if same:
            one, other = min(same)
            line = (
                f"splits {a} and {b} share {len(same)} pictures under different ids, as {one:012d} and {other:012d}: "
                "give a picture one id and one split and shard again"
            )
            found("shared_pictures", len(same), a, b, line)
    return shared
