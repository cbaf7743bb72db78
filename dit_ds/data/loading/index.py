"""The index of a split: where each expression lies in the shards, in flat arrays that worker processes share."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json
from zlib_ng.zlib_ng import crc32

from dit_ds.data.loading.sampler import Samples
from dit_ds.data.shards.manifest import (
    KINDS,
    manifest_bytes,
    manifest_errors,
    parse_manifest,
    picture_kind_of,
    size_errors,
)
from dit_ds.data.shards.storage import file_of
from dit_ds.errors import UserError
from dit_ds.files import parse_json

# a member's first column in `SplitIndex.images`; its columns are offset, bytes, CRC-32; JPG is the picture of any kind
JPG, JSON = 2, 5


class BadSample(UserError):
    """A sample's bytes are damaged; a run skips up to `data.max_bad_samples` of them."""


class NoSplit(UserError):
    """The dataset has no split of this name."""


@dataclass(frozen=True)
class SourceDataset:
    """One dataset of an index.

    Attributes:
        name: as refcoco/unc.
        weight: how often an epoch sees each of its samples.
        refs, sentences: their numbers.
    """

    name: str
    weight: float
    refs: int
    sentences: int


@dataclass(frozen=True)
class SplitIndex:
    """Where each expression of a split lies, in flat arrays; of one dataset, or of several, concatenated.

    Attributes:
        shards: the tars' paths or URLs.
        images: (images, 8) int64: shard, image_id, and offset, bytes and CRC-32 of the picture and of the json member.
        kinds: (images,) uint8: the position of the picture's kind in `KINDS`.
        refs: (refs, 4) int64: image, position in the image's refs, first sentence, number of sentences.
        sentences: (sentences,) int64: the ref of each.
        manifest_sha: SHA-256 over the manifests and the images left out; a resumed run must find the same.
        datasets: the datasets, in order.
        generalized: there are refs without target.
        notes: lines for the log.
    """

    shards: list[Path | str]
    images: np.ndarray
    kinds: np.ndarray
    refs: np.ndarray
    sentences: np.ndarray
    manifest_sha: str
    datasets: list[SourceDataset]
    generalized: bool = False
    notes: Sequence[str] = ()

    @classmethod
    def load(cls, folder: str | Path, split: str) -> SplitIndex:
        """Read the manifest and check the shards' sizes.

        Args:
            folder: as returned by `storage.locate`.
        Raises:
            UserError: no such dataset or split, an inconsistent manifest, or a shard that is missing or truncated.
        """
        data = manifest_bytes(folder)
        manifest = parse_manifest(data, folder)
        if split not in manifest["splits"]:
            raise NoSplit(f"no split '{split}' in {folder}: it has {', '.join(manifest['splits'])}")
        if not manifest["splits"][split]["images"]:
            raise UserError(f"split {split} in {folder} has no samples: all were left out when it was sharded")
        errors = manifest_errors(folder, manifest)
        if errors:
            raise UserError(f"{errors[0]}: run 'dit-ds data verify {folder}', remove the manifest and shard again")
        errors = size_errors(folder, manifest)
        if errors:
            raise UserError(f"{errors[0]}: run 'dit-ds data verify {folder}', remove that shard and shard again")
        entries = manifest["splits"][split]["shards"]
        images: list[tuple[int, ...]] = []
        kinds: list[int] = []
        refs: list[tuple[int, int]] = []
        lengths: list[int] = []
        for k, entry in enumerate(entries):
            for sample in entry["samples"]:
                refs += [(len(images), j) for j in range(len(sample[7]))]
                images.append((k, *sample[:7]))
                kinds.append(KINDS.index(picture_kind_of(sample)))
                lengths += sample[7]
        return cls._of_one(
            [file_of(folder, e["name"]) for e in entries],
            np.array(images, np.int64).reshape(-1, 8),
            np.array(kinds, np.uint8),
            np.array(refs, np.int64).reshape(-1, 2),
            np.array(lengths, np.int64),
            name=f"{manifest['dataset']}/{manifest['split_by']}",
            manifest_sha=hashlib.sha256(data).hexdigest(),
            generalized=manifest["splits"][split].get("no_target", 0) > 0,
        )

    @classmethod
    def _of_one(
        cls,
        shards: list[Path | str],
        images: np.ndarray,
        kinds: np.ndarray,
        refs: np.ndarray,
        lengths: np.ndarray,
        *,
        name: str,
        manifest_sha: str,
        generalized: bool,
    ) -> SplitIndex:
        """The index of one dataset.

        Args:
            refs: (refs, 2): image, position in the image's refs.
            lengths: (refs,): number of sentences.
        """
        return cls(
            shards,
            images,
            kinds,
            refs=np.column_stack([refs, np.cumsum(lengths) - lengths, lengths]),
            sentences=np.repeat(np.arange(len(lengths)), lengths),
            manifest_sha=manifest_sha,
            datasets=[SourceDataset(name, 1.0, len(refs), int(lengths.sum()))],
            generalized=generalized,
        )

    def image_ids(self) -> np.ndarray:
        """(images,) int64: the ids of the images that have refs, in order."""
        return np.unique(self.images[self.refs[:, 0], 1])

    def without_images(self, left_out: np.ndarray) -> SplitIndex:
        """This index, of one dataset, without the refs of some images.

        Args:
            left_out: (images,) bool.
        """
        keep = ~left_out[self.refs[:, 0]]
        refs, sha = self.refs[keep], self.manifest_sha
        if not keep.all():  # the images left out may depend on other datasets' manifests
            sha = hashlib.sha256(sha.encode() + np.packbits(keep).tobytes()).hexdigest()
        return self._of_one(
            self.shards,
            self.images,
            self.kinds,
            refs[:, :2],
            refs[:, 3],
            name=self.datasets[0].name,
            manifest_sha=sha,
            generalized=self.generalized,
        )

    @classmethod
    def chain(cls, indices: list[SplitIndex], weights: list[float]) -> SplitIndex:
        """Several datasets concatenated, each with its weight."""
        shards: list[Path | str] = []
        images, refs, sentences, datasets = [], [], [], []
        n = np.zeros(3, np.int64)  # images, refs, sentences so far
        for index, weight in zip(indices, weights):
            images.append(index.images + [len(shards), *[0] * 7])
            refs.append(index.refs + [n[0], 0, n[2], 0])
            sentences.append(index.sentences + n[1])
            datasets.append(replace(index.datasets[0], weight=weight))
            shards += index.shards
            n += [len(index.images), len(index.refs), len(index.sentences)]
        sha = hashlib.sha256(json.dumps([[i.manifest_sha, w] for i, w in zip(indices, weights)]).encode()).hexdigest()
        return cls(
            shards,
            np.concatenate(images),
            np.concatenate([i.kinds for i in indices]),
            np.concatenate(refs),
            np.concatenate(sentences),
            manifest_sha=sha,
            datasets=datasets,
            generalized=any(i.generalized for i in indices),
        )

    def refs_of(self, unit: str, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n,) int64: the ref of each sample; samples are expressions with the unit `sentence`, else refs."""
        return self.sentences[samples] if unit == "sentence" else np.arange(len(self.refs))[samples]

    def samples(self, unit: str, order: str = "global") -> Samples:
        """The samples of an epoch, for the sampler.

        Args:
            unit: ref, sentence, image.
            order: global or shards, see `data.order`.
        """
        counts = [(d.sentences if unit == "sentence" else d.refs, d.weight) for d in self.datasets]
        image = self.refs[self.refs_of(unit), 0]
        by_shard = self.images[image, 0] if order == "shards" else None
        return Samples(counts, image if unit == "image" else None, by_shard, self.manifest_sha)

    def check(self, image: int, member: int, data: bytes) -> bytes:
        """The bytes, if their CRC-32 is the manifest's.

        Raises:
            BadSample: it isn't. A JPEG with a flipped byte mostly decodes, to another image, so decoding is no check.
        """
        if crc32(data) != self.images[image, member + 2]:
            raise self.damaged(image, member)
        return data

    def parse(self, image: int, data: bytes) -> dict[str, Any]:
        """The sample's JSON, from bytes that passed `check`.

        Raises:
            UserError: it has another image, or other refs and sentences, than the manifest says. The manifest is wrong
                then, and other samples may be misnumbered, so this is no `BadSample`.
        """
        first, last = self._first_refs[image : image + 2].tolist()
        try:
            meta = _parse(data)
            lengths = [len(r["sentences"]) for r in meta["refs"]]
            same = meta["image_id"] == self.images[image, 1] and lengths == self.refs[first:last, 3].tolist()
        except (ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"{self.shards[self.images[image, 0]]}: {self.key(image)}.json has other refs than the manifest says: "
                "remove the manifest and shard again"
            )
        return meta

    @functools.cached_property
    def _first_refs(self) -> np.ndarray:
        """(images + 1,) int64: the first ref of each image, and their number."""
        return np.searchsorted(self.refs[:, 0], np.arange(len(self.images) + 1))

    def key(self, image: int) -> str:
        """The WebDataset key of an image."""
        return f"{self.images[image, 1]:012d}"

    def extension(self, image: int, member: int) -> str:
        """The extension of a sample's member, JPG or JSON."""
        return KINDS[self.kinds[image]] if member == JPG else "json"

    def damaged(self, image: int, member: int) -> BadSample:
        """The error for a damaged member, JPG or JSON."""
        shard = self.shards[self.images[image, 0]]
        return BadSample(
            f"{shard}: {self.key(image)}.{self.extension(image, member)} is damaged: remove that shard and shard again"
        )


def _parse(data: bytes) -> Any:
    """As `parse_json`, in half the time."""
    try:
        return from_json(data)
    except ValueError:  # there are escapes and numbers that only the other reads
        return parse_json(data.decode())
