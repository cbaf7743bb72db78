"""The paper's figures from your own checkpoints: predictions side by side (figure 4), attention by layer (figure 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything, which imports torchvision
from dit_ds.checkpointing.weights import load_model
from dit_ds.config.schema import RunConfig
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.jpeg import decode_jpeg
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, JSON, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.masks import decode_rle
from dit_ds.data.shards.storage import local
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import check_kind, device, picture_inputs, read_expression, read_picture
from dit_ds.evaluation.metrics import intersection_and_union
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.models.attention_maps import LayerAttention, attention_of_picture
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.visualize.drawing import AttentionRow, GridRow, draw_attention, picture_format, write_grid

_TITLES = {
    "default": "default SAM",
    "end_to_end": "E-DIT",
    "layer_wise": "L-DIT",
    "cascade": "Cascade DIT",
    "cross_attention": "CrossAtt",
    "cross_attention_ffn": "CrossAtt + FFN",
}
_METHODS = {"lavt": "LAVT", "rela": "ReLA"}


def title_of(config: RunConfig) -> str:
    """A run's name in a figure: its scheme, as the paper's tables call it, and what didn't train."""
    m = config.model
    name = _METHODS.get(m.name) or _TITLES.get(m.scheme, m.scheme)
    name += f" + {m.static_tokens} static" if m.static_tokens else ""
    frozen = [what for what, is_so in (("image", m.freeze_image_encoder), ("text", config.text.freeze)) if is_so]
    return f"{name} ({' and '.join(frozen)} frozen)" if frozen else name


# --- figure 4 -----------------------------------------------------------------------------------------------------


def grid(
    paths: list[str],
    out: str,
    split: str = "val",
    data_root: str | None = None,
    rows: int = 8,
    samples: list[int] | None = None,
    wrong_below: float = 0.5,
    titles: list[str] | None = None,
    across: int = 1,
    scale: int = 2,
) -> dict[str, Any]:
    """`dit-ds grid` (paper, figure 4): the same expressions, segmented by each checkpoint, wrong ones framed red.

    Args:
        paths: checkpoints of one data set; any methods and image sizes.
        rows: so many expressions, spread over the split.
        samples: these, by their number in the split from 0 on, instead.
        wrong_below: IoU under which a prediction is wrong.
        titles: of the checkpoints; None for `title_of`.
        across, scale: as in `visualize.write_grid`.
    Returns:
        `out`, `split`, `titles`, `wrong_below`, `miou` (of each checkpoint over what is shown) and `samples`: number,
        text, and each checkpoint's IoU.
    Raises:
        UserError: checkpoints of different sets, a sample that isn't there, as many titles as there aren't checkpoints.
    """
    picture_format(out)
    if titles and len(titles) != len(paths):
        raise UserError(f"{len(titles)} titles for {len(paths)} checkpoints: give one for each")
    shown, found, first = [], [], None
    for path in paths:
        model, config, _ = load_model(path)
        dataset = build_eval_dataset(config, split, data_root)
        first = first or (path, config, dataset)
        _require_same_set(first, (path, config, dataset))
        chosen = _choose(len(dataset), split, rows, samples)
        found.append(list(_predictions(model.to(device()), config, dataset, chosen)))
        shown.append(title_of(config))
    table = [
        GridRow(first[2].picture(s), batch["text"][0], batch["original"][0].astype(bool), [of[i][1:] for of in found])
        for i, (s, (batch, *_)) in enumerate(zip(chosen, found[0]))
    ]
    write_grid(table, titles or shown, out, wrong_below, across, scale)
    ious = np.array([[iou for _, iou in row.predictions] for row in table])  # (expressions, checkpoints)
    return {
        "out": out,
        "split": split,
        "titles": titles or shown,
        "wrong_below": wrong_below,
        "miou": ious.mean(0).tolist(),
        "samples": [{"sample": s, "text": row.text, "ious": of.tolist()} for s, row, of in zip(chosen, table, ious)],
    }


def grid_lines(result: dict[str, Any]) -> list[str]:
    """What `grid` returns, for people."""
    lines = [result["out"]]
    for k, (title, miou) in enumerate(zip(result["titles"], result["miou"])):
        wrong = sum(s["ious"][k] < result["wrong_below"] for s in result["samples"])
        lines.append(f"{title}: mIoU {miou:.3f} of these {len(result['samples'])}, {wrong} wrong")
    return lines


def contact_sheet(path: str, out: str, split: str, data_root: str | None = None, rows: int = 8) -> dict[str, Any]:
    """`dit-ds sheet`: a grid of one checkpoint, two expressions side by side."""
    result = grid([path], out, split, data_root, rows, wrong_below=0.0, titles=["prediction"], across=2, scale=1)
    return {"out": out, "rows": len(result["samples"]), "miou": result["miou"][0]}


Opened = tuple[str, RunConfig, ExpressionDataset]


