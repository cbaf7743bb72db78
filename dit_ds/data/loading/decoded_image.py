"""One image of a split, opened: what several expressions of it share is made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_ds.data.loading.transforms import resize_image, resize_mask, resize_mask_quickly, resize_quickly
from dit_ds.data.masks import decode_rle


class DecodedImage:
    """A decoded image with what is said of it, resized on demand. What it returns is shared: not to be written to.

    Args:
        meta: the JSON member.
        pixels: (H, W, 3) uint8.
        resize, mask_rule: as of `ExpressionDataset`.
        quick: resize as one may in training, not exactly as SAM.
    """

    def __init__(self, meta: dict[str, Any], pixels: np.ndarray, resize: str, mask_rule: str, quick: bool):
        self.meta, self.pixels = meta, pixels
        self._resize, self._mask_rule, self._quick = resize, mask_rule, quick
        self._made: dict[tuple, np.ndarray] = {}

    def resized(self, side: int) -> np.ndarray:
        """(h, w, 3) uint8."""
        by = resize_quickly if self._quick else resize_image
        return self._once(("pixels", side), lambda: by(self.pixels, side, self._resize))

    def whole(self, ann_ids: Sequence[int]) -> np.ndarray:
        """(H, W) uint8 of 0 and 1: the union of annotations; of none, nothing."""
        return self._once(("whole", *ann_ids), lambda: self._union(ann_ids))

    def mask(self, ann_ids: Sequence[int], side: int) -> np.ndarray:
        """(h, w): the same, resized by the rule."""
        return self._once(("mask", side, *ann_ids), lambda: self._resized_mask(self.whole(ann_ids), side))

    def _resized_mask(self, whole: np.ndarray, side: int) -> np.ndarray:
        if self._quick and self._mask_rule == "half":
            return resize_mask_quickly(whole, side, self._resize)
        return resize_mask(whole, side, self._resize, self._mask_rule)

    def _union(self, ann_ids: Sequence[int]) -> np.ndarray:
        if not ann_ids:
            return np.zeros((self.meta["height"], self.meta["width"]), np.uint8, order="F")
        masks = [decode_rle(self.meta["anns"][str(a)]["rle"]) for a in ann_ids]
        return masks[0] if len(masks) == 1 else np.maximum.reduce(masks)

    def _once(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
