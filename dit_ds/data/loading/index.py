"""The index of a split: where each expression is, in flat arrays that the loader's processes share."""

from __future__ import annotations

import bisect
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.loading.sampler import Samples
from dit_ds.data.shards.manifest import manifest_bytes, manifest_errors, parse_manifest, size_errors
from dit_ds.data.shards.storage import file_of
from dit_ds.errors import UserError

JPG, JSON = 2, 5  # the first of a member's columns in `SplitIndex.images`: offset, bytes, CRC-32


class BadSample(UserError):
    """One sample is not what was written; a run may skip so many, see `data.max_bad_samples`."""


@dataclass(frozen=True)
class Part:
    """One set of an index: its name, how often an epoch sees each of its samples, its refs and sentences."""

    name: str
    weight: float
    refs: int
    sentences: int


@dataclass(frozen=True)
class SplitIndex:
    """Where each expression of a split is, in flat arrays; of one set, or of several, one behind the other.

    Attributes:
        shards: the tars' paths or URLs.
        images: (images, 8) int64: shard, image_id, and offset, bytes and CRC-32 of the jpg and of the json member.
        refs: (refs, 4) int64: image, position in the image's refs, its first sentence, its number of sentences.
        sentences: (sentences,) int64: the ref of each.
        manifest_sha: SHA-256 of the manifest, or of several and of what was left out; a resumed run must find the same.
        parts: the sets.
        generalized: there are refs that nothing in the image fits.
        notes: what the log should say of it.
    """

    shards: list[Path | str]
    images: np.ndarray
    refs: np.ndarray
    sentences: np.ndarray
    manifest_sha: str
    parts: list[Part]
    generalized: bool = False
    notes: Sequence[str] = ()

    @classmethod
    def load(cls, folder: str | Path, split: str) -> SplitIndex:
        """Read the manifest and look at the shards' sizes.

        Args:
            folder: as `storage.locate` gives it.
        Raises:
            UserError: no such set or split, or a shard that is missing or cut short.
        """
        data = manifest_bytes(folder)
        manifest = parse_manifest(data, folder)
        if split not in manifest["splits"]:
            raise UserError(f"no split '{split}' in {folder}: it has {', '.join(manifest['splits'])}")
        if not manifest["splits"][split]["images"]:
            raise UserError(f"split {split} in {folder} has no samples: all were left out when it was sharded")
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
        return cls._of(
            [file_of(folder, e["name"]) for e in entries],
            np.array(images, np.int64).reshape(-1, 8),
            np.array(refs, np.int64).reshape(-1, 2),
            lengths=np.array(lengths, np.int64),
            sha=hashlib.sha256(data).hexdigest(),
            name=f"{manifest['dataset']}/{manifest['split_by']}",
            generalized=manifest["splits"][split].get("no_target", 0) > 0,
        )

    @classmethod
    def _of(
        cls,
        shards: list[Path | str],
        images: np.ndarray,
        refs: np.ndarray,
        lengths: np.ndarray,
        sha: str,
        name: str,
        generalized: bool,
    ) -> SplitIndex:
        """One set, from its refs' images and positions (refs, 2) and numbers of sentences (refs,)."""
        table = np.column_stack([refs, np.cumsum(lengths) - lengths, lengths])
        sentences = np.repeat(np.arange(len(lengths)), lengths)
        return cls(shards, images, table, sentences, sha, [Part(name, 1.0, len(refs), len(sentences))], generalized)

    def without_images(self, image_ids: np.ndarray) -> SplitIndex:
        """This one set without the refs of some images."""
        keep = ~np.isin(self.images[self.refs[:, 0], 1], image_ids)
        refs = self.refs[keep]
        name, sha = self.parts[0].name, self.manifest_sha
        if not keep.all():  # what is left depends on other sets' manifests, too
            sha = hashlib.sha256(sha.encode() + np.packbits(keep).tobytes()).hexdigest()
        return self._of(
            self.shards, self.images, refs[:, :2], lengths=refs[:, 3], sha=sha, name=name, generalized=self.generalized
        )

    @classmethod
    def chain(cls, indices: list[SplitIndex], weights: list[float]) -> SplitIndex:
        """Several sets as one, each with its weight."""
        shards: list[Path | str] = []
        images, refs, sentences, parts = [], [], [], []
        n = np.zeros(3, np.int64)  # images, refs, sentences so far
        for index, weight in zip(indices, weights):
            images.append(index.images + [len(shards), *[0] * 7])
            refs.append(index.refs + [n[0], 0, n[2], 0])
            sentences.append(index.sentences + n[1])
            parts.append(replace(index.parts[0], weight=weight))
            shards += index.shards
            n += [len(index.images), len(index.refs), len(index.sentences)]
        sha = hashlib.sha256(json.dumps([[i.manifest_sha, w] for i, w in zip(indices, weights)]).encode()).hexdigest()
        return cls(
            shards,
            np.concatenate(images),
            np.concatenate(refs),
            np.concatenate(sentences),
            sha,
            parts,
            any(i.generalized for i in indices),
        )

    def ref_of(self, unit: str, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The ref of each sample: of unit `sentence` every expression is one, else every ref."""
        return self.sentences[samples] if unit == "sentence" else np.arange(len(self.refs))[samples]

    def samples(self, unit: str, order: str = "global") -> Samples:
        """What an epoch runs over.

        Args:
            unit: ref, sentence, image.
            order: global or shards, see `data.order`.
        """
        counts = [(p.sentences if unit == "sentence" else p.refs, p.weight) for p in self.parts]
        image = self.refs[self.ref_of(unit), 0]
        by_shard = self.images[image, 0] if order == "shards" else None
        return Samples(counts, image if unit == "image" else None, by_shard, self.manifest_sha)

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