def _require_same_set(a: Opened, b: Opened) -> None:
    """Sample numbers mean the same expressions in both."""
    names = [config.data.val_set for _, config, _ in (a, b)]
    if names[0] != names[1]:
        raise UserError(f"{a[0]} is of {names[0]}, {b[0]} of {names[1]}: compare checkpoints of one data set")
    if a[2].index.manifest_sha != b[2].index.manifest_sha:
        raise UserError(f"{a[0]} and {b[0]} have different shards of {names[0]}: name those to show with --data-root")


def _choose(n: int, split: str, rows: int, samples: list[int] | None) -> list[int]:
    if samples is None:
        return [int(s) for s in np.linspace(0, n - 1, min(rows, n))]
    for s in samples:
        if s >= n:
            raise UserError(f"no sample {s} in {split}: it has 0 to {n - 1}")
    return samples


@torch.no_grad()
def _predictions(
    model: Any, config: RunConfig, dataset: ExpressionDataset, chosen: list[int]
) -> Iterator[tuple[dict[str, Any], np.ndarray, float]]:
    """The batch of each sample, its (H, W) prediction and IoU."""
    binarize = MaskPostprocess.of(config)
    for batch in iterate(make_loader(dataset, [[(0, s, 1.0)] for s in chosen], workers=0, pin=False)):
        truth = batch["original"][0]
        logits = model(**model_inputs(batch, device())).cpu()
        prediction = binarize(logits[0], batch["size"][0], truth.shape, config.data.image_size).numpy()
        shared, union = intersection_and_union(prediction, truth)
        yield batch, prediction, shared / max(1, union)


# --- figure 5 -----------------------------------------------------------------------------------------------------

_NOTE = (
    "With words in the encoder: where the words' queries look, mean over heads and words;\n"
    "“words”: share of the image's attention that goes to words. Without: what each place “received” from all.\n"
    "“peak”: largest over mean. Each panel has its own colours, from its least (dark) to its most (bright)."
)


def attention(
    paths: list[str], image: str, text: str, out: str, words: bool = False, layers: list[int] | None = None
) -> dict[str, Any]:
    """`dit-ds attention` (paper, figure 5): what the text attends to in each layer of the ViT, by each checkpoint.

    What a panel shows, exactly, from the layer's own weights and inputs (`models/attention_maps.py`):

    - Where words are in the layer's attention (E-DIT, L-DIT): the softmax rows of the words' queries over
      [words; image], their image keys only, the mean over heads and over the real words: neither padding nor [CLS] nor
      [SEP]. What L-DIT's words attend to is part of its formulation though its result is discarded (equation 8).
    - Where they are not (default SAM): what each place receives from all places of the picture, the mean over their
      queries and over heads.

    Places that hold nothing of the picture are neither drawn nor averaged over. A panel's colours go from its least to
    its largest value, so they compare places and not panels; its `peak`, the largest over the mean, says how much
    there is to see. `to_words` is the share of the picture's queries' attention that goes to the expression's tokens,
    the measure of where text and image meet: the paper finds higher layers with a frozen backbone, shallow ones with a
    tuned one (appendix B).

    Args:
        image: file of the picture.
        words: a row for each word (each piece of one that the tokenizer splits) below that of all, for one checkpoint.
        layers: which, from 1 on; None for all.
    Returns:
        `out`, `text`, and for each checkpoint (`checkpoints`) its `checkpoint`, `title`, `shows` (words or places),
        `words`, `covered` (share of the picture that the prediction covers) and `layers`: `layer`, `peak`, `to_words`
        and `words_to_image`, the share of the words' attention that is on the picture; null without words.
    Raises:
        UserError: a checkpoint of another method, a layer that isn't there, `words` without words in the encoder.
    """
    picture_format(out)
    if words and len(paths) > 1:
        raise UserError("--words is for one checkpoint: name one")
    text, pixels = read_expression(text), read_picture(image)
    attended = [_attend(path, pixels, text, layers) for path in paths]
    rows = []
    for of in attended:
        rows.append(_row(of, of.title, of.prediction, {i: _shown(x) for i, x in of.layers.items()}))
        if words:
            rows += _rows_of_words(of)
    draw_attention(pixels, text, rows, _NOTE, out)
    return {"out": out, "text": text, "checkpoints": [_report(of) for of in attended]}


@dataclass(frozen=True)
class _Attended:
    """What one checkpoint does with the picture; `place` is as in `AttentionRow`, `layers` are numbered from 1 on."""

    path: str
    title: str
    words: list[str]
    prediction: np.ndarray
    layers: dict[int, LayerAttention]
    place: tuple[float, float]


