"""The paper's figure 5 from your own checkpoints: what the text attends to in each layer of the ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything, which imports torchvision
from dit_ds.data.picture import read_picture
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import check_kind, expression_warnings, read_expression, size_of
from dit_ds.evaluation.postprocess import ScoredMask, model_inputs
from dit_ds.evaluation.predictor import Predictor
from dit_ds.files import refuse_overwriting
from dit_ds.models.attention_maps import LayerAttention, attention_of_picture
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize.drawing import AttentionRow, draw_attention, picture_format
from dit_ds.visualize.titles import title_of

_NOTE = (
    "With words in the encoder: where the words' queries look, mean over heads and words;\n"
    "“words”: share of the image's attention that goes to words. Without: what each place “received” from all.\n"
    "“peak”: largest over mean. Each panel has its own colours, from its least (dark) to its most (bright)."
)


def attention(
    paths: list[str], image: str, text: str, out: str, *, by_word: bool = False, layers: list[int] | None = None
) -> dict[str, Any]:
    """`dit-ds attention` (paper, figure 5): what the text attends to in each layer of the ViT, by each checkpoint.

    What a panel shows, exactly, from the layer's weights and inputs (`models/attention_maps.py`):

    - Where text tokens are in the layer's attention (E-DIT, L-DIT): the softmax rows of the text queries over
      [text; image], their image keys only, the mean over heads and over the tokens of the expression: neither padding
      nor [CLS] nor [SEP]. L-DIT's formulation has these rows, too, though it discards their outputs (equation 8).
    - Where they are not (default SAM): what each patch receives from all patches of the picture, the mean over their
      queries and over heads.

    Patches of padding are neither drawn nor averaged over. A panel's colours go from its least to its largest value, so
    they compare patches and not panels; its `peak`, the largest over the mean, is the contrast. `to_words` is the share
    of the image queries' attention that goes to the expression's tokens, the measure of where text and image meet: the
    paper finds higher layers with a frozen backbone, shallow ones with a tuned one (appendix B).

    Args:
        paths: checkpoints of DIT-SAM.
        image: file of the picture, which is turned as viewers turn it.
        by_word: a row for each token of the expression, too, below that of all; for one checkpoint.
        layers: which, from 1 on; None for all.
    Returns:
        `out`, `text`, and for each checkpoint (`checkpoints`) its `checkpoint`, `title`, `shows` (words or places),
        `words`, `covered` (share of the picture that the prediction covers) and `layers`: `layer`, `peak`, `to_words`
        and `words_to_image`, the share of the text's attention that goes to the picture; both null without text;
        `warnings`, a line each.
    Raises:
        UserError: a checkpoint of another method, no such layer, or `by_word` without text in the encoder.
    """
    picture_format(out)
    refuse_overwriting(out, image)
    if by_word and len(paths) > 1:
        raise UserError("--words is for one checkpoint: name one")
    text, pixels = read_expression(text), read_picture(image)
    attended = []
    for path in paths:
        attended.append(attend(Predictor.load(path), path, pixels, text, layers=layers))
    rows = []
    for a in attended:
        rows.append(AttentionRow(a.title, a.prediction.mask, a.panels(), a.patch))
        if by_word:
            rows += _word_rows(a)
    draw_attention(pixels, text, rows, _NOTE, out)
    warnings = list(dict.fromkeys(line for a in attended for line in a.warnings))
    return {"out": out, "text": text, "checkpoints": [_report(a) for a in attended], "warnings": warnings}


@dataclass(frozen=True)
class Attended:
    """One checkpoint's prediction and attention for the picture.

    Attributes:
        words: the expression's tokens.
        warnings: of `expression_warnings`.
        prediction: the mask and its score.
        layers: by number, from 1 on.
        patch: as in `AttentionRow`.
    """

    path: str
    title: str
    words: list[str]
    warnings: list[str]
    prediction: ScoredMask
    layers: dict[int, LayerAttention]
    patch: tuple[float, float]

    def panels(self) -> dict[int, tuple[np.ndarray, str]]:
        """Each layer's map (h, w) and what is said under it: as in `AttentionRow`."""
        shown = {}
        for i, layer in self.layers.items():
            what = "received" if layer.to_words is None else f"words {layer.to_words:.1%}"
            shown[i] = (_shown_map(layer).numpy(), f"{what}, {_peak_label(_shown_map(layer))}")
        return shown


