"""Map-style samples: read from the tars by member offset, decoded, augmented, laid out as the model reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dit_ds.data.index import JPG, JSON, SplitIndex
from dit_ds.data.prompts import WORDS, Prompts, on_resized
from dit_ds.data.readers import make_reader
from dit_ds.data.refer import decode_rle
from dit_ds.data.transforms import Augmentation, augment, decode_jpeg, pad_square, resize_image, resize_mask
from dit_ds.errors import UserError

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]  # words -> ids (T,) int64, real (T,) bool
_PROMPT, _SCALE = 1, 2  # streams of random numbers beside the augmentation's, so that they don't shift its draws


class ExpressionDataset(Dataset):
    """Map-style samples, read from the tars by member offset.

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
        skip_bad: a damaged sample leaves an empty place of weight 0, and the batch says so in `bad`.
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
        self.reader = make_reader(index, streamed)

    def __len__(self) -> int:
        return len(self.index.sentences if self.unit == "sentence" else self.index.refs)

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
        meta, jpg = self._meta(image), self.reader.read(image, JPG)
        record = meta["refs"][self.index.refs[ref, 1]]
        text = record["sentences"][nth]["sent"]
        if self.sentence_shift:
            text = self._text_of_another_image(ref, nth)
        pixels = self._decode(jpg, image)
        masks = [decode_rle(meta["anns"][str(a)]["rle"]) for a in record["ann_ids"]]
        if kind != "text" and not any(m.any() for m in masks):
            raise self._without_mask(image, kind)
        whole = np.maximum.reduce(masks) if masks else np.zeros(pixels.shape[:2], np.uint8)  # no target
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
        if self.unit != "sentence":
            return sample, int(rng.random() * self.index.refs[sample, 3])
        ref = int(self.index.sentences[sample])
        return ref, sample - int(self.index.refs[ref, 2])

    def images_of(self, items: Sequence[tuple[int, int, float]]) -> np.ndarray:
        """(n,) int64: the image of each item."""
        return self.index.refs[self.index.ref_of(self.unit, np.array([s for _, s, _ in items], np.int64)), 0]

    def key(self, sample: int) -> str:
        """The WebDataset key of the sample's image."""
        ref, _ = self._locate(sample, np.random.default_rng(0))
        return f"{self.index.images[self.index.refs[ref, 0], 1]:012d}"

    def picture(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8: the sample's image as it is in the shard."""
        ref, _ = self._locate(sample, np.random.default_rng(0))
        image = int(self.index.refs[ref, 0])
        return self._decode(self.reader.read(image, JPG), image)

    def _text_of_another_image(self, ref: int, nth: int) -> str:
        images = len(self.index.images)
        other_image = (int(self.index.refs[ref, 0]) + self.sentence_shift) % images
        refs = np.flatnonzero(self.index.refs[:, 0] == other_image)
        other = self._meta(other_image)["refs"][int(self.index.refs[ref, 1]) % len(refs)]
        return other["sentences"][nth % len(other["sentences"])]["sent"]

    def _meta(self, image: int) -> dict[str, Any]:
        return self.index.parse(image, self.reader.read(image, JSON))

    def _decode(self, jpg: bytes, image: int) -> np.ndarray:
        try:
            return decode_jpeg(jpg)
        except ValueError:
            raise self.index.damaged(image, "jpg") from None

    def _without_mask(self, image: int, kind: str) -> UserError:
        shard, image_id = self.index.shards[self.index.images[image, 0]], self.index.images[image, 1]
        return UserError(
            f"{shard}: sample {image_id:012d} has an expression without a mask, so there is no {kind} to draw: leave it "
            "out when sharding, or prompt with text only"
        )
