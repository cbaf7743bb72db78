"""The metrics of referring image segmentation (paper section 4.1)."""

from __future__ import annotations

import numpy as np

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)


def intersection_and_union(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels in both and pixels in either of two (H, W) masks."""
    a, b = prediction.astype(bool), truth.astype(bool)
    return int((a & b).sum()), int((a | b).sum())


def summarize(intersections: np.ndarray, unions: np.ndarray) -> dict[str, float]:
    """Metrics over all expressions.

    Args:
        intersections, unions: (n,) pixels.
    Returns:
        `oiou`, sum of intersections over sum of unions; `miou`, the mean of the IoUs; `p@X`, the share of expressions
        whose IoU exceeds X (strictly, as in the paper's code). An empty union counts as IoU 0.
    """
    iou = np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)
    out = {"oiou": float(intersections.sum() / max(1, unions.sum())), "miou": float(iou.mean())}
    return out | {f"p@{x}": float((iou > x).mean()) for x in PRECISION_AT}
