"""What a trained checkpoint does: evaluate a split, segment one picture, fill a contact sheet."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_ds import checkpoint
from dit_ds.config import RunConfig
from dit_ds.data.loader import ExpressionDataset, SplitIndex, checked, make_loader, make_tokenize
from dit_ds.data.prompts import Prompts, default_kind, scale_places
from dit_ds.data.transforms import pad_square, resize_image
from dit_ds.distributed import connect, disconnect
from dit_ds.errors import UserError
from dit_ds.evaluate import Binarize, evaluate, model_inputs
from dit_ds.files import full_disk_is_user_error, write_json
from dit_ds.metrics import intersection_and_union
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize import side_by_side, write_sheet
from dit_ds.weights import load_model

_log = logging.getLogger("dit_ds")


def _prompts(config: RunConfig, meta: dict[str, Any], asked: Sequence[str]) -> Prompts:
    """As the model knows them from its training; weights that were not tuned, at step 0, know SAM's own."""
    return Prompts.of(config.data.prompts if meta["step"] else (), config.data.points, asked)


def _dataset(
    config: RunConfig, split: str, data_root: str | None, prompts: Prompts, sentence_shift: int = 0
) -> ExpressionDataset:
    """A split to evaluate on."""
    d = config.data
    index = SplitIndex.load(Path(data_root or d.root) / d.dataset / d.split_by, split)
    tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), d.tokens)
    return ExpressionDataset(
        index, "sentence", d.image_size, tokenize, sentence_shift=sentence_shift, resize=d.resize, prompts=prompts
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_kind(config: RunConfig, kind: str) -> None:
    if kind != "text" and config.model.name != "dit_sam":
        raise UserError(f"model.name {config.model.name} reads words only: it can't be prompted with a {kind}")


def evaluate_checkpoint(
    path: str,
    split: str,
    data_root: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shuffle_text: bool = False,
    threshold: float | None = None,
    predictions: str | None = None,
    prompt: str | None = None,
) -> dict[str, Any]:
    """`dit-ds eval`: the metrics of one split, the same digits on any number of ranks.

    Args:
        path: as for `load_model`. A run's result is left in its folder, too, see `_leave_in_run`.
        shuffle_text: give each image the expressions of another: what remains is what the image alone gives away.
        predictions: folder for the predicted masks, as `IMAGEID_EXPRESSION.png`.
        prompt: text, point or box; by default text, if the model was trained on it. Points are drawn once for all: a
            sample has the same in each evaluation.
    """
    model, config, meta = load_model(path)
    kind = prompt or default_kind(config.data.prompts)
    _check_kind(config, kind)
    if shuffle_text and kind != "text":
        raise UserError(f"--shuffle-text is about words, and the prompt is a {kind}: leave it out")
    dataset = _dataset(config, split, data_root, _prompts(config, meta, [kind]), 1 if shuffle_text else 0)
    collect = None
    if predictions is not None:
        folder = Path(predictions)
        with full_disk_is_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)

        def collect(batch: dict[str, Any], i: int, mask: np.ndarray) -> None:
            with full_disk_is_user_error(folder):
                name = f"{batch['image_id'][i]:012d}_{int(batch['sample'][i]):06d}.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name)

    world, binarize = connect(), Binarize.of(config, threshold)
    metrics = evaluate(
        model.to(world.device),
        dataset,
        batch_size or config.eval.batch_size,
        binarize,
        config.data.workers if workers is None else workers,
        world,
        collect,
    )
    disconnect()
    result = {"split": split, "prompt": kind} | metrics
    if world.main and not shuffle_text:
        d = config.data
        how = {"threshold": binarize.threshold, "mask_rule": binarize.rule, "shuffle_text": shuffle_text}
        how |= {"step": meta["step"], "dataset": d.dataset, "split_by": d.split_by}
        _leave_in_run(path, result | how)
    return result


