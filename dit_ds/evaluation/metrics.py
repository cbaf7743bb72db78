"""The metrics of referring image segmentation (paper section 4.1), and of its generalised form (gRefCOCO)."""

from __future__ import annotations

import numpy as np

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_PRECISION_AT = (0.7, 0.8, 0.9)


def intersection_and_union(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels in both and pixels in either of two (H, W) masks of bool or of 0 and 1."""
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


def summarize_generalized(intersections: np.ndarray, unions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics over expressions of which some have no target in the image, as the paper of ReLA defines them.

    An empty prediction means "no target". For an expression without a target, an empty prediction counts as an IoU of 1
    and any other as 0. (ReLA's code departs from the paper in `t_acc`, and adds 1 to both accuracies' denominators.)

    Args:
        intersections, unions, targets: (n,) pixels; of the target 0 where there is none.
    Returns:
        `giou`, the mean IoU; `ciou`, sum of intersections over sum of unions; `n_acc`, the share of the expressions
        without a target whose prediction is empty; `t_acc`, the share of those with a target whose prediction is not
        empty; `pr@X`, of those with a target, the share whose IoU is X or more.
    """
    empty = intersections + unions - targets == 0  # no pixel predicted
    none = targets == 0
    iou = np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)
    out = {
        "giou": float(np.where(none, empty, iou).mean()),
        "ciou": float(intersections.sum() / max(1, unions.sum())),
        "n_acc": float((none & empty).sum() / max(1, none.sum())),
        "t_acc": float((~none & ~empty).sum() / max(1, (~none).sum())),
    }
    share = max(1, (~none).sum())
    return out | {f"pr@{x}": float((iou[~none] >= x).sum() / share) for x in GENERALIZED_PRECISION_AT}
