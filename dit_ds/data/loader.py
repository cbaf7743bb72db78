"""From shards to batches: the index, the order of samples, the workers, and where to go on after a stop.

The order is a pure function of (seed, epoch, manifest): global batch k of epoch e holds the same samples for any world
size, any number of workers and any point of resumption; augmentation draws from (seed, epoch, sample). Every sample is
seen exactly once an epoch: where the last batch is short it is filled up with samples of weight 0.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dit_ds.data.prompts import WORDS, Prompts, on_resized
from dit_ds.data.refer import decode_rle
from dit_ds.data.shards import load_manifest, size_errors
from dit_ds.data.transforms import Augmentation, augment, decode_jpeg, pad_square, resize_image, resize_mask
from dit_ds.errors import UserError

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]  # words -> ids (T,) int64, real (T,) bool
_PROMPT, _SCALE = 1, 2  # streams of random numbers beside the augmentation's, so that they don't shift its draws


@dataclass(frozen=True)
class SplitIndex:
    """Where each expression of one split is, in flat arrays.

    Attributes:
        shards: the tars' paths.
        images: (images, 6) int64: shard, image_id, jpg offset, jpg bytes, json offset, json bytes.
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
        errors = size_errors(folder, manifest)
        if errors:
            raise UserError(f"{errors[0]}: run 'dit-ds data verify {folder}', remove that shard and shard again")
        entries = manifest["splits"][split]["shards"]
        images, refs, lengths = [], [], []
        for k, entry in enumerate(entries):
            for image_id, *offsets, counts in entry["samples"]:
                refs += [(len(images), j) for j in range(len(counts))]
                images.append((k, image_id, *offsets))
                lengths += counts
        per_ref = np.array(lengths, np.int64)
        first = np.cumsum(per_ref) - per_ref
        return cls(
            [folder / e["name"] for e in entries],
            np.array(images, np.int64).reshape(-1, 6),
            np.column_stack([np.array(refs, np.int64).reshape(-1, 2), first, per_ref]),
            np.repeat(np.arange(len(per_ref)), per_ref),
            hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        )


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64: the order of the n samples in this epoch. Sorts raw Philox words, whose stream numpy keeps fixed."""
    words = np.random.Philox(key=[np.uint64(seed), np.uint64(epoch)]).random_raw(n)
    return np.argsort(words, kind="stable")


class ExpressionDataset(Dataset):
    """Map-style samples, read from the tars by member offset.

    Args:
        index: the split.
        unit: `ref`, one sentence per ref drawn anew each epoch (as the paper's code), or `sentence`, every one.
        image_size: the longer side after resizing, and the side of the padded square.
        resize: pad, which keeps the aspect ratio, or stretch.
        tokenize: words to ids.
        augmentation: None evaluates: no augmentation, and the sample carries its full-size mask.
        seed: what sentence draws and augmentations derive from.
        sentence_shift: an expression is taken from the image this many further on: the control experiment that
            shows whether a model listens to the words.
        prompts: what tells the model which object is meant.
        mask_rule: of the mask to train on, see `resize_mask`.
        scales: where there are any, the longer side is drawn from them in augmentation, in a square that stays.
    """

    def __init__(
        self,
        index: SplitIndex,
        unit: str,
        image_size: int,
        tokenize: Tokenize,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        sentence_shift: int = 0,
        resize: str = "pad",
        prompts: Prompts = WORDS,
        mask_rule: str = "half",
        scales: Sequence[int] = (),
    ):
        self.index, self.unit, self.image_size, self.tokenize = index, unit, image_size, tokenize
        self.augmentation, self.seed, self.sentence_shift = augmentation, seed, sentence_shift
        self.resize, self.prompts, self.mask_rule = resize, prompts, mask_rule
        self.scales = list(scales) if augmentation is not None and scales else [image_size]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index.refs if self.unit == "ref" else self.index.sentences)

    def __getitem__(self, item: tuple[int, int, float]) -> dict[str, Any] | UserError:
        """`item` is (epoch, sample, weight). What the user must mend is returned, not raised: see `batches`."""
        try:
            return self._sample(*item)
        except UserError as e:
            return e

    def _sample(self, epoch: int, sample: int, weight: float) -> dict[str, Any]:
        rng, of_prompt, of_scale = (
            np.random.default_rng([self.seed, epoch, sample, *stream]) for stream in ([], [_PROMPT], [_SCALE])
        )
        kind, side = self.prompts.choose(of_prompt), self.scales[int(of_scale.random() * len(self.scales))]
        ref, nth = self._locate(sample, rng)
        image = int(self.index.refs[ref, 0])
        meta, jpg = self._read(image, "json"), self._read(image, "jpg")
        record = meta["refs"][self.index.refs[ref, 1]]
        text = record["sentences"][nth]["sent"]
        if self.sentence_shift:
            text = self._text_of_another_image(ref, nth)
        pixels = self._decode(jpg, image)
        masks = [decode_rle(meta["anns"][str(a)]["rle"]) for a in record["ann_ids"]]
        if kind != "text" and not any(m.any() for m in masks):
            raise self._without_mask(image, kind)
        whole = np.maximum.reduce(masks)
        picture = resize_image(pixels, side, self.resize)
        mask = resize_mask(whole, side, self.resize, self.mask_rule)  # what is learned
        inside = mask if kind == "text" else on_resized(mask, whole)  # what is shown of it
        if self.augmentation is not None:
            picture, both, text = augment(picture, np.stack([mask, inside], -1), text, self.augmentation, rng)
            mask, inside = both[..., 0], both[..., 1]
        out = {
            "image": pad_square(np.asarray(picture), self.image_size).transpose(2, 0, 1),  # (3, S, S)
            "size": np.array(mask.shape),  # (2,): h, w before padding
            "mask": pad_square(mask, self.image_size),  # (S, S)
            "weight": np.float32(weight),
            "sample": np.int64(sample),
        }
        if self.prompts.words:
            tokens, real = self.tokenize(text if kind == "text" else "")
            out |= {"tokens": tokens, "token_mask": real if kind == "text" else np.zeros_like(real)}  # (T,) each
        out |= self.prompts.draw(kind, inside, of_prompt)  # points (P, 2) and labels (P,), where there are any
        if self.augmentation is None:
            out |= {"original": whole, "text": text, "image_id": int(self.index.images[image, 1])}
        return out

    def _locate(self, sample: int, rng: np.random.Generator) -> tuple[int, int]:
        """The ref of a sample, and which of its sentences."""
        if self.unit == "ref":
            return sample, int(rng.random() * self.index.refs[sample, 3])
        ref = int(self.index.sentences[sample])
        return ref, sample - int(self.index.refs[ref, 2])

    def key(self, sample: int) -> str:
        """The WebDataset key of the sample's image."""
        ref, _ = self._locate(sample, np.random.default_rng(0))
        return f"{self.index.images[self.index.refs[ref, 0], 1]:012d}"

    def picture(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8: the sample's image as it is in the shard."""
        ref, _ = self._locate(sample, np.random.default_rng(0))
        image = int(self.index.refs[ref, 0])
        return self._decode(self._read(image, "jpg"), image)

    def _text_of_another_image(self, ref: int, nth: int) -> str:
        images = len(self.index.images)
        other_image = (int(self.index.refs[ref, 0]) + self.sentence_shift) % images
        refs = np.flatnonzero(self.index.refs[:, 0] == other_image)
        other = self._read(other_image, "json")["refs"][int(self.index.refs[ref, 1]) % len(refs)]
        return other["sentences"][nth % len(other["sentences"])]["sent"]

    def _read(self, image: int, member: str) -> Any:
        shard, _, jpg_at, jpg_bytes, json_at, json_bytes = (int(x) for x in self.index.images[image])
        at, length = (jpg_at, jpg_bytes) if member == "jpg" else (json_at, json_bytes)
        if shard not in self._files:
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], length, at)
        if member == "jpg":
            return data
        try:
            return json.loads(data)
        except ValueError:
            raise self._damaged(image, "its JSON") from None

    def _decode(self, jpg: bytes, image: int) -> np.ndarray:
        try:
            return decode_jpeg(jpg)
        except ValueError:
            raise self._damaged(image, "its JPEG") from None

    def _damaged(self, image: int, what: str) -> UserError:
        shard, image_id = self.index.shards[self.index.images[image, 0]], self.index.images[image, 1]
        return UserError(f"{shard}: {what} of sample {image_id:012d} is damaged: remove that shard and shard again")

    def _without_mask(self, image: int, kind: str) -> UserError:
        shard, image_id = self.index.shards[self.index.images[image, 0]], self.index.images[image, 1]
        return UserError(
            f"{shard}: sample {image_id:012d} has an expression without a mask, so there is no {kind} to draw: leave it "
            "out when sharding, or prompt with text only"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # descriptors belong to one process


class TrainBatches:
    """Batch sampler: this rank's share of each global batch of one epoch, one micro-batch after the other.

    Args:
        n: samples in the dataset.
        batch_size: the global batch.
        micro_batch: samples a rank takes at once; `batch_size` is a multiple of `micro_batch * world_size`.
    """

    def __init__(self, n: int, batch_size: int, micro_batch: int, rank: int, world_size: int, seed: int):
        self.n, self.batch_size, self.micro_batch = n, batch_size, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_batch = 0, 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, that is optimizer steps, in an epoch."""
        return math.ceil(self.n / self.batch_size)

    def start_at(self, epoch: int, batch: int) -> None:
        """The next iteration yields `epoch` from global batch `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def global_batch(self, order: np.ndarray, k: int) -> list[tuple[int, int, float]]:
        """(epoch, sample, weight) of global batch `k`; weights make its mean loss the mean over real samples."""
        real = order[k * self.batch_size : (k + 1) * self.batch_size]
        weight = self.batch_size / len(real)
        filler = [(self.epoch, int(real[0]), 0.0)] * (self.batch_size - len(real))
        return [(self.epoch, int(s), weight) for s in real] + filler

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        order = epoch_order(self.seed, self.epoch, self.n)
        for k in range(self.first_batch, self.batches_per_epoch):
            batch = self.global_batch(order, k)
            for start in range(self.rank * self.micro_batch, self.batch_size, self.world_size * self.micro_batch):
                yield batch[start : start + self.micro_batch]

    def __len__(self) -> int:
        micro_steps = self.batch_size // (self.micro_batch * self.world_size)
        return (self.batches_per_epoch - self.first_batch) * micro_steps


class EvalBatches:
    """Batch sampler: batch j goes to rank j mod world size, so a batch's make-up is the same on any number of ranks.

    All ranks get equally many (ZeRO-3 gathers weights in lockstep): the missing ones repeat the last with weight 0.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int):
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        total = math.ceil(self.n / self.batch_size)
        for j in range(self.rank, len(self) * self.world_size, self.world_size):
            start = min(j, total - 1) * self.batch_size
            weight = 1.0 if j < total else 0.0
            yield [(0, s, weight) for s in range(start, min(start + self.batch_size, self.n))]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.n / self.batch_size) / self.world_size)


def collate(samples: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError:
    """Stack arrays to tensors (B, ...); what differs in size or is no array stays a list."""
    for s in samples:
        if isinstance(s, UserError):
            return s
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        stacks = isinstance(values[0], (np.ndarray, np.generic)) and key != "original"
        batch[key] = torch.from_numpy(np.stack(values)) if stacks else values
    return batch


def make_loader(dataset: ExpressionDataset, batches: TrainBatches | EvalBatches, workers: int, pin: bool) -> DataLoader:
    """A DataLoader over `batches`; iterate it through `checked`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0 and isinstance(batches, TrainBatches),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_quiet_worker,
        timeout=300 if workers else 0,
    )


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    # SLURM signals all processes of a task; the training process acts on these and ends its workers itself
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def checked(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's batches.

    Raises:
        UserError: a worker met a damaged sample.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """Expressions to `length` ids and a mask of the real ones, by a `transformers` tokenizer."""
    return functools.partial(_tokenize, tokenizer, length)


def _tokenize(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)
