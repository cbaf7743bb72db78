"""The metrics of referring image segmentation (paper section 4.1), and of its generalised form (gRefCOCO)."""

from __future__ import annotations

import numpy as np

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_PRECISION_AT = (0.7, 0.8, 0.9)


def intersection_and_union(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels in both and pixels in either of two (H, W) masks of bool or of 0 and 1."""
    a, b = prediction.astype(bool), truth.astype(bool)
    return int((a & b).sum()), int((a | b).sum())


def without_target(vetoed: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Intersection and union of a prediction that there is no target, by a model that has predicted a mask nevertheless.

    As in ReLA's code: no pixel is right, and where there is a target the union counts the mask, too.

    Args:
        vetoed: the (H, W) mask.
        truth: (H, W), empty where there is no target.
    """
    return 0, intersection_and_union(vetoed, truth)[1] if truth.any() else 0


def count_pixels(prediction: np.ndarray, truth: np.ndarray, denied: bool | None) -> tuple[int, int, int, bool]:
    """Of one expression intersection, union, pixels of the target, and whether the prediction is that there is none.

    Args:
        prediction: (H, W), as the model predicted it, also where it says that there is no target.
        truth: (H, W), empty where there is no target.
        denied: what the model says; None where the mask alone tells.
    """
    none = not prediction.any() if denied is None else denied
    counts = without_target(prediction, truth) if none else intersection_and_union(prediction, truth)
    return *counts, int(truth.sum()), none


def summarize_rows(rows: np.ndarray, generalized: bool) -> dict[str, float]:
    """The metrics of all expressions, `n`, their number, first.

    Args:
        rows: (n, 4) int64 of `count_pixels`.
        generalized: with those of `summarize_generalized`.
    """
    intersection, union, target, none = rows.T
    result = {"n": len(rows)} | summarize(intersection, union)
    return result | (summarize_generalized(intersection, union, target, none == 1) if generalized else {})


def summarize(intersections: np.ndarray, unions: np.ndarray) -> dict[str, float]:
    """Metrics over all expressions.

    Args:
        intersections, unions: (n,) pixels.
    Returns:
        `oiou`, sum of intersections over sum of unions; `miou`, the mean of the IoUs; `p@X`, the share of expressions
        whose IoU exceeds X, strictly, as in CRIS. An empty union counts as IoU 0, as in LAVT and ReLA.

    In LAVT an IoU of X counts at X, too. The paper's code compares strictly, but (I + 1e-10) / (U + 1e-10): an IoU of
    exactly X counts there as well, and an empty union as 1.
    """
    iou = np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)
    out = {"oiou": float(intersections.sum() / max(1, unions.sum())), "miou": float(iou.mean())}
    return out | {f"p@{x}": float((iou > x).mean()) for x in PRECISION_AT}


def summarize_generalized(
    intersections: np.ndarray, unions: np.ndarray, targets: np.ndarray, denied: np.ndarray | None = None
) -> dict[str, float]:
    """Metrics over expressions of which some have no target in the image, as the paper and the code of ReLA define them.

    For an expression without a target, the prediction that there is none counts as an IoU of 1 and any other as 0.
    (Releases of ReLA's code before it was corrected divide otherwise for `t_acc`, and add 1 to both accuracies'
    denominators.)

    Args:
        intersections, unions, targets: (n,) pixels; of the target 0 where there is none.
        denied: (n,) bool, where the prediction is that there is no target; by default where no pixel is predicted.
    Returns:
        `giou`, the mean IoU; `ciou`, sum of intersections over sum of unions; `n_acc`, the share of the expressions
        without a target of which the prediction says so; `t_acc`, the share of those with a target of which it does
        not; `pr@X`, of those with a target, the share whose IoU is X or more.
    """
    empty = intersections + unions - targets == 0 if denied is None else denied
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
