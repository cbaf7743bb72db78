"""Point and box prompts: drawn from a mask, and encoded as SAM's prompt encoder reads them (paper section 4.3.6, Table 6).

Coordinates are (x, y) in pixels of the padded square input, the centre of the first pixel at (0, 0), as SAM's: its
prompt encoder adds the half pixel. Labels are those of SAM's ONNX export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PADDING, FOREGROUND, CORNERS = -1, 1, (2, 3)  # labels; 0, a background point, is not used


@dataclass(frozen=True)
class Prompts:
    """The prompts that tell the model which object to segment.

    Attributes:
        kinds: of text, point, box; with several, each sample draws one with equal probability.
        points: number of points of a point prompt.
        has_text: samples have text tokens; masked ones, where the sample's prompt is not text.
        slots: number of points and labels of every sample, padded with the label -1. With 0 as in SAM: a point prompt's
            points and one padding point, a box's two corners, none for text.
    """

    kinds: tuple[str, ...] = ("text",)
    points: int = 5
    has_text: bool = True
    slots: int = 0

    @classmethod
    def of(cls, trained: Sequence[str], points: int, requested: Sequence[str] | None = None) -> Prompts:
        """The prompts for a model trained on the kinds `trained` when it gets the kinds `requested`, by default the same.

        SAM's mask decoder also attends to padding points, so a model gets as many slots as in training. Kinds that it
        was not trained on are encoded as in SAM.

        Args:
            trained: empty for SAM's original weights.
            points: number of points of a point prompt.
        """
        requested = tuple(trained if requested is None else requested)
        if not set(requested) <= set(trained):
            return cls(requested, points, "text" in requested)
        slots = max((points + 1) * ("point" in trained), 2 * ("box" in trained))
        return cls(requested, points, "text" in trained, slots)

    def choose(self, rng: np.random.Generator) -> str:
        """Draw the kind of one sample's prompt."""
        return self.kinds[int(rng.random() * len(self.kinds))]

    def draw(self, kind: str, mask: np.ndarray, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """One sample's `points` and `labels`, see `points_and_labels`.

        Args:
            kind: of the prompt.
            mask: (h, w) of 0 and 1, not empty; not used for text.
            rng: draws points; None where `kind` is not point.
        """
        if kind == "point":
            if rng is None:
                raise ValueError("a point prompt is drawn with a generator")
            return self.points_and_labels(points=sample_points(mask, self.points, rng))
        return self.points_and_labels(box=mask_to_box(mask) if kind == "box" else None)

    def points_and_labels(
        self, points: np.ndarray | None = None, box: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Foreground points or a box as the prompt encoder's input, padded to `slots`.

        Args:
            points: (n, 2), x and y.
            box: (4,) XYXY.
        Returns:
            `points` (P, 2) float32 and `labels` (P,) int64; an empty dict without points, box and slots.
        """
        if points is None and box is None and not self.slots:
            return {}
        coordinates = np.zeros((0, 2)) if points is None else np.asarray(points)
        labels = [FOREGROUND] * len(coordinates)
        if box is not None:
            coordinates, labels = np.concatenate([coordinates, np.reshape(box, (2, 2))]), labels + list(CORNERS)
        elif points is not None:
            coordinates, labels = np.concatenate([coordinates, np.zeros((1, 2))]), [*labels, PADDING]
        padding = max(0, self.slots - len(labels))
        return {
            "points": np.concatenate([coordinates, np.zeros((padding, 2))]).astype(np.float32),
            "labels": np.array(labels + [PADDING] * padding, np.int64),
        }


TEXT_ONLY = Prompts()


def sample_points(mask: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2): x and y of random pixels of an (h, w) mask, without repetition if it has n pixels."""
    pixels = np.flatnonzero(mask)
    chosen = rng.choice(pixels, n, replace=len(pixels) < n)
    return np.stack([chosen % mask.shape[1], chosen // mask.shape[1]], 1)


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """(4,) XYXY: an (h, w) mask's outermost pixels, as `segment_anything.utils.amg.batched_mask_to_box`."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max(), y.max()])


def prompt_mask(resized: np.ndarray, full: np.ndarray) -> np.ndarray:
    """(h, w) uint8 of 0 and 1: the pixels from which points and boxes are drawn, never empty.

    Args:
        resized: (h, w) in [0, 1], the resized mask, of which pixels from 0.5 on count.
        full: (H, W) of 0 and 1, the full-size mask; where nothing of it is left, its pixels' coordinates are scaled.
    """
    inside = (resized >= 0.5).astype(np.uint8)
    if not inside.any():
        y, x = np.nonzero(full)
        inside[y * resized.shape[0] // full.shape[0], x * resized.shape[1] // full.shape[1]] = 1
    return inside


def scale_coordinates(points: np.ndarray, original: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
    """(n, 2): x and y of the original image in the resized one, as SAM's `ResizeLongestSide.apply_coords`.

    Args:
        points: (n, 2), x and y.
        original, resized: (height, width).
    """
    return np.asarray(points, np.float64) * [resized[1] / original[1], resized[0] / original[0]]
