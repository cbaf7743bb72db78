"""Evaluation: every expression exactly once, at the image's original resolution, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_ds.checkpointing.weights import load_model, read_config, with_data_root
from dit_ds.config.schema import RunConfig
from dit_ds.data.build import build_eval_dataset, val_index
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import EvalBatchSampler
from dit_ds.data.progress import progress_bar
from dit_ds.distributed import World, connect, disconnect, gather_objects, set_environment, share_cores
from dit_ds.errors import UserError
from dit_ds.evaluation.coco_results import score_results
from dit_ds.evaluation.inference import check_kind, trained_prompts
from dit_ds.evaluation.metrics import count_pixels, summarize_rows
from dit_ds.evaluation.postprocess import MaskPostprocess, run_model
from dit_ds.evaluation.results import write_to_run
from dit_ds.files import atomic_write, full_disk_is_user_error
from dit_ds.models.segmenter import Prediction

_log = logging.getLogger("dit_ds")
Collect = Callable[[dict[str, Any], int, np.ndarray], None]


class EvaluationLeft(Exception):
    """An evaluation was left before its end, on all ranks alike."""


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor | Prediction],
    dataset: ExpressionDataset,
    postprocess: MaskPostprocess,
    world: World,
    *,
    batch_size: int,
    workers: int,
    collect: Collect | None = None,
    timeout: float = 300,
    leave: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Evaluate one split.

    The samples of a batch do not depend on the world size, and sums are over integers in the order of the expressions,
    so the result does not depend on it either. Collective: every rank calls it.

    Args:
        model: images and prompts, by name, to (B, s, s) logits, in evaluation mode; a DeepSpeed engine or a module.
        batch_size: expressions at once on a rank.
        workers: loader processes of a rank.
        collect: called with (batch, row, (H, W) prediction) for each expression of this rank.
        timeout: seconds without a batch, see `make_loader`.
        leave: asked before each batch, on all ranks with the same answer, whether to go on no further.
    Returns:
        `n`, the number of expressions, and the metrics of `metrics.summarize`, the same on every rank; where the split
        has expressions without a target, those of `metrics.summarize_generalized` too, and a prediction of fewer than
        `postprocess.no_target_pixels` pixels counts as empty. What the no-target head of a model says counts as in the
        original of ReLA, see `metrics.without_target`.
    Raises:
        UserError: a sample is damaged, or the workers stall.
        EvaluationLeft: `leave` said so.
    """
    generalized = dataset.index.generalized
    batches = EvalBatchSampler(len(dataset), batch_size, world.rank, world.world_size)
    loader = make_loader(dataset, batches, workers, pin=world.device.type == "cuda", timeout=timeout)
    rows: list[tuple[int, int, int, int, bool]] = []  # expression, intersection, union, pixels of the target, is denied
    for batch in progress_bar(
        iterate(loader), "evaluate", total=len(batches), disable=not world.main, mininterval=2, leave=False
    ):
        if leave is not None and leave():
            raise EvaluationLeft
        logits, denied = run_model(model, batch, world.device, postprocess)  # (B, s, s) and (B,) or None
        for i, truth in enumerate(batch["original"]):  # (H, W)
            if batch["weight"][i] == 0:  # repeated, so that all ranks take equally many steps
                continue
            prediction = postprocess(logits[i], batch["size"][i], truth.shape, dataset.image_size).cpu().numpy()
            if generalized and prediction.sum() < postprocess.no_target_pixels:
                prediction = np.zeros_like(prediction)
            row = count_pixels(prediction, truth, None if denied is None else bool(denied[i]))
            if row[-1]:
                prediction = np.zeros_like(prediction)
            rows.append((int(batch["sample"][i]), *row))
            if collect is not None:
                collect(batch, i, prediction)
    return _summarized(np.array(rows, np.int64).reshape(-1, 5), len(dataset), generalized)


def _summarized(rows: np.ndarray, expressions: int, generalized: bool) -> dict[str, Any]:
    """The metrics of all ranks' rows (n, 5). Collective."""
    table = np.concatenate(gather_objects(rows))
    table = table[np.argsort(table[:, 0])]
    if not np.array_equal(table[:, 0], np.arange(expressions)):
        raise AssertionError(f"{len(table)} results for {expressions} expressions")
    return summarize_rows(table[:, 1:], generalized)


