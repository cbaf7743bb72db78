"""The metrics of referring image segmentation (paper section 4.1), and of its generalised form (gRefCOCO)."""

from __future__ import annotations

import numpy as np

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_PRECISION_AT = (0.7, 0.8, 0.9)


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


def summarize_generalized(intersections: np.ndarray, unions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics over expressions of which some mean nothing in the image, as the paper of ReLA defines them.

    An empty prediction says that there is no target. Where there is none, saying so counts as an IoU of 1 and anything
    else as 0. (ReLA's code departs from the paper in `t_acc`, and adds 1 to both accuracies' denominators.)

    Args:
        intersections, unions, targets: (n,) pixels; of the target 0 where there is none.
    Returns:
        `giou`, the mean IoU; `ciou`, sum of intersections over sum of unions; `n_acc`, the share of the expressions
        without a target that are recognised; `t_acc`, the share of those with one for which something is predicted;
        `pr@X`, of those with a target, the share whose IoU is X or more.
    """
    says_none = intersections + unions - targets == 0  # pixels of the prediction
    none = targets == 0
    iou = np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)
    out = {
        "giou": float(np.where(none, says_none, iou).mean()),
        "ciou": float(intersections.sum() / max(1, unions.sum())),
        "n_acc": float((none & says_none).sum() / max(1, none.sum())),
        "t_acc": float((~none & ~says_none).sum() / max(1, (~none).sum())),
    }
    share = max(1, (~none).sum())
    return out | {f"pr@{x}": float((iou[~none] >= x).sum() / share) for x in GENERALIZED_PRECISION_AT}
