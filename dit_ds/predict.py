"""What a trained checkpoint does: evaluate a split, segment one picture, fill a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_ds.config import RunConfig
from dit_ds.data.loader import ExpressionDataset, SplitIndex, checked, make_loader, make_tokenize
from dit_ds.data.transforms import pad_square, resize_image
from dit_ds.distributed import connect, disconnect
from dit_ds.errors import UserError
from dit_ds.evaluate import INPUTS, evaluate, original_probabilities
from dit_ds.files import full_disk_is_user_error
from dit_ds.metrics import intersection_and_union
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize import side_by_side, write_sheet
from dit_ds.weights import load_model


def _dataset(config: RunConfig, split: str, data_root: str | None, sentence_shift: int = 0) -> ExpressionDataset:
    d = config.data
    index = SplitIndex.load(Path(data_root or d.root) / d.dataset / d.split_by, split)
    tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), d.tokens)
    return ExpressionDataset(index, "sentence", d.image_size, tokenize, sentence_shift=sentence_shift, resize=d.resize)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_checkpoint(
    path: str,
    split: str,
    data_root: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shuffle_text: bool = False,
    threshold: float | None = None,
    predictions: str | None = None,
) -> dict[str, Any]:
    """`dit-ds eval`: the metrics of one split, the same digits on any number of ranks.

    Args:
        shuffle_text: give each image the expressions of another: what remains is what the image alone gives away.
        predictions: folder for the predicted masks, as `IMAGEID_EXPRESSION.png`.
    """
    model, config, _ = load_model(path)
    dataset = _dataset(config, split, data_root, sentence_shift=1 if shuffle_text else 0)
    collect = None
    if predictions is not None:
        folder = Path(predictions)
        with full_disk_is_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)

        def collect(batch: dict[str, Any], i: int, mask: np.ndarray) -> None:
            with full_disk_is_user_error(folder):
                name = f"{batch['image_id'][i]:012d}_{int(batch['sample'][i]):06d}.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name)

    world = connect()
    metrics = evaluate(
        model.to(world.device),
        dataset,
        batch_size or config.eval.batch_size,
        threshold or config.eval.threshold,
        config.data.workers if workers is None else workers,
        world,
        collect,
    )
    disconnect()
    return {"split": split} | metrics


@torch.no_grad()
def predict_image(path: str, image: str, text: str, out: str, threshold: float | None = None) -> dict[str, Any]:
    """`dit-ds predict`: write the picture beside the picture with the mask; return how much of it the mask covers."""
    if not text.strip():
        raise UserError("--text is empty: say what to segment, as --text 'the left star'")
    try:
        pixels = np.asarray(Image.open(image).convert("RGB"))
    except OSError as e:
        raise UserError(f"cannot read the picture {image} ({e.strerror or e})") from None
    model, config, _ = load_model(path)
    model.to(_device())
    tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), config.data.tokens)
    mask = segment(model, config, pixels, text.strip().lower(), tokenize, threshold)
    with full_disk_is_user_error(out):
        side_by_side(pixels, mask, text).save(out, "PNG")
    return {"out": out, "text": text, "covered": round(float(mask.mean()), 4)}


@torch.no_grad()
def segment(
    model: Any, config: RunConfig, pixels: np.ndarray, text: str, tokenize: Any, threshold: float | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 and words to a (H, W) bool mask."""
    size = config.data.image_size
    small = np.asarray(resize_image(pixels, size, config.data.resize))
    tokens, real = tokenize(text)
    image = torch.from_numpy(pad_square(small, size).transpose(2, 0, 1).copy())[None]
    shape = torch.tensor([small.shape[:2]])
    inputs = (image, shape, torch.from_numpy(tokens)[None], torch.from_numpy(real)[None])
    logits = model(*(x.to(_device()) for x in inputs)).cpu()
    probability = original_probabilities(logits[0], shape[0], pixels.shape[:2], size)
    return (probability > (threshold or config.eval.threshold)).numpy()


@torch.no_grad()
def contact_sheet(path: str, out: str, split: str, data_root: str | None = None, rows: int = 8) -> dict[str, Any]:
    """`dit-ds sheet`: expressions spread over a split, each with its image, ground truth and prediction."""
    model, config, _ = load_model(path)
    model.to(_device())
    dataset = _dataset(config, split, data_root)
    chosen = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int)
    loader = make_loader(dataset, [[(0, int(s), 1.0)] for s in chosen], workers=0, pin=False)
    panels = []
    for batch in checked(loader):
        truth = batch["original"][0]
        logits = model(*(batch[k].to(_device()) for k in INPUTS)).cpu()
        probability = original_probabilities(logits[0], batch["size"][0], truth.shape, config.data.image_size)
        prediction = (probability > config.eval.threshold).numpy()
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