def evaluate_checkpoint(
    path: str,
    split: str,
    *,
    data_root: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shuffle_text: bool = False,
    threshold: float | None = None,
    predictions: str | None = None,
    prompt: str | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """`dit-ds eval`: the metrics of one split, the same digits on any number of ranks.

    Args:
        path: as for `load_model`. A run's result as it is configured is also written into its folder, see `write_to_run`.
        data_root: where the shards are; by default where the run read them, if that is a local folder.
        batch_size, workers: as for `evaluate`; by default the run's.
        shuffle_text: give each image the expressions of another: a control that measures what the image alone predicts.
        threshold: a pixel is in if its probability exceeds this; by default the run's.
        predictions: folder for the predicted masks, as `IMAGEID_EXPRESSION.png`.
        prompt: text, point or box; by default text, if the model was trained on it. Points depend on the sample alone:
            they are the same in each evaluation.
        image_size: side of the square input, in pixels; by default the run's.
    Raises:
        UserError: no such checkpoint or split, or a prompt that the model can't read.
    """
    set_environment()  # a process that would wait for others in vain is refused before it loads anything
    # the scales are of training, and may be larger than the images
    overrides = {} if image_size is None else {"data": {"image_size": image_size, "scales": []}}
    model, config, meta = load_model(path, overrides)
    kind = prompt or config.data.default_prompt
    check_kind(config, kind)
    if shuffle_text and kind != "text":
        raise UserError(f"--shuffle-text is about words, and the prompt is a {kind}: leave it out")
    at = with_data_root(path, config, data_root)
    dataset = build_eval_dataset(
        at, split, kind=kind, sentence_shift=int(shuffle_text), trained=trained_prompts(config, meta)
    )
    world, postprocess = connect(), MaskPostprocess.from_config(config, threshold)
    workers = config.data.workers if workers is None else workers
    of = f"{path}, step {meta['step']}, on {split} of {dataset.index.datasets[0].name} in {at.data.root}"
    how_many = f"{len(dataset)} expressions, {kind} prompts, threshold {postprocess.threshold:g}"
    _log_start(world, f"evaluating {of}: {how_many}", workers)
    collect = None if predictions is None else _write_masks(Path(predictions))
    size, of_rank = batch_size or config.eval.batch_size, model.to(world.device)
    metrics = evaluate(of_rank, dataset, postprocess, world, batch_size=size, workers=workers, collect=collect)
    disconnect()
    result = {"split": split, "prompt": kind} | metrics
    if world.main:
        how = {"threshold": postprocess.threshold, "mask_rule": postprocess.rule, "shuffle_text": shuffle_text}
        how |= {"step": meta["step"]} | _set_of(dataset, meta, data_root, config.data.root)
        how |= {"no_target_pixels": postprocess.no_target_pixels} if dataset.index.generalized else {}
        _keep(path, config, result | how, other_size=image_size is not None)
    return result


def _keep(path: str, config: RunConfig, result: dict[str, Any], other_size: bool) -> None:
    """Write a result into the run's folder, if it is one of the run as it is configured; say where."""
    if result["shuffle_text"] or other_size or result["threshold"] != config.eval.threshold:
        _log.info("not kept in the run's folder: it was not evaluated as it is configured")
    elif file := write_to_run(path, config, result):
        _log.info(f"written to {file}")


def evaluate_results(
    file: str,
    split: str,
    *,
    path: str | None = None,
    data_root: str | None = None,
    dataset: str | None = None,
    split_by: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """`dit-ds eval --predictions`: the metrics of a file of results, whoever made it. Nothing is written.

    Args:
        file, allow_missing: as for `score_results`.
        path: as for `load_model`: of the run whose set it is, and whose `eval.no_target_pixels` counts; by default those
            of the default configuration.
        data_root: where the shards are; by default where the run read them, if that is a local folder.
        dataset, split_by: of the set; by default the run's.
    Raises:
        UserError: as of `score_results`, or there is no such split.
    """
    config = RunConfig() if path is None else read_config(path)
    config = config if path is None and data_root is None else with_data_root(path or "", config, data_root)
    data = config.data
    if dataset or split_by:
        other = {"dataset": dataset or data.dataset, "split_by": split_by or data.split_by, "val_fraction": 0.0}
        data = data.model_copy(update=other | {"val_dataset": None, "val_split_by": None})
    metrics = score_results(
        file,
        val_index(data, split),
        streamed=data.streamed,
        no_target_pixels=MaskPostprocess.from_config(config).no_target_pixels,
        allow_missing=allow_missing,
    )
    return {"split": split, "predictions": file} | metrics


def _log_written(file: Path | None) -> None:
    if file is not None:
        _log.info(f"written to {file}")


def _log_start(world: World, what: str, workers: int) -> None:
    threads = share_cores(world.world_size, workers)
    if world.main:
        _log.info(what)
        _log.info(f"PyTorch's threads: {threads}")


def _set_of(
    dataset: ExpressionDataset, meta: dict[str, Any], data_root: str | None, configured_root: str
) -> dict[str, Any]:
    """Which shards were read, and whether they are those that the run evaluates on."""
    name, _, split_by = dataset.index.datasets[0].name.partition("/")
    sha = dataset.index.manifest_sha
    expected = meta.get("val_manifest_sha", sha if data_root is None else None)  # former checkpoints do not say
    read = {"manifest_sha": sha, "data_root": data_root or configured_root, "configured_set": sha == expected}
    return {"dataset": name, "split_by": split_by} | read


def _write_masks(folder: Path) -> Collect:
    """What `evaluate` calls to write each prediction as a PNG into the folder."""
    with full_disk_is_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def write(batch: dict[str, Any], i: int, mask: np.ndarray) -> None:
        with atomic_write(folder / f"{batch['image_id'][i]:012d}_{int(batch['sample'][i]):06d}.png") as f:
            Image.fromarray(mask.astype(np.uint8) * 255).save(f, "PNG")

    return write
