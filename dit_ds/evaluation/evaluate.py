"""Evaluation: every expression exactly once, at the image's original resolution, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dit_ds.config.load import RunConfig
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.loader import checked, make_loader
from dit_ds.data.loading.sampler import EvalBatches
from dit_ds.distributed import World, gather_objects
from dit_ds.evaluation.metrics import intersection_and_union, summarize, summarize_generalized
from dit_ds.models.segmenter import upscale

# what the model's forward takes, by the batch's names; words, and points with boxes, only where the batch has them
INPUTS = ("image", "size", "tokens", "token_mask", "points", "labels")


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What of a batch the model takes, on its device; there pictures, whose channels come last in memory, are turned."""
    return {k: batch[k].to(device, non_blocking=True).contiguous() for k in INPUTS if k in batch}


def original_probabilities(
    logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int, align_corners: bool = False
) -> Tensor:
    """One sample's (s, s) logits to (H, W) probabilities: up to the padded square, padding cut, to the original size."""
    return _to_original(_without_padding(logits, size, image_size, align_corners), shape).sigmoid()


def _without_padding(logits: Tensor, size: Tensor, image_size: int, align_corners: bool) -> Tensor:
    h, w = (int(x) for x in size)
    return upscale(logits[None], image_size, align_corners)[0, :h, :w]


def _to_original(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], shape, mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class Binarize:
    """From one sample's logits to the mask that is predicted.

    Attributes:
        threshold: a pixel is in if its probability exceeds this.
        rule: probability, the logits go to the original size before they are thresholded; or resize_then_any, as the
            paper's released code: thresholded in the square, the 0/1 mask resized, and in is whatever then is above 0,
            which makes masks grow by up to a pixel of the square.
        align_corners: of the logits' upsampling to the square.
        no_target_pixels: fewer say that there is no target; `evaluate` asks, where there may be none.
    """

    threshold: float
    rule: str = "probability"
    align_corners: bool = False
    no_target_pixels: int = 0

    @classmethod
    def of(cls, config: RunConfig, threshold: float | None = None) -> Binarize:
        """As configured; another threshold lies over the configuration's."""
        e = config.eval
        return cls(threshold or e.threshold, e.mask_rule, config.model.align_corners, e.no_target_pixels)

    def __call__(self, logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
        """(s, s) logits to an (H, W) bool mask; `size`, `shape`, `image_size` as for `original_probabilities`."""
        if self.rule == "probability":
            return original_probabilities(logits, size, shape, image_size, self.align_corners) > self.threshold
        inside = _without_padding(logits, size, image_size, self.align_corners).sigmoid() > self.threshold
        return _to_original(inside.float(), shape) > 0


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor],
    dataset: ExpressionDataset,
    batch_size: int,
    binarize: Binarize,
    workers: int,
    world: World,
    collect: Callable[[dict[str, Any], int, np.ndarray], None] | None = None,
    timeout: float = 300,
) -> dict[str, Any]:
    """Evaluate.

    A batch's make-up does not depend on the world size, and sums are over integers in the order of the expressions, so
    the result doesn't either.

    Args:
        model: images and prompts, by name, to logits, in evaluation mode; a DeepSpeed engine or a module.
        timeout: see `make_loader`.
        collect: called with (batch, row, (H, W) prediction) for each expression of this rank.
    Returns:
        `n` and the metrics of `metrics.summarize`, the same on every rank; where the split has expressions without a
        target those of `metrics.summarize_generalized`, too, and predictions of too few pixels are emptied.
    """
    generalized = dataset.index.generalized
    batches = EvalBatches(len(dataset), batch_size, world.rank, world.world_size)
    loader = make_loader(dataset, batches, workers, pin=world.device.type == "cuda", timeout=timeout)
    rows: list[tuple[int, int, int, int]] = []
    for batch in tqdm(checked(loader), "evaluate", len(batches), disable=not world.main, mininterval=2, leave=False):
        logits = model(**model_inputs(batch, world.device))
        for i, truth in enumerate(batch["original"]):
            if batch["weight"][i] == 0:  # repeated, so that all ranks take equally many steps
                continue
            prediction = binarize(logits[i], batch["size"][i], truth.shape, dataset.image_size).cpu().numpy()
            if generalized and prediction.sum() < binarize.no_target_pixels:
                prediction = np.zeros_like(prediction)
            rows.append((int(batch["sample"][i]), *intersection_and_union(prediction, truth), int(truth.sum())))
            if collect is not None:
                collect(batch, i, prediction)
    table = np.concatenate(gather_objects(np.array(rows, np.int64).reshape(-1, 4)))
    table = table[np.argsort(table[:, 0])]
    if not np.array_equal(table[:, 0], np.arange(len(dataset))):
        raise AssertionError(f"{len(table)} results for {len(dataset)} expressions")
    shared, either, target = table[:, 1], table[:, 2], table[:, 3]
    result = {"n": len(table)} | summarize(shared, either)
    return result | (summarize_generalized(shared, either, target) if generalized else {})
