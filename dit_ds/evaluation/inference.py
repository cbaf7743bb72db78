"""What a trained checkpoint does: evaluate a split, segment one picture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing.weights import load_model
from dit_ds.config.load import RunConfig
from dit_ds.data.build import dataset_of
from dit_ds.data.loading.loader import make_tokenize
from dit_ds.data.loading.prompts import Prompts, default_kind, scale_places
from dit_ds.data.loading.transforms import pad_square, resize_image
from dit_ds.distributed import connect, disconnect
from dit_ds.errors import UserError
from dit_ds.evaluation.evaluate import Binarize, evaluate, model_inputs
from dit_ds.files import full_disk_is_user_error, write_json
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize.drawing import side_by_side

_log = logging.getLogger("dit_ds")


def _trained(config: RunConfig, meta: dict[str, Any]) -> Sequence[str]:
    """The kinds of prompts that a model was trained with: weights that were not tuned, at step 0, are SAM's own."""
    return config.data.prompts if meta["step"] else ()


def device() -> torch.device:
    """Where one process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_kind(config: RunConfig, kind: str) -> None:
    """Refuse a prompt that the model can't read.

    Raises:
        UserError: LAVT and ReLA read words only; words mean nothing to a model that never learned any.
    """
    if kind == "text" and "text" not in config.data.prompts:
        learned = " or ".join(config.data.prompts)
        raise UserError(f"the model learned no words (data.prompts {config.data.prompts}): prompt it with a {learned}")
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
    check_kind(config, kind)
    if shuffle_text and kind != "text":
        raise UserError(f"--shuffle-text is about words, and the prompt is a {kind}: leave it out")
    dataset = dataset_of(config, split, data_root, kind, int(shuffle_text), _trained(config, meta))
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
    if world.main and not shuffle_text and binarize.threshold == config.eval.threshold:  # the run's own figures
        name, _, split_by = dataset.index.parts[0].name.partition("/")
        how = {"threshold": binarize.threshold, "mask_rule": binarize.rule, "shuffle_text": shuffle_text}
        how |= {"step": meta["step"], "dataset": name, "split_by": split_by}
        how |= {"no_target_pixels": binarize.no_target_pixels} if dataset.index.generalized else {}
        _leave_in_run(path, config, result | how)
    return result


def _leave_in_run(path: str | Path, config: RunConfig, result: dict[str, Any]) -> None:
    """Write a result as `evaluations/SPLIT-PROMPT-step_XXXXXXXX.json` in the folder of the run that the checkpoint is
    of, if it is in one; of a model that was not tuned, in the folder that its configuration names. A folder that can't be
    written is a warning: the result is on stdout."""
    if Path(path).suffix in (".yaml", ".yml"):
        run = Path(config.run_dir)
        if (run / "checkpoints").exists():  # a trained run's place: these would stand among its figures
            return
    elif Path(path).is_dir() and (found := checkpoint.find(path).resolve()).parent.name == "checkpoints":
        run = found.parent.parent
    else:
        return
    name = f"{result['split']}-{result['prompt']}-step_{result['step']:08d}.json"
    try:
        write_json(run / "evaluations" / name, result)
        if not (run / "config.yaml").exists():
            config.save(run / "config.yaml")
    except UserError as e:
        _log.warning(f"warning: the result is not kept: {e}")


def read_expression(text: str) -> str:
    """The words as the model is given them.

    Raises:
        UserError: there are none.
    """
    if not text.strip():
        raise UserError("--text is empty: say what to segment, as --text 'the left star'")
    return text.strip().lower()


def read_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8.

    Raises:
        UserError: it isn't there, or no picture.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as e:
        raise UserError(f"cannot read the picture {path} ({e.strerror or e})") from None


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
    words = None if text is None else read_expression(text)
    pixels = read_picture(image)
    _check_places(points, box, *pixels.shape[:2])
    model, config, meta = load_model(path)
    for kind, is_given in (("text", words is not None), ("point", bool(points)), ("box", box is not None)):
        if is_given:
            check_kind(config, kind)
    model.to(device())
    mask = segment(model, config, pixels, words, points, box, threshold, _trained(config, meta))
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
    text: str | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
    threshold: float | None = None,
    trained: Sequence[str] | None = None,
) -> np.ndarray:
    """Segment one picture.

    Args:
        pixels: (H, W, 3) uint8.
        text: words.
        points: x and y of points on the object, in pixels of the picture.
        box: XYXY around it.
        trained: as for `dataset_of`.
    Returns:
        (H, W) bool.
    """
    inputs = picture_inputs(config, pixels, text, points, box, trained)
    logits = model(**inputs).cpu()
    binarize = Binarize.of(config, threshold)
    return binarize(logits[0], inputs["size"][0], pixels.shape[:2], config.data.image_size).numpy()


def picture_inputs(
    config: RunConfig,
    pixels: np.ndarray,
    text: str | None = None,
    points: Sequence[tuple[float, float]] = (),
    box: tuple[float, float, float, float] | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """What the model takes, of one sample, by name and on its device; arguments as of `segment`."""
    d = config.data
    small = resize_image(pixels, d.image_size, d.resize)
    shape = torch.tensor([small.shape[:2]])
    given = {"text": text is not None, "point": bool(points), "box": box is not None}
    trained = d.prompts if trained is None else trained
    prompts = Prompts.of(trained, d.points, [k for k, is_given in given.items() if is_given])
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
    return model_inputs(batch | {"size": shape}, device())
