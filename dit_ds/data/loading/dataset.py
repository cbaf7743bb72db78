"""The dataset of referring expressions: samples read from shards, decoded, resized, augmented and tokenized."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.batch import BatchBuilder
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import JPG, JSON, BadSample, SplitIndex
from dit_ds.data.loading.prompts import TEXT_ONLY, Prompts, prompt_mask
from dit_ds.data.loading.readers import make_reader
from dit_ds.data.loading.sampler import Item
from dit_ds.data.loading.transforms import Augmentation, SampledAugmentation
from dit_ds.data.picture import decode_picture
from dit_ds.errors import UserError

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]  # text -> input ids (T,) int64, attention mask (T,) bool
_PROMPT, _SCALE = 1, 2  # seeds of random streams beside the augmentation's, so that they don't shift its draws


class Location(NamedTuple):
    """A sample's image, ref, position among the ref's sentences, and the generator for its augmentation."""

    image: int
    ref: int
    sentence: int
    rng: np.random.Generator


class _Target(NamedTuple):
    """What a sample's expression means, resized.

    Attributes:
        mask: (h, w), to predict.
        shown: (h, w), to draw the prompt from.
        counts: the sample has a weight.
    """

    mask: np.ndarray
    shown: np.ndarray
    counts: bool


def _text(ref: dict[str, Any], sentence: int) -> str:
    """The expression, normalised: shards that were written by an earlier version may hold others."""
    return normalise_expression(ref["sentences"][sentence]["sent"])


class ExpressionDataset(Dataset):
    """A map-style dataset of referring expressions.

    `dataset[item]` is one sample in numpy; `dataset.__getitems__(items)` a batch, which PyTorch's DataLoader prefers. In
    a batch an image is read and decoded once for all its expressions; consecutive batches share the last image, too.

    Args:
        index: the split.
        unit: `ref` or `image`: one sentence of each ref, drawn in each epoch (as the paper's code); or `sentence`: each.
        image_size: the longer side after resizing, and the side of the padded square, in pixels.
        tokenize: text to input ids and attention mask.
        augmentation: None for evaluation: no augmentation, and samples have their full-size mask, text and image_id.
        seed: of sentence draws and augmentations.
        sentence_shift: take each expression from the image this many images further on: a control experiment that shows
            whether a model uses the text.
        resize: pad, which keeps the aspect ratio, or stretch.
        prompts: that tell the model which object to segment.
        mask_rule: of resized masks, see `resize_mask`.
        scales: with augmentation, the longer side is drawn from these, within the same padded square.
        streamed: read shards sequentially, see `readers`.
        on_vanished_target: with augmentation, of a target of which nothing is left at this size: keep its best-covered
            pixel, or skip the sample, with weight 0.
        skip_bad: a damaged sample becomes zeros of weight 0 without text, and `bad` of the batch names it.
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
        prompts: Prompts = TEXT_ONLY,
        mask_rule: str = "half",
        scales: Sequence[int] = (),
        streamed: bool = False,
        on_vanished_target: str = "keep",
        skip_bad: bool = False,
    ):
        self.index, self.unit, self.image_size, self.tokenize = index, unit, image_size, tokenize
        self.augmentation, self.seed, self.sentence_shift = augmentation, seed, sentence_shift
        self.resize, self.prompts, self.mask_rule = resize, prompts, mask_rule
        self.scales = list(scales) if augmentation is not None and scales else [image_size]
        self.on_vanished_target, self.skip_bad = on_vanished_target, skip_bad
        self.reader = make_reader(index, streamed)
        self._last: tuple[int, DecodedImage] | None = None  # the image that was decoded last

    def __len__(self) -> int:
        return len(self.index.sentences if self.unit == "sentence" else self.index.refs)

    def __getitem__(self, item: Item) -> dict[str, Any] | UserError:
        """One sample: a batch's only row."""
        batch = ExpressionDataset.__getitems__(self, [item])
        if isinstance(batch, UserError):
            return batch
        return {k: (v.numpy() if isinstance(v, torch.Tensor) else v)[0] for k, v in batch.items() if k != "bad"}

    def __getitems__(self, items: Sequence[Item]) -> dict[str, Any] | UserError:
        """A batch, see `BatchBuilder.collated`; a UserError is returned, not raised, for `iterate` to raise.

        PyTorch would raise it in the training process with the worker's traceback as its message.
        """
        batch = BatchBuilder(len(items), self.image_size, torch.float32 if self.mask_rule == "soft" else torch.uint8)
        locations = [self._locate(epoch, sample) for epoch, sample, _ in items]
        bad: list[str] = []
        for row in sorted(range(len(items)), key=lambda r: locations[r].image):  # an image's rows together
            try:
                sample = self._sample(items[row], locations[row])
            except BadSample as e:
                if not self.skip_bad:
                    return e
                bad.append(str(e))
                sample = self._blank(*items[row][:2])
            except UserError as e:
                return e
            batch.put(row, **sample)
        return batch.collated() | ({"bad": bad} if self.skip_bad else {})

    def _sample(self, item: Item, location: Location) -> dict[str, Any]:
        """The arguments of `BatchBuilder.put`."""
        epoch, sample, weight = item
        kind, side, prompt_rng = self._draw_kind_and_side(epoch, sample)
        image = self._decoded(location.image)
        ref = image.meta["refs"][self.index.refs[location.ref, 1]]
        target = self._target(image, ref["ann_ids"], location.image, kind, side)
        augmentation, text = self._augmentation_and_text(kind, ref, location)
        out = {
            "write_image": functools.partial(augmentation.apply_image, image.resized(side)),
            "mask": augmentation.apply_mask(target.mask),
        }
        out |= self._values(sample, weight if target.counts else 0.0)
        out |= self._prompt(kind, text, augmentation.apply_mask(target.shown), prompt_rng)
        if self.augmentation is None:
            out |= self._evaluation_values(location.image, image.full_mask(ref["ann_ids"]), text)
        return out

    def _target(self, image: DecodedImage, ann_ids: Sequence[int], number: int, kind: str, side: int) -> _Target:
        """What annotations of image `number` are, resized to the longer side `side`.

        Raises:
            UserError: they have no mask, of which a prompt of this kind is drawn.
        """
        full_mask = image.full_mask(ann_ids)
        if kind != "text" and not full_mask.any():
            raise self._without_mask(number, kind)
        mask, counts = image.resized_mask(ann_ids, side), True
        if self.augmentation is not None and image.vanishes(ann_ids, side):
            # trained on as it is, it would say that nothing is meant
            if self.on_vanished_target == "keep":
                mask = image.best_covered_pixel(ann_ids, side)
            else:
                counts = False
        return _Target(mask, mask if kind == "text" else prompt_mask(mask, full_mask), counts)

    def _augmentation_and_text(
        self, kind: str, ref: dict[str, Any], location: Location
    ) -> tuple[SampledAugmentation, str]:
        """What is drawn for a sample, and its expression, mirrored if the image is."""
        text = self._text_of_another_image(location) if self.sentence_shift else _text(ref, location.sentence)
        augmentation = SampledAugmentation() if self.augmentation is None else self.augmentation.draw(location.rng)
        return augmentation.with_text(text) if kind == "text" else (augmentation, text)

    def _blank(self, epoch: int, sample: int) -> dict[str, Any]:
        """The arguments of `BatchBuilder.put` for a damaged sample: zeros, with the prompt's kind unchanged."""
        zeros = np.zeros((self.image_size, self.image_size), np.uint8)
        out = {"write_image": lambda pixels: pixels.fill(0), "mask": zeros} | self._values(sample, 0.0)
        out |= self._blank_prompt(epoch, sample)
        if self.augmentation is None:
            out |= self._evaluation_values(self._locate(epoch, sample).image, zeros, "")
        return out

    def _blank_prompt(self, epoch: int, sample: int) -> dict[str, Any]:
        kind, _, prompt_rng = self._draw_kind_and_side(epoch, sample)
        return self._prompt(kind, "", np.ones((1, 1), np.uint8), prompt_rng)

    @staticmethod
    def _values(sample: int, weight: float) -> dict[str, Any]:
        return {"weight": np.float32(weight), "sample": np.int64(sample)}

    def _draw_kind_and_side(self, epoch: int, sample: int) -> tuple[str, int, np.random.Generator | None]:
        """The kind of prompt, the longer side in pixels, and the generator for points, None with text prompts only."""
        kind, prompt_rng, side = "text", None, self.scales[0]
        if self.prompts.kinds != ("text",):
            prompt_rng = np.random.default_rng([self.seed, epoch, sample, _PROMPT])
            kind = self.prompts.choose(prompt_rng)
        if len(self.scales) > 1:
            scale_rng = np.random.default_rng([self.seed, epoch, sample, _SCALE])
            side = self.scales[int(scale_rng.random() * len(self.scales))]
        return kind, side, prompt_rng

    def _prompt(self, kind: str, text: str, mask: np.ndarray, rng: np.random.Generator | None) -> dict[str, Any]:
        """`tokens` and `token_mask`, (T,) each, `points` (P, 2) and `labels` (P,), as far as the model reads them."""
        out: dict[str, Any] = {}
        if self.prompts.has_text:
            tokens, attention_mask = self.tokenize(text if kind == "text" else "")
            out["tokens"] = tokens
            out["token_mask"] = attention_mask if kind == "text" else np.zeros_like(attention_mask)
        return out | self.prompts.draw(kind, mask, rng)

    def _evaluation_values(self, image: int, full_mask: np.ndarray, text: str) -> dict[str, Any]:
        return {"original": full_mask, "text": text, "image_id": int(self.index.images[image, 1])}

    def _locate(self, epoch: int, sample: int) -> Location:
        words = [self.seed, epoch, sample]
        # the same as of the list, which takes longer
        rng = np.random.default_rng(np.array(words, np.uint32) if max(words) < 1 << 32 else words)
        if self.unit != "sentence":
            ref, sentence = sample, int(rng.random() * self.index.refs[sample, 3])
        else:
            ref = int(self.index.sentences[sample])
            sentence = sample - int(self.index.refs[ref, 2])
        return Location(int(self.index.refs[ref, 0]), ref, sentence, rng)

    def images_of(self, items: Sequence[Item]) -> np.ndarray:
        """(n,) int64: the image of each item."""
        return self.index.refs[self.index.refs_of(self.unit, np.array([s for _, s, _ in items], np.int64)), 0]

    def key(self, sample: int) -> str:
        """The WebDataset key of the sample's image."""
        return self.index.key(self._locate(0, sample).image)

    def full_image(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8: the sample's image in its original size.

        Raises:
            UserError: it is damaged, or can't be read.
        """
        image = self._locate(0, sample).image
        return self._decode(self.reader.read(image, JPG), image)

    def _decoded(self, image: int) -> DecodedImage:
        if self._last is None or self._last[0] != image:
            self._last = None  # free its memory, which the processor has in cache, for the next image
            trains = self.augmentation is not None
            pixels = self._decode(self.reader.read(image, JPG), image, fast=trains)
            self._last = image, DecodedImage(self._meta(image), pixels, self.resize, self.mask_rule, fast=trains)
        return self._last[1]

    @functools.cached_property
    def _images(self) -> np.ndarray:
        """(n,) int64: the images that have refs, in order."""
        return np.unique(self.index.refs[:, 0])

    def _text_of_another_image(self, location: Location) -> str:
        here = int(np.searchsorted(self._images, location.image))
        other_image = int(self._images[(here + self.sentence_shift) % len(self._images)])
        refs = np.flatnonzero(self.index.refs[:, 0] == other_image)
        other = self._meta(other_image)["refs"][int(self.index.refs[location.ref, 1]) % len(refs)]
        return _text(other, location.sentence % len(other["sentences"]))

    def _meta(self, image: int) -> dict[str, Any]:
        return self.index.parse(image, self.reader.read(image, JSON))

    def _decode(self, jpg: bytes, image: int, fast: bool = False) -> np.ndarray:
        try:
            return decode_picture(jpg, fast)
        except ValueError:
            raise self.index.damaged(image, JPG) from None

    def _without_mask(self, image: int, kind: str) -> UserError:
        shard, image_id = self.index.shards[self.index.images[image, 0]], self.index.images[image, 1]
        return UserError(
            f"{shard}: sample {image_id:012d} has an expression without a mask, so there is no {kind} to draw: leave it "
            "out when sharding, or prompt with text only"
        )
