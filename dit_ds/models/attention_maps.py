"""Attention maps of the image encoder, which its kernels never materialise, computed from the same weights.

They are exact: a map times the values is the layer's own output (`tests/test_figures.py`). The layers are observed by
forward hooks.

Shapes: B samples, T text tokens, N = H*W visual tokens, `heads` heads of width d.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor

from dit_ds.models.attention import attention_map, relative_table
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import ImageEncoder, JointAttention


@dataclass(frozen=True)
class Maps:
    """One layer's softmax; each row sums to one, text padding gets zero.

    Attributes:
        visual: (B, heads, N, T+N): the visual queries over [text; visual] keys.
        text: (B, heads, T, T+N): the text queries over the same; None where the layer reads no text.
    """

    visual: Tensor
    text: Tensor | None


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention for one picture and expression, the mean over its heads.

    In a layer with windows a visual token attends within its window, and a text token once in each window; `JointBlock`
    passes on the mean over the windows, so the mean is taken here, too.

    Attributes:
        by_word: (words, h, w) over the visual tokens that hold some of the picture: the row of each word's query, its
            visual keys only, so a row sums to less than one. In L-DIT the outputs of these rows are discarded
            (equation 8). None where the layer reads no text.
        received: (h, w): what each of these visual tokens receives, the mean over their queries.
        to_words: share of their queries' attention that goes to the expression's tokens, [CLS] and [SEP] included;
            None where the layer reads no text.
    """

    by_word: Tensor | None
    received: Tensor
    to_words: float | None


def layer_maps(attn: JointAttention, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Maps:
    """The maps of a layer.

    Args:
        attn: a `JointAttention`.
        x, text: (B, H, W, D) and (B, T, D), normalised, as the layer's attention takes them.
        text_mask: (B, T) bool, False at padding.
    """
    h, w = x.shape[1:3]
    qkv, text_qkv = (
        None if y is None else rearrange(y, "b n (three heads d) -> b n three heads d", three=3, heads=attn.num_heads)
        for y in attn.qkv(rearrange(x, "b h w d -> b (h w) d"), text, update_text=True)
    )
    assert qkv is not None
    rel_h, rel_w = (relative_table(t, n).to(qkv.dtype) for t, n in ((attn.rel_pos_h, h), (attn.rel_pos_w, w)))
    if text_qkv is None:
        return Maps(attention_map(qkv, rel_h, rel_w), None)
    visual = attention_map(qkv, rel_h, rel_w, text_qkv[:, :, 1:], text_mask)
    return Maps(visual, _text_map(qkv, text_qkv, text_mask))


def _text_map(qkv: Tensor, text_qkv: Tensor, text_mask: Tensor | None) -> Tensor:
    """The map of `attention.text_attention`, (B, heads, T, T+N); text has no coordinates: no relative positions."""
    q, k = text_qkv[:, :, 0], torch.cat([text_qkv[:, :, 1], qkv[:, :, 1]], dim=1)  # (B, T, heads, d), (B, T+N, ..)
    logits = torch.einsum("bthd,bkhd->bhtk", q * q.shape[-1] ** -0.5, k)
    if text_mask is not None:
        real = F.pad(text_mask, (0, qkv.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T+N)
        logits = logits.masked_fill(~real, float("-inf"))
    return logits.softmax(dim=-1)


Observer = Callable[[int, JointAttention, Tensor, Tensor | None, Tensor | None], None]


@contextlib.contextmanager
def observed(encoder: ImageEncoder, observer: Observer) -> Iterator[None]:
    """A context in which `observer(layer, attn, x, text, text_mask)` gets the inputs of each layer's attention.

    Args:
        encoder: with any attention but naive, which does not call the attention modules.
    """

    def hook(layer: int) -> Callable[..., None]:
        def observe(attn: JointAttention, args: tuple, kwargs: dict) -> None:
            given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
            observer(layer, attn, given["x"], given.get("text"), given.get("text_mask"))

        return observe

    blocks: Iterable[Any] = encoder.blocks
    handles = [block.attn.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_of_picture(
    model: DITSAM, inputs: Mapping[str, Tensor], words: Tensor, layers: Collection[int] | None = None
) -> tuple[Tensor, dict[int, LayerAttention]]:
    """Segment one picture and look at its layers' attention.

    Args:
        model: in evaluation mode.
        inputs: what `Segmenter.forward` takes, by name, of one sample with text.
        words: (T,) bool: which tokens are words, neither padding nor [CLS] nor [SEP].
        layers: which, from 0 on; None for all.
    Returns:
        The logits (1, s, s), and the attention by layer.
    """
    encoder = model.image_encoder
    found: dict[int, LayerAttention] = {}
    grid = encoder.grid
    picture = picture_grid(inputs["size"][0], grid, model.image_size)

    def observer(layer: int, attn: JointAttention, x: Tensor, given: Tensor | None, mask: Tensor | None) -> None:
        if layers is None or layer in layers:
            maps = layer_maps(attn, x, given, mask)
            block: Any = encoder.blocks[layer]
            tokens = inputs["token_mask"][0]
            found[layer] = _summary(maps, grid, picture, words=words, tokens=tokens, window=block.window_size)

    with observed(encoder, observer):
        logits = model(**inputs)
    return logits, found


def picture_grid(size: Tensor, grid: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Rows and columns of the visual tokens that hold some of the picture, of `size` (2,) pixels in the padded square."""
    rows, columns = (math.ceil(int(s) * n / image_size) for s, n in zip(size, grid))
    return rows, columns


def _summary(
    maps: Maps, grid: tuple[int, int], picture: tuple[int, int], words: Tensor, tokens: Tensor, window: int
) -> LayerAttention:
    """The mean over heads, and over windows where there are any; windows are put back into the grid.

    Args:
        words, tokens: (T,) bool: the expression's words, and these with [CLS] and [SEP].
    """
    h, w = picture
    weight = torch.zeros(1, *grid, 1, dtype=maps.visual.dtype, device=maps.visual.device)
    weight[:, :h, :w] = 1 / (h * w)  # of each visual query
    if window:
        weight, padded = window_partition(weight, window)  # (windows, window, window, 1), 0 where a window is padded

    def whole(rows: Tensor) -> Tensor:
        """(windows, R, tokens of a window) to (R, h, w)."""
        rows = rows.transpose(1, 2)
        if window:
            rows = window_unpartition(rows.unflatten(1, (window, window)), window, padded, grid)  # (1, H, W, R)
        return rows.view(*grid, -1)[:h, :w].permute(2, 0, 1).cpu()

    visual = maps.visual.mean(1)  # (windows, N, T+N)
    t = visual.shape[-1] - visual.shape[1]
    received = torch.einsum("wnk,wn->wk", visual, weight.flatten(1))[:, None]  # (windows, 1, T+N)
    on_grid = whole(received[..., t:])[0]
    if maps.text is None:
        return LayerAttention(None, on_grid, None)
    rows = maps.text.mean(1)[:, : len(words)][:, words]  # (windows, words, T+N), without static tokens
    by_word = whole(rows[..., t:]) / len(rows)
    return LayerAttention(by_word, on_grid, float(received[..., : len(tokens)][..., tokens].sum()))
