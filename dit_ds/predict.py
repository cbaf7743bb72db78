"""What a trained checkpoint does: evaluate a split, segment one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_ds.config import RunConfig
from dit_ds.data.loader import ExpressionDataset, SplitIndex, make_tokenize
from dit_ds.data.transforms import pad_square, resize_image
from dit_ds.distributed import connect, disconnect
from dit_ds.errors import UserError
from dit_ds.evaluate import INPUTS, evaluate, original_probabilities
from dit_ds.files import full_disk_is_user_error
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize import side_by_side
from dit_ds.weights import load_model


def dataset_of(config: RunConfig, split: str, data_root: str | None, sentence_shift: int = 0) -> ExpressionDataset:
    """A split as a run's evaluation sees it; `data_root` where its shards are, if not where the run had them."""
    d = config.data
    index = SplitIndex.load(Path(data_root or d.root) / d.dataset / d.split_by, split)
    tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), d.tokens)
    return ExpressionDataset(index, "sentence", d.image_size, tokenize, sentence_shift=sentence_shift, resize=d.resize)


def device() -> torch.device:
    """Where one process computes."""
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
    dataset = dataset_of(config, split, data_root, sentence_shift=1 if shuffle_text else 0)
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
def predict_image(path: str, image: str, text: str, out: str, threshold: float | None = None) -> dict[str, Any]:
    """`dit-ds predict`: write the picture beside the picture with the mask; return how much of it the mask covers."""
    expression, pixels = read_expression(text), read_picture(image)
    model, config, _ = load_model(path)
    model.to(device())
    tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), config.data.tokens)
    mask = segment(model, config, pixels, expression, tokenize, threshold)
    with full_disk_is_user_error(out):
        side_by_side(pixels, mask, text).save(out, "PNG")
    return {"out": out, "text": text, "covered": round(float(mask.mean()), 4)}


@torch.no_grad()
def segment(
    model: Any, config: RunConfig, pixels: np.ndarray, text: str, tokenize: Any, threshold: float | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 and words to a (H, W) bool mask."""
    inputs = picture_inputs(config, pixels, text, tokenize)
    logits = model(**inputs).cpu()
    return predicted_mask(logits[0], inputs["size"][0], pixels.shape[:2], config, threshold)


def picture_inputs(config: RunConfig, pixels: np.ndarray, text: str, tokenize: Any) -> dict[str, Tensor]:
    """(H, W, 3) uint8 and words to what `Segmenter.forward` takes, of one sample, by name and on its device."""
    size = config.data.image_size
    small = np.asarray(resize_image(pixels, size, config.data.resize))
    tokens, real = tokenize(text)
    image = torch.from_numpy(pad_square(small, size).transpose(2, 0, 1).copy())[None]
    shape = torch.tensor([small.shape[:2]])
    values = (image, shape, torch.from_numpy(tokens)[None], torch.from_numpy(real)[None])
    return {name: x.to(device()) for name, x in zip(INPUTS, values)}


def predicted_mask(
    logits: Tensor, size: Tensor, shape: tuple[int, int], config: RunConfig, threshold: float | None = None
) -> np.ndarray:
    """One sample's (s, s) logits to a (H, W) bool mask; `size` and `shape` as in `original_probabilities`."""
    probability = original_probabilities(logits, size, shape, config.data.image_size)
    return (probability > (threshold or config.eval.threshold)).numpy()
