"""Evaluation: every expression exactly once, at the image's original resolution, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dit_ds.data.loader import EvalBatches, ExpressionDataset, checked, make_loader
from dit_ds.distributed import World, gather_objects
from dit_ds.metrics import intersection_and_union, summarize
from dit_ds.models.segmenter import upscale

INPUTS = ("image", "size", "tokens", "token_mask")  # what the model's forward takes, by the batch's names


def original_probabilities(logits: Tensor, size: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
    """One sample's (s, s) logits to (H, W) probabilities: up to the padded square, padding cut, to the original size."""
    h, w = (int(x) for x in size)
    whole = upscale(logits[None], image_size)[:, :h, :w]
    return F.interpolate(whole[:, None], shape, mode="bilinear", align_corners=False)[0, 0].sigmoid()


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor],
    dataset: ExpressionDataset,
    batch_size: int,
    threshold: float,
    workers: int,
    world: World,
    collect: Callable[[dict[str, Any], int, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Evaluate.

    A batch's make-up does not depend on the world size, and sums are over integers in the order of the expressions, so
    the result doesn't either.

    Args:
        model: images and words to logits, in evaluation mode; a DeepSpeed engine or a module.
        collect: called with (batch, row, (H, W) prediction) for each expression of this rank.
    Returns:
        `n` and the metrics of `metrics.summarize`, the same on every rank.
    """
    batches = EvalBatches(len(dataset), batch_size, world.rank, world.world_size)
    loader = make_loader(dataset, batches, workers, pin=world.device.type == "cuda")
    rows: list[tuple[int, int, int]] = []
    for batch in tqdm(checked(loader), "evaluate", len(batches), disable=not world.main, mininterval=2, leave=False):
        logits = model(*(batch[k].to(world.device, non_blocking=True) for k in INPUTS))
        for i, truth in enumerate(batch["original"]):
            if batch["weight"][i] == 0:  # repeated, so that all ranks take equally many steps
                continue
            probability = original_probabilities(logits[i], batch["size"][i], truth.shape, dataset.image_size)
            prediction = (probability > threshold).cpu().numpy()
            rows.append((int(batch["sample"][i]), *intersection_and_union(prediction, truth)))
            if collect is not None:
                collect(batch, i, prediction)
    table = np.concatenate(gather_objects(np.array(rows, np.int64).reshape(-1, 3)))
    table = table[np.argsort(table[:, 0])]
    if not np.array_equal(table[:, 0], np.arange(len(dataset))):
        raise AssertionError(f"{len(table)} results for {len(dataset)} expressions")
    return {"n": len(table)} | summarize(table[:, 1], table[:, 2])
