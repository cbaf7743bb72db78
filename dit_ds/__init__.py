"""dit-ds: Deep Instruction Tuning for Segment Anything, trained at scale on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dit_ds.evaluation.predictor import Predictor

__version__ = "0.1.0"


def load(path: str | Path, device: str | None = None, threshold: float | None = None) -> Predictor:
    """A trained model, to segment pictures with: `mask, score = dit_ds.load(path).segment(image, "the left dog")`.

    Args:
        path: a run's folder, one of its checkpoints/step_*, or an exported file.
        device: as torch names it; by default the current GPU, else the CPU.
        threshold: a pixel is in if its probability exceeds this; by default the run's.
    Returns:
        A `Predictor`: `.segment`, `.model`, `.config`.
    Raises:
        dit_ds.errors.UserError: there is no checkpoint, or it is damaged.
    """
    from dit_ds.evaluation.predictor import Predictor  # imports torch, which `import dit_ds` alone does not

    return Predictor.load(path, device, threshold)
