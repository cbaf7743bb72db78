"""Points and boxes: drawn on a mask, and laid out as the model reads them (paper section 4.3.6, Table 6).

Coordinates are (x, y) in pixels of the padded square input, the centre of the first pixel at (0, 0), as SAM's: its
prompt encoder adds the half pixel. Labels are those of SAM's ONNX export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOT_A_POINT, FOREGROUND, CORNERS = -1, 1, (2, 3)  # 0 is a point that is not on the object


@dataclass(frozen=True)
class Prompts:
    """What tells the model which object is meant.

    Attributes:
        kinds: text, point, box; of several, each sample draws one, all alike probable.
        points: how many points a point prompt has.
        words: there are places for words, also in samples that have none.
        slots: places for points and corners in every sample; 0 as SAM: the points and one that is no point, or a box's
            two corners, and none with words alone.
    """

    kinds: tuple[str, ...] = ("text",)
    points: int = 5
    words: bool = True
    slots: int = 0

    @classmethod
    def of(cls, trained: Sequence[str], points: int, asked: Sequence[str] | None = None) -> Prompts:
        """The prompts of a model trained on the kinds `trained` when it is given those `asked`, by default the same.

        SAM's mask decoder attends to empty places, too, so a model gets as many as it was trained with; kinds that it
        was not trained on it gets as SAM does. `trained` is empty of SAM's own weights.
        """
        asked = tuple(trained if asked is None else asked)
        if not set(asked) <= set(trained):
            return cls(asked, points, "text" in asked)
        slots = max((points + 1) * ("point" in trained), 2 * ("box" in trained))
        return cls(asked, points, "text" in trained, slots)

    def choose(self, rng: np.random.Generator) -> str:
        """The kind of one sample."""
        return self.kinds[int(rng.random() * len(self.kinds))]

    def draw(self, kind: str, mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample's `points` and `labels`, see `lay_out`.

        Args:
            mask: (h, w) of 0 and 1, not empty; for text it is not looked at.
        """
        if kind == "point":
            return self.lay_out(points=points_on(mask, self.points, rng))
        return self.lay_out(box=box_of(mask) if kind == "box" else None)

    def lay_out(self, points: np.ndarray | None = None, box: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Points on the object and a box in SAM's order, the empty places behind them.

        Args:
            points: (n, 2), x and y.
            box: (4,) XYXY.
        Returns:
            `points` (P, 2) float32 and `labels` (P,) int64; nothing where there are neither prompts nor places.
        """
        if points is None and box is None and not self.slots:
            return {}
        places = np.zeros((0, 2)) if points is None else np.asarray(points)
        labels = [FOREGROUND] * len(places)
        if box is not None:
            places, labels = np.concatenate([places, np.reshape(box, (2, 2))]), labels + list(CORNERS)
        elif points is not None:
            places, labels = np.concatenate([places, np.zeros((1, 2))]), [*labels, NOT_A_POINT]
        empty = max(0, self.slots - len(labels))
        return {
            "points": np.concatenate([places, np.zeros((empty, 2))]).astype(np.float32),
            "labels": np.array(labels + [NOT_A_POINT] * empty, np.int64),
        }


WORDS = Prompts()  # text alone


def points_on(mask: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) x and y of pixels of an (h, w) mask at random; different ones, where it has as many."""
    places = np.flatnonzero(mask)
    chosen = rng.choice(places, n, replace=len(places) < n)
    return np.stack([chosen % mask.shape[1], chosen // mask.shape[1]], 1)


def box_of(mask: np.ndarray) -> np.ndarray:
    """(4,) XYXY of an (h, w) mask: its outermost pixels, as `segment_anything.utils.amg.batched_mask_to_box`."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max(), y.max()])


def on_resized(mask: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(h, w) uint8 to draw on: a resized mask, or where resizing left nothing of it, the original's pixels, scaled.

    Args:
        mask: (h, w) in [0, 1].
        whole: (H, W) of 0 and 1.
    """
    inside = (mask >= 0.5).astype(np.uint8)
    if not inside.any():
        y, x = np.nonzero(whole)
        inside[y * mask.shape[0] // whole.shape[0], x * mask.shape[1] // whole.shape[1]] = 1
    return inside


def scale_places(places: np.ndarray, original: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
    """(n, 2) x and y of the original picture to those of the resized one, as SAM's `ResizeLongestSide.apply_coords`.

    Args:
        original, resized: (height, width).
    """
    return np.asarray(places, np.float64) * [resized[1] / original[1], resized[0] / original[0]]