@torch.no_grad()
def _attend(path: str, pixels: np.ndarray, text: str, layers: list[int] | None) -> _Attended:
    model, config, _ = load_model(path)
    if config.model.name != "dit_sam":
        raise UserError(f"{path} is of model.name {config.model.name}: attention is drawn of dit_sam's ViT only")
    check_kind(config, "text")
    encoder = model.to(device()).image_encoder
    missing = [i for i in layers or [] if not 1 <= i <= len(encoder.blocks)]
    if missing:
        raise UserError(f"no layer {missing[0]} in {path}: it has 1 to {len(encoder.blocks)}")
    tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
    inputs = picture_inputs(config, pixels, text)
    tokens, size = inputs["tokens"].cpu(), inputs["size"].cpu()
    ends = torch.tensor(tokenizer.all_special_ids)  # BERT's [CLS] and [SEP], CLIP's start and end of text
    words = inputs["token_mask"][0].cpu() & ~torch.isin(tokens[0], ends)
    if not words.any():
        raise UserError(f"--text '{text}' has no word for the text encoder: use others")
    chosen = None if layers is None else {i - 1 for i in layers}
    logits, found = attention_of_picture(model, inputs, words.to(device()), chosen)
    binarize = MaskPostprocess.of(config)
    prediction = binarize(logits[0].cpu(), size[0], pixels.shape[:2], config.data.image_size).numpy()
    patch = model.image_size / encoder.pos_embed.shape[1]
    place = tuple(patch * whole / int(part) for whole, part in zip(pixels.shape[:2], size[0]))
    names = tokenizer.convert_ids_to_tokens(tokens[0][words].tolist())
    return _Attended(path, title_of(config), names, prediction, {i + 1: x for i, x in sorted(found.items())}, place)


def _shown(of: LayerAttention) -> Tensor:
    """(h, w): of all words, or what places receive."""
    return of.received if of.by_word is None else of.by_word.mean(0)


def _peak(values: Tensor) -> float:
    return float(values.max() / values.mean())


def _row(of: _Attended, title: str, prediction: np.ndarray | None, maps: dict[int, Tensor]) -> AttentionRow:
    labels = {i: f"peak {_peak(x):.1f}" for i, x in maps.items()}
    for i, layer in of.layers.items() if prediction is not None else ():
        what = "received" if layer.to_words is None else f"words {layer.to_words:.1%}"
        labels[i] = f"{what}, {labels[i]}"
    return AttentionRow(title, prediction, {i: (x.numpy(), labels[i]) for i, x in maps.items()}, of.place)


def _rows_of_words(of: _Attended) -> list[AttentionRow]:
    without = [i for i, x in of.layers.items() if x.by_word is None]
    if without:
        raise UserError(f"{of.path} has no words in its ViT's attention: leave --words out")
    return [_row(of, word, None, {i: x.by_word[k] for i, x in of.layers.items()}) for k, word in enumerate(of.words)]


def _report(of: _Attended) -> dict[str, Any]:
    layers = [
        {
            "layer": i,
            "peak": _peak(_shown(x)),
            "to_words": x.to_words,
            "words_to_image": None if x.by_word is None else float(x.by_word.sum((1, 2)).mean()),
        }
        for i, x in of.layers.items()
    ]
    reads = any(x.by_word is not None for x in of.layers.values())
    return {
        "checkpoint": of.path,
        "title": of.title,
        "shows": "words" if reads else "places",
        "words": of.words,
        "covered": float(of.prediction.mean()),
        "layers": layers,
    }


def attention_lines(result: dict[str, Any]) -> list[str]:
    """What `attention` returns, for people: a line a checkpoint."""
    lines = [result["out"]]
    for of in result["checkpoints"]:
        if of["shows"] == "places":
            lines.append(f"{of['title']}: no words in the encoder; shown is what each place receives")
        else:
            shares = "  ".join(f"{x['layer']}: {x['to_words']:.1%}" for x in of["layers"] if x["to_words"] is not None)
            lines.append(f"{of['title']}: the image's attention to words by layer  {shares}")
    return lines


_SHEET, _ACROSS = 24, 3


def draw_sheet(folder: str | Path, split: str, out: str | Path, seed: int) -> None:
    """Write random expressions of a split, the same for the same seed, each with its picture and mask.

    Raises:
        UserError: no such set or split, a damaged sample, or a sheet that can't be written.
    """
    index = SplitIndex.load(local(folder), split)
    reader, rows = MemberReader(index), []
    count = min(_SHEET, len(index.sentences))
    for sentence in np.random.default_rng(seed).choice(len(index.sentences), count, replace=False):
        image, position, first, _ = index.refs[index.sentences[sentence]].tolist()
        meta = index.parse(image, reader.read(image, JSON))
        ref = meta["refs"][position]
        truth = np.zeros((meta["height"], meta["width"]), bool)
        for ann in ref["ann_ids"]:
            truth |= decode_rle(meta["anns"][str(ann)]["rle"]).astype(bool)
        rows.append(
            GridRow(decode_jpeg(reader.read(image, JPG)), ref["sentences"][sentence - first]["sent"], truth, [])
        )
    write_grid(rows, [], out, across=_ACROSS)
