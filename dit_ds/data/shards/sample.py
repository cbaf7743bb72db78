"""From one record to the JSON member of its WebDataset sample: masks, refs and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dit_ds.data.annotations.refer import ImageRecord, ReferTree, clean_sentence
from dit_ds.data.masks import UnusableRecord, merge_parts
from dit_ds.data.shards.image import ImageRules
from dit_ds.data.shards.manifest import COUNTS, SCHEMA


@dataclass(frozen=True)
class Rules:
    """How records become samples.

    Attributes:
        skip_bad: leave out and count unusable refs and images, instead of raising.
        legacy_overlap, with_visibility, published: as for `merge_parts`.
        image: for the pictures.
    """

    skip_bad: bool = False
    legacy_overlap: bool = False
    with_visibility: bool = False
    published: bool = False
    image: ImageRules = field(default_factory=ImageRules)

    @property
    def mask_policy(self) -> str:
        """The manifest's `mask_policy`."""
        return "legacy_overlap" if self.legacy_overlap else "union"


@dataclass
class LeftOut:
    """What `--skip-bad` left out: counts, and a line that names each."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    lines: list[str] = field(default_factory=list)

    def add(self, what: str, why: UnusableRecord) -> None:
        """Count one more of `images`, `refs` or `sentences`."""
        self.counts[what] += 1
        self.lines.append(str(why))


def sample(
    tree: ReferTree, split: str, record: ImageRecord, rules: Rules, left_out: LeftOut
) -> tuple[dict[str, Any], int]:
    """The sample's JSON member, and the number of its refs with overlapping polygons.

    Args:
        left_out: gets skipped refs and sentences.
    Raises:
        UnusableRecord: no ref is usable; without `rules.skip_bad`, one is not.
    """
    height, width = int(record.image["height"]), int(record.image["width"])  # some files have 640.0
    masks: dict[Any, tuple[dict[str, Any], bool]] = {}  # by ann_id: several refs can have one target
    refs = []
    for ref in record.refs:
        try:
            for a in ref["ann_ids"]:
                if a not in masks:
                    masks[a] = _mask(record, a, height, width, rules)
            if not ref["ann_ids"] and not ref["no_target"]:
                raise UnusableRecord("all its annotations are crowds")
            sentences = _sentences(ref, rules.skip_bad, left_out)
        except UnusableRecord as e:
            named = UnusableRecord(f"ref {ref['ref_id']}: {e}")
            if not rules.skip_bad:
                raise named from None
            left_out.add("refs", named)
            continue
        refs.append(ref | {"sentences": sentences})
    if not refs:
        raise UnusableRecord(f"image {record.image['id']} has no usable ref")
    targets = {a for r in refs for a in r["ann_ids"]}
    anns = {
        str(a): {k: record.annotations[a].get(k) for k in ("bbox", "category_id", "area", "iscrowd")}
        | {"rle": masks[a][0]}
        for a in targets
    }
    meta = {
        "schema": SCHEMA, "dataset": tree.dataset, "split_by": tree.split_by, "split": split,
        "image_id": record.image["id"], "file_name": record.image["file_name"], "height": height, "width": width,
        "anns": anns, "refs": refs,
    }  # fmt: skip
    return meta, sum(any(masks[a][1] for a in r["ann_ids"]) for r in refs)


def _mask(record: ImageRecord, ann_id: Any, height: int, width: int, rules: Rules) -> tuple[dict[str, Any], bool]:
    annotation = record.annotations[ann_id]
    if annotation.get("image_id", record.image["id"]) != record.image["id"]:
        raise UnusableRecord(
            f"annotation {ann_id} is of image {annotation['image_id']!r}, not of {record.image['id']!r}"
        )
    return merge_parts(
        annotation,
        height,
        width,
        rules.legacy_overlap,
        with_visibility=rules.with_visibility,
        published=rules.published,
    )


def _sentences(ref: dict[str, Any], skip_bad: bool, left_out: LeftOut) -> list[dict[str, Any]]:
    """The ref's sentences with their text cleaned, at least one."""
    sentences = []
    for s in ref["sentences"]:
        try:
            sentences.append(s | {"sent": clean_sentence(s)})
        except UnusableRecord as e:
            if not skip_bad:
                raise
            left_out.add("sentences", UnusableRecord(f"ref {ref['ref_id']}: {e}"))
    if not sentences:
        raise UnusableRecord("it has no sentence")
    return sentences