@torch.no_grad()
def attend(
    predictor: Predictor,
    path: str,
    pixels: np.ndarray,
    text: str,
    *,
    points: Sequence[tuple[float, ...]] = (),
    box: tuple[float, ...] | None = None,
    layers: list[int] | None = None,
) -> Attended:
    """Segment a picture and look at each layer's attention; see `attention`.

    Args:
        predictor: the model.
        path: it was loaded from, for messages.
        pixels: (H, W, 3) uint8.
        text: as `read_expression` returned it.
        points, box: as for `Predictor.segment`.
        layers: which, from 1 on; None for all.
    Raises:
        UserError: a model of another method, no such layer, or no word for the text encoder.
    """
    model, config = predictor.model, predictor.config
    if not isinstance(model, DITSAM):
        raise UserError(f"{path} is of model.name {config.model.name}: attention is drawn of dit_sam's ViT only")
    check_kind(config, "text")
    encoder = model.image_encoder
    missing = [i for i in layers or [] if not 1 <= i <= len(encoder.blocks)]
    if missing:
        raise UserError(f"no layer {missing[0]} in {path}: it has 1 to {len(encoder.blocks)}")
    maker, tokenizer = predictor.inputs, load_tokenizer(config.text.tokenizer or config.text.name)
    small = maker.resized(pixels)
    prompt = maker.prompt(text, points, box, original=size_of(pixels), resized=size_of(small))
    batch = maker.collate([small], [prompt])
    tokens, size = batch["tokens"], batch["size"]
    ends = torch.tensor(tokenizer.all_special_ids)  # BERT's [CLS] and [SEP], CLIP's start and end of text
    is_word = batch["token_mask"][0] & ~torch.isin(tokens[0], ends)  # (N,)
    if not is_word.any():
        raise UserError(f"--text '{text}' has no word for the text encoder: use others")
    chosen = None if layers is None else {i - 1 for i in layers}
    inputs = model_inputs(batch, predictor.device)
    logits, found = attention_of_picture(model, inputs, is_word.to(predictor.device), chosen)
    prediction = predictor.postprocess.scored(logits[0].cpu(), size[0], size_of(pixels), config.data.image_size)
    side = model.image_size / encoder.grid[0]  # of a patch, in pixels of the square
    height, width = (side * whole / int(part) for whole, part in zip(pixels.shape[:2], size[0]))
    words = tokenizer.convert_ids_to_tokens(tokens[0][is_word].tolist())
    by_layer = {i + 1: x for i, x in sorted(found.items())}
    warnings = expression_warnings(config, text)
    return Attended(path, title_of(config), words, warnings, prediction, layers=by_layer, patch=(height, width))


def _shown_map(layer: LayerAttention) -> Tensor:
    """(h, w): the mean over the expression's tokens, or what patches receive."""
    return layer.received if layer.by_word is None else layer.by_word.mean(0)


def _peak(values: Tensor) -> float:
    return float(values.max() / values.mean())


def _peak_label(values: Tensor) -> str:
    return f"peak {_peak(values):.1f}"


def _word_rows(a: Attended) -> list[AttentionRow]:
    """A row for each token of the expression."""
    by_layer = {i: x.by_word for i, x in a.layers.items() if x.by_word is not None}
    if len(by_layer) < len(a.layers):
        raise UserError(f"{a.path} has no words in its ViT's attention: leave --words out")
    return [
        AttentionRow(word, None, {i: (x[k].numpy(), _peak_label(x[k])) for i, x in by_layer.items()}, a.patch)
        for k, word in enumerate(a.words)
    ]


def _report(a: Attended) -> dict[str, Any]:
    layers = [
        {
            "layer": i,
            "peak": _peak(_shown_map(x)),
            "to_words": x.to_words,
            "words_to_image": None if x.by_word is None else float(x.by_word.sum((1, 2)).mean()),
        }
        for i, x in a.layers.items()
    ]
    reads = any(x.by_word is not None for x in a.layers.values())
    return {
        "checkpoint": a.path,
        "title": a.title,
        "shows": "words" if reads else "places",
        "words": a.words,
        "covered": float(a.prediction.mask.mean()),
        "layers": layers,
    }


def attention_lines(result: dict[str, Any]) -> list[str]:
    """The result of `attention` as lines for people, one for each checkpoint."""
    lines = [result["out"]]
    for entry in result["checkpoints"]:
        title, layers = entry["title"], entry["layers"]
        if entry["shows"] == "places":
            lines.append(f"{title}: no words in the encoder; shown is what each place receives")
        else:
            shares = "  ".join(f"{x['layer']}: {x['to_words']:.1%}" for x in layers if x["to_words"] is not None)
            lines.append(f"{title}: the image's attention to words by layer  {shares}")
    return lines
