"""One decoded image, with the resized pixels and masks that its expressions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_ds.data.loading.transforms import (
    best_covered_pixel,
    resize_image,
    resize_image_fast,
    resize_mask,
    resize_mask_fast,
    vanished,
)
from dit_ds.data.masks import decode_rle


def union_mask(meta: dict[str, Any], ann_ids: Sequence[int]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1: the union of annotations' masks; zeros without annotations.

    Args:
        meta: the sample's JSON.
    """
    if not ann_ids:
        return np.zeros((meta["height"], meta["width"]), np.uint8, order="F")
    masks = [decode_rle(meta["anns"][str(a)]["rle"]) for a in ann_ids]
    return masks[0] if len(masks) == 1 else np.maximum.reduce(masks)


class DecodedImage:
    """A decoded image and its annotations, resized on demand and cached. Returned arrays are shared: don't write to them.

    Args:
        meta: the sample's JSON.
        pixels: (H, W, 3) uint8.
        resize, mask_rule: as of `ExpressionDataset`.
        fast: resize with the fast functions, for training; else exactly as SAM.
    """

    def __init__(self, meta: dict[str, Any], pixels: np.ndarray, resize: str, mask_rule: str, fast: bool):
        self.meta, self.pixels = meta, pixels
        self._resize, self._mask_rule, self._fast = resize, mask_rule, fast
        self._cache: dict[tuple, np.ndarray] = {}

    def resized(self, side: int) -> np.ndarray:
        """(h, w, 3) uint8: the image, resized to the longer side `side`."""
        resize = resize_image_fast if self._fast else resize_image
        return self._cached(("pixels", side), lambda: resize(self.pixels, side, self._resize))

    def full_mask(self, ann_ids: Sequence[int]) -> np.ndarray:
        """(H, W) uint8 of 0 and 1: the union of the annotations' masks; zeros without annotations."""
        return self._cached(("full", *ann_ids), lambda: union_mask(self.meta, ann_ids))

    def resized_mask(self, ann_ids: Sequence[int], side: int) -> np.ndarray:
        """(h, w): `full_mask`, resized by the mask rule to the longer side `side`."""
        return self._cached(("mask", side, *ann_ids), lambda: self._resize_mask(self.full_mask(ann_ids), side))

    def vanishes(self, ann_ids: Sequence[int], side: int) -> bool:
        """Whether nothing of `full_mask`, which is not empty, is left in `resized_mask`."""
        return vanished(self.resized_mask(ann_ids, side), self.full_mask(ann_ids))

    def best_covered_pixel(self, ann_ids: Sequence[int], side: int) -> np.ndarray:
        """(h, w): all that `resized_mask` should have kept of a mask that vanishes."""
        return self._cached(
            ("pixel", side, *ann_ids), lambda: best_covered_pixel(self.full_mask(ann_ids), side, self._resize)
        )

    def _resize_mask(self, mask: np.ndarray, side: int) -> np.ndarray:
        if self._fast and self._mask_rule == "half":
            return resize_mask_fast(mask, side, self._resize)
        return resize_mask(mask, side, self._resize, self._mask_rule)

    def _cached(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
