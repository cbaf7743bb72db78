"""The index of a split: where each expression is, in flat arrays that the loader's processes share."""

from __future__ import annotations

import bisect
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.manifest import load_manifest, manifest_errors, size_errors
from dit_ds.errors import UserError

JPG, JSON = 2, 5  # the first of a member's columns in `SplitIndex.images`: offset, bytes, CRC-32


class BadSample(UserError):
    """One sample is not what was written; a run may skip so many, see `data.max_bad_samples`."""


@dataclass(frozen=True)
class SplitIndex:
    """Where each expression of one split is, in flat arrays.

    Attributes:
        shards: the tars' paths.
        images: (images, 8) int64: shard, image_id, and offset, bytes and CRC-32 of the jpg and of the json member.
        refs: (refs, 4) int64: image, position in the image's refs, its first sentence, its number of sentences.
        sentences: (sentences,) int64: the ref of each.
        manifest_sha: SHA-256 of the manifest, which a resumed run must find again.
    """

    shards: list[Path]
    images: np.ndarray
    refs: np.ndarray
    sentences: np.ndarray
    manifest_sha: str

    @classmethod
    def load(cls, folder: str | Path, split: str) -> SplitIndex:
        """Read the manifest and look at the shards' sizes.

        Raises:
            UserError: no such set or split, or a shard that is missing or cut short.
        """
        folder = Path(folder)
        manifest = load_manifest(folder)
        if split not in manifest["splits"]:
            raise UserError(f"no split '{split}' in {folder}: it has {', '.join(manifest['splits'])}")
        errors = manifest_errors(folder, manifest)
        if errors:
            raise UserError(f"{errors[0]}: run 'dit-ds data verify {folder}', remove the manifest and shard again")
        errors = size_errors(folder, manifest)
        if errors:
            raise UserError(f"{errors[0]}: run 'dit-ds data verify {folder}', remove that shard and shard again")
        entries = manifest["splits"][split]["shards"]
        images, refs, lengths = [], [], []
        for k, entry in enumerate(entries):
            for image_id, *members, counts in entry["samples"]:
                refs += [(len(images), j) for j in range(len(counts))]
                images.append((k, image_id, *members))
                lengths += counts
        per_ref = np.array(lengths, np.int64)
        first = np.cumsum(per_ref) - per_ref
        return cls(
            [folder / e["name"] for e in entries],
            np.array(images, np.int64).reshape(-1, 8),
            np.column_stack([np.array(refs, np.int64).reshape(-1, 2), first, per_ref]),
            np.repeat(np.arange(len(per_ref)), per_ref),
            hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        )

    def check(self, image: int, member: int, data: bytes) -> bytes:
        """The bytes, if they are those of the manifest.

        Raises:
            BadSample: a JPEG with a flipped byte mostly decodes, to another picture; so it is its CRC that says it.
        """
        if zlib.crc32(data) != self.images[image, member + 2]:
            raise self.damaged(image, "jpg" if member == JPG else "json")
        return data

    def parse(self, image: int, data: bytes) -> dict[str, Any]:
        """The sample's JSON, from bytes that were checked.

        Raises:
            UserError: it is of another image, or of other refs and sentences, than the manifest says. That is no
                damaged sample but a wrong manifest, by which others would be numbered wrongly, too.
        """
        meta = json.loads(data)
        first, last = (bisect.bisect_left(self.refs[:, 0], i) for i in (image, image + 1))
        lengths = [len(r["sentences"]) for r in meta["refs"]]
        if meta["image_id"] != self.images[image, 1] or lengths != self.refs[first:last, 3].tolist():
            raise UserError(
                f"{self.shards[self.images[image, 0]]}: {self.key(image)}.json has other refs than the manifest says: "
                "remove the manifest and shard again"
            )
        return meta

    def key(self, image: int) -> str:
        """The WebDataset key of an image."""
        return f"{self.images[image, 1]:012d}"

    def damaged(self, image: int, extension: str) -> BadSample:
        """What to say of a damaged member."""
        shard = self.shards[self.images[image, 0]]
        return BadSample(f"{shard}: {self.key(image)}.{extension} is damaged: remove that shard and shard again")
