"""Map-style samples: read from the tars by member offset, decoded, augmented, laid out as the model reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dit_ds.data.jpeg import decode_jpeg
from dit_ds.data.loading.batch import BatchBuilder
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import JPG, JSON, BadSample, SplitIndex
from dit_ds.data.loading.prompts import WORDS, Prompts, on_resized
from dit_ds.data.loading.readers import make_reader
from dit_ds.data.loading.transforms import Augmentation, SampledAugmentation
from dit_ds.errors import UserError

Item = tuple[int, int, float]  # epoch, sample, weight
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]  # words -> ids (T,) int64, real (T,) bool
_PROMPT, _SCALE = 1, 2  # streams of random numbers beside the augmentation's, so that they don't shift its draws


class _Place(NamedTuple):
    """Where a sample is: its image, its ref, which of the ref's sentences; and the generator that augments it."""

    image: int
    ref: int
    nth: int
    rng: np.random.Generator


class ExpressionDataset(Dataset):
    """Map-style samples, read from the tars by member offset.

    `dataset[item]` is one sample in numpy, `dataset.__getitems__(items)` a batch, for which a DataLoader asks: there an
    image is read and decoded once for all its expressions, and once more only if others come in between.

    Args:
        index: the split.
        unit: `ref` or `image`, one sentence per ref drawn anew each epoch (as the paper's code), or `sentence`, every one.
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
        streamed: shards are read from front to back, see `readers`.
        skip_bad: a damaged sample becomes zeros of weight 0 without words, and the batch tells of it under `bad`.
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
        streamed: bool = False,
        skip_bad: bool = False,
    ):
        self.index, self.unit, self.image_size, self.tokenize = index, unit, image_size, tokenize
        self.augmentation, self.seed, self.sentence_shift = augmentation, seed, sentence_shift
        self.resize, self.prompts, self.mask_rule = resize, prompts, mask_rule
        self.scales = list(scales) if augmentation is not None and scales else [image_size]
        self.skip_bad = skip_bad
        self.reader = make_reader(index, streamed)
        self._last: tuple[int, DecodedImage] | None = None  # the image that was opened last

    def __len__(self) -> int:
        return len(self.index.sentences if self.unit == "sentence" else self.index.refs)

    def __getitem__(self, item: Item) -> dict[str, Any] | UserError:
        """One sample: a batch's only row."""
        batch = self.__getitems__([item])
        if isinstance(batch, UserError):
            return batch
        return {k: (v.numpy() if isinstance(v, torch.Tensor) else v)[0] for k, v in batch.items() if k != "bad"}

    def __getitems__(self, items: Sequence[Item]) -> dict[str, Any] | UserError:
        """A batch, see `BatchBuilder.collated`. What the user must mend is returned, not raised: see `checked`."""
        batch = BatchBuilder(len(items), self.image_size, torch.float32 if self.mask_rule == "soft" else torch.uint8)
        places, bad = [self._locate(epoch, sample) for epoch, sample, _ in items], []
        for row in sorted(range(len(items)), key=lambda r: places[r].image):  # an image's rows together
            try:
                sample = self._sample(*items[row], places[row])
            except BadSample as e:
                if not self.skip_bad:
                    return e
                bad.append(str(e))
                sample = self._blank(*items[row][:2])
            except UserError as e:
                return e
            batch.put(row, **sample)
        return batch.collated() | ({"bad": bad} if self.skip_bad else {})

    def _sample(self, epoch: int, sample: int, weight: float, at: _Place) -> dict[str, Any]:
        """What `BatchBuilder.put` takes."""
        kind, side, of_prompt = self._draw_kind_and_side(epoch, sample)
        picture = self._open(at.image)
        record = picture.meta["refs"][self.index.refs[at.ref, 1]]
        text = self._text_of_another_image(at) if self.sentence_shift else record["sentences"][at.nth]["sent"]
        whole = picture.whole(record["ann_ids"])
        if kind != "text" and not whole.any():
            raise self._without_mask(at.image, kind)
        mask = picture.mask(record["ann_ids"], side)  # what is learned
        inside = mask if kind == "text" else on_resized(mask, whole)  # what is shown of it
        drawn = SampledAugmentation() if self.augmentation is None else self.augmentation.draw(at.rng)
        out = {
            "write_image": functools.partial(drawn.picture, picture.resized(side)),
            "mask": drawn.mask(mask),
            "weight": np.float32(weight),
            "sample": np.int64(sample),
        }
        out |= self._prompt(kind, drawn.words(text), drawn.mask(inside), of_prompt)
        if self.augmentation is None:
            out |= self._evaluated(at.image, whole, text)
        return out

    def _blank(self, epoch: int, sample: int) -> dict[str, Any]:
        """In a damaged sample's place: a row like the others, of the kind that it would have been."""
        kind, _, of_prompt = self._draw_kind_and_side(epoch, sample)
        nothing = np.zeros((self.image_size, self.image_size), np.uint8)
        out = {
            "write_image": lambda pixels: pixels.fill(0),
            "mask": nothing,
            "weight": np.float32(0),
            "sample": np.int64(sample),
        }
        out |= self._prompt(kind, "", np.ones((1, 1), np.uint8), of_prompt)
        if self.augmentation is None:
            out |= self._evaluated(self._locate(epoch, sample).image, nothing, "")
        return out

    def _draw_kind_and_side(self, epoch: int, sample: int) -> tuple[str, int, np.random.Generator | None]:
        """The kind of prompt, the longer side, and the generator that draws points; words need none."""
        kind, of_prompt, side = "text", None, self.scales[0]
        if self.prompts.kinds != ("text",):
            of_prompt = np.random.default_rng([self.seed, epoch, sample, _PROMPT])
            kind = self.prompts.choose(of_prompt)
        if len(self.scales) > 1:
            side = self.scales[
                int(np.random.default_rng([self.seed, epoch, sample, _SCALE]).random() * len(self.scales))
            ]
        return kind, side, of_prompt

    def _prompt(
        self, kind: str, text: str, inside: np.ndarray, of_prompt: np.random.Generator | None
    ) -> dict[str, Any]:
        """`tokens` and `token_mask`, (T,) each, `points` (P, 2) and `labels` (P,), where there are any."""
        out = {}
        if self.prompts.words:
            tokens, real = self.tokenize(text if kind == "text" else "")
            out |= {"tokens": tokens, "token_mask": real if kind == "text" else np.zeros_like(real)}
        return out | self.prompts.draw(kind, inside, of_prompt)

    def _evaluated(self, image: int, whole: np.ndarray, text: str) -> dict[str, Any]:
        return {"original": whole, "text": text, "image_id": int(self.index.images[image, 1])}

    def _locate(self, epoch: int, sample: int) -> _Place:
        rng = np.random.default_rng([self.seed, epoch, sample])
        if self.unit != "sentence":
            ref, nth = sample, int(rng.random() * self.index.refs[sample, 3])
        else:
            ref = int(self.index.sentences[sample])
            nth = sample - int(self.index.refs[ref, 2])
        return _Place(int(self.index.refs[ref, 0]), ref, nth, rng)

    def images_of(self, items: Sequence[tuple[int, int, float]]) -> np.ndarray:
        """(n,) int64: the image of each item."""
        return self.index.refs[self.index.ref_of(self.unit, np.array([s for _, s, _ in items], np.int64)), 0]

    def key(self, sample: int) -> str:
        """The WebDataset key of the sample's image."""
        return self.index.key(self._locate(0, sample).image)

    def picture(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8: the sample's image as it is in the shard."""
        image = self._locate(0, sample).image
        return self._decode(self.reader.read(image, JPG), image)

    def _open(self, image: int) -> DecodedImage:
        if self._last is None or self._last[0] != image:
            self._last = None  # whose memory the next one takes: what stays in the processor's cache is what is quick
            trains = self.augmentation is not None
            pixels = self._decode(self.reader.read(image, JPG), image, fast=trains)
            self._last = image, DecodedImage(self._meta(image), pixels, self.resize, self.mask_rule, quick=trains)
        return self._last[1]

    def _text_of_another_image(self, at: _Place) -> str:
        other_image = (at.image + self.sentence_shift) % len(self.index.images)
        refs = np.flatnonzero(self.index.refs[:, 0] == other_image)
        other = self._meta(other_image)["refs"][int(self.index.refs[at.ref, 1]) % len(refs)]
        return other["sentences"][at.nth % len(other["sentences"])]["sent"]

    def _meta(self, image: int) -> dict[str, Any]:
        return self.index.parse(image, self.reader.read(image, JSON))

    def _decode(self, jpg: bytes, image: int, fast: bool = False) -> np.ndarray:
        try:
            return decode_jpeg(jpg, fast)
        except ValueError:
            raise self.index.damaged(image, "jpg") from None

    def _without_mask(self, image: int, kind: str) -> UserError:
        shard, image_id = self.index.shards[self.index.images[image, 0]], self.index.images[image, 1]
        return UserError(
            f"{shard}: sample {image_id:012d} has an expression without a mask, so there is no {kind} to draw: leave it "
            "out when sharding, or prompt with text only"
        )