def _leave_in_run(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as `evaluations/SPLIT-PROMPT-step_XXXXXXXX.json` in the folder of the run that the checkpoint is
    of, if it is in one. A folder that can't be written is a warning: the result is on stdout."""
    if Path(path).is_file():
        return
    found = checkpoint.find(path).resolve()
    if found.parent.name != "checkpoints":
        return
    name = f"{result['split']}-{result['prompt']}-step_{result['step']:08d}.json"
    try:
        write_json(found.parent.parent / "evaluations" / name, result)
    except UserError as e:
        _log.warning(f"warning: the result is not kept: {e}")


@torch.no_grad()
def predict_image(
    path: str,
    image: str,
    text: str | None,
    out: str,
    threshold: float | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
) -> dict[str, Any]:
    """`dit-ds predict`: write the picture beside the picture with the mask; return how much of it the mask covers.

    Args:
        text, points, box: at least one of them; see `segment`.
    """
    if text is None and not points and box is None:
        raise UserError("nothing says what to segment: give --text, --point or --box")
    if text is not None and not text.strip():
        raise UserError("--text is empty: say what to segment, as --text 'the left star'")
    try:
        pixels = np.asarray(Image.open(image).convert("RGB"))
    except OSError as e:
        raise UserError(f"cannot read the picture {image} ({e.strerror or e})") from None
    _check_places(points, box, *pixels.shape[:2])
    model, config, meta = load_model(path)
    if points or box is not None:
        _check_kind(config, "point" if points else "box")
    model.to(_device())
    words = None if text is None else text.strip().lower()
    given = {"text": words is not None, "point": bool(points), "box": box is not None}
    prompts = _prompts(config, meta, [kind for kind, is_given in given.items() if is_given])
    mask = segment(model, config, pixels, prompts, words, points, box, threshold)
    said = {"text": text} if text is not None else {}
    said |= {"points": [list(p) for p in points]} if points else {}
    said |= {"box": list(box)} if box is not None else {}
    with full_disk_is_user_error(out):
        side_by_side(pixels, mask, text or ", ".join(f"{k} {v}" for k, v in said.items())).save(out, "PNG")
    return {"out": out} | said | {"covered": round(float(mask.mean()), 4)}


def _check_places(points: Sequence[tuple[float, ...]], box: tuple[float, ...] | None, height: int, width: int) -> None:
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"--point {x:g},{y:g} is outside the picture, which is {width} wide and {height} high")
    if box is None:
        return
    x0, y0, x1, y1 = box
    said = f"--box {x0:g},{y0:g},{x1:g},{y1:g}"
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"{said} has no inside: give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
    if not (0 <= x0 and 0 <= y0 and x1 <= width and y1 <= height):
        raise UserError(f"{said} is not within the picture, which is {width} wide and {height} high")


@torch.no_grad()
def segment(
    model: Any,
    config: RunConfig,
    pixels: np.ndarray,
    prompts: Prompts,
    text: str | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
    threshold: float | None = None,
) -> np.ndarray:
    """Segment one picture.

    Args:
        pixels: (H, W, 3) uint8.
        prompts: the places that the model has for what is given.
        text: words.
        points: x and y of points on the object, in pixels of the picture.
        box: XYXY around it.
    Returns:
        (H, W) bool.
    """
    d = config.data
    small = np.asarray(resize_image(pixels, d.image_size, d.resize))
    shape = torch.tensor([small.shape[:2]])
    places = functools.partial(scale_places, original=pixels.shape[:2], resized=small.shape[:2])
    sample = prompts.lay_out(
        places(points) if points else None, None if box is None else places(np.reshape(box, (2, 2)))
    )
    if prompts.words:
        tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
        tokens, real = make_tokenize(tokenizer, d.tokens)(text or "")
        sample |= {"tokens": tokens, "token_mask": real & (text is not None)}
    batch = {k: torch.from_numpy(x)[None] for k, x in sample.items()}
    batch["image"] = torch.from_numpy(pad_square(small, d.image_size).transpose(2, 0, 1).copy())[None]
    logits = model(**model_inputs(batch | {"size": shape}, _device())).cpu()
    return Binarize.of(config, threshold)(logits[0], shape[0], pixels.shape[:2], d.image_size).numpy()


@torch.no_grad()
def contact_sheet(path: str, out: str, split: str, data_root: str | None = None, rows: int = 8) -> dict[str, Any]:
    """`dit-ds sheet`: expressions spread over a split, each with its image, ground truth and prediction."""
    model, config, meta = load_model(path)
    model.to(_device())
    dataset = _dataset(config, split, data_root, _prompts(config, meta, [default_kind(config.data.prompts)]))
    chosen = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int)
    loader = make_loader(dataset, [[(0, int(s), 1.0)] for s in chosen], workers=0, pin=False)
    panels, binarize = [], Binarize.of(config)
    for batch in checked(loader):
        truth = batch["original"][0]
        logits = model(**model_inputs(batch, _device())).cpu()
        prediction = binarize(logits[0], batch["size"][0], truth.shape, config.data.image_size).numpy()
        shared, union = intersection_and_union(prediction, truth)
        panels.append(
            (
                dataset.picture(int(batch["sample"][0])),
                batch["text"][0],
                truth.astype(bool),
                prediction,
                shared / max(1, union),
            )
        )
    write_sheet(panels, out)
    return {"out": out, "rows": len(panels), "miou": float(np.mean([p[-1] for p in panels]))}
