"""Who attends to what in the image encoder: the maps that its kernels never write down, from the same weights.

Nothing is approximated: a map times the values is the layer's own output (`tests/test_figures.py`). The layers are
observed from outside, by hooks, and know nothing of it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from dit_ds.models.attention import attention_map, relative_table


@dataclass(frozen=True)
class Maps:
    """What one layer's softmax gives; each row sums to one, padding words get nothing.

    Attributes:
        places: (B, heads, N, T+N): the visual queries over [words; image].
        words: (B, heads, T, T+N): the words' queries over the same; None where the layer reads no words.
    """

    places: Tensor
    words: Tensor | None


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention for one picture and expression, the mean over its heads.

    In a layer with windows a place attends to its own window, and a word once in each window; the mean over them is
    what goes on (`WordBlock`), so it is taken here, too.

    Attributes:
        by_word: (words, h, w) over the places that hold some of the picture: the row of each real word's query, its image keys only, so a row sums to less than one.
            Where words don't flow on (L-DIT), the formulation has these rows and discards their outputs (equation 8).
            None where the layer reads no words.
        received: (h, w): what each of these places receives, the mean over their queries.
        to_words: share of their queries' attention that goes to the expression's tokens, [CLS] and [SEP] included;
            None where the layer reads no words.
    """

    by_word: Tensor | None
    received: Tensor
    to_words: float | None


def layer_maps(attn: nn.Module, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Maps:
    """The maps of a layer.

    Args:
        attn: a `WordAttention`.
        x, words: (B, H, W, D) and (B, T, D), normalised, as the layer's attention takes them.
        word_mask: (B, T) bool, False at padding.
    """
    b, h, w, dim = x.shape
    qkv, of_words = attn.qkv(x.reshape(b, h * w, dim), words, flow=True)
    qkv = qkv.view(b, h * w, 3, attn.num_heads, -1)
    rel_h, rel_w = (relative_table(t, n).to(qkv.dtype) for t, n in ((attn.rel_pos_h, h), (attn.rel_pos_w, w)))
    if words is None:
        return Maps(attention_map(qkv, rel_h, rel_w), None)
    of_words = of_words.view(b, words.shape[1], 3, attn.num_heads, -1)
    places = attention_map(qkv, rel_h, rel_w, of_words[:, :, 1:], word_mask)
    return Maps(places, _word_map(qkv, of_words, word_mask))


def _word_map(qkv: Tensor, of_words: Tensor, word_mask: Tensor | None) -> Tensor:
    """The map of `attention.word_attention`, (B, heads, T, T+N); words have no place, so no positions are added."""
    q, k = of_words[:, :, 0], torch.cat([of_words[:, :, 1], qkv[:, :, 1]], dim=1)  # (B, T, heads, d), (B, T+N, ..)
    logits = torch.einsum("bthd,bkhd->bhtk", q * q.shape[-1] ** -0.5, k)
    if word_mask is not None:
        real = F.pad(word_mask, (0, qkv.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T+N)
        logits = logits.masked_fill(~real, float("-inf"))
    return logits.softmax(dim=-1)


Observer = Callable[[int, nn.Module, Tensor, Tensor | None, Tensor | None], None]


@contextlib.contextmanager
def observed(encoder: nn.Module, observer: Observer) -> Iterator[None]:
    """Within it `observer(layer, attn, x, words, word_mask)` is told, from 0 on, what each layer's attention is given.

    Args:
        encoder: an `ImageEncoder` whose attention is any but naive, which goes past the modules.
    """

    def hook(layer: int) -> Callable[..., None]:
        def observe(attn: nn.Module, args: tuple, kwargs: dict) -> None:
            given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
            observer(layer, attn, given["x"], given.get("words"), given.get("word_mask"))

        return observe

    handles = [
        block.attn.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(encoder.blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_of_picture(
    model: nn.Module, inputs: Mapping[str, Tensor], words: Tensor, layers: Collection[int] | None = None
) -> tuple[Tensor, dict[int, LayerAttention]]:
    """Segment one picture and look at its layers' attention.

    Args:
        model: a `DITSAM` in evaluation mode.
        inputs: what `Segmenter.forward` takes, by name, of one sample with words.
        words: (T,) bool: which tokens are real words, neither padding nor [CLS] nor [SEP].
        layers: which, from 0 on; None for all.
    Returns:
        The logits (1, s, s), and by layer what is shown of it.
    """
    encoder, found = model.image_encoder, {}
    grid = tuple(encoder.pos_embed.shape[1:3])
    picture = picture_places(inputs["size"][0], grid, model.image_size)

    def observer(layer: int, attn: nn.Module, x: Tensor, given: Tensor | None, mask: Tensor | None) -> None:
        if layers is None or layer in layers:
            maps = layer_maps(attn, x, given, mask)
            window = encoder.blocks[layer].window_size
            found[layer] = _summary(maps, grid, picture, words=words, tokens=inputs["token_mask"][0], window=window)

    with observed(encoder, observer):
        logits = model(**inputs)
    return logits, found


def picture_places(size: Tensor, grid: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Rows and columns of places that hold some of the picture, which is (2,) `size` pixels of the padded square."""
    return tuple(math.ceil(int(s) * n / image_size) for s, n in zip(size, grid))


def _summary(
    maps: Maps, grid: tuple[int, int], picture: tuple[int, int], words: Tensor, tokens: Tensor, window: int
) -> LayerAttention:
    """The mean over heads, and over windows where there are any, whose places are put together again.

    Args:
        words, tokens: (T,) bool: the expression's words, and those with what the tokenizer put around them.
    """
    h, w = picture
    weight = torch.zeros(1, *grid, 1, dtype=maps.places.dtype, device=maps.places.device)
    weight[:, :h, :w] = 1 / (h * w)  # of each place's query
    if window:
        weight, padded = window_partition(weight, window)  # (windows, window, window, 1), 0 where a window is padded

    def whole(rows: Tensor) -> Tensor:
        """(windows, R, places of a window) to (R, h, w)."""
        rows = rows.transpose(1, 2)
        if window:
            rows = window_unpartition(rows.unflatten(1, (window, window)), window, padded, grid)  # (1, H, W, R)
        return rows.view(*grid, -1)[:h, :w].permute(2, 0, 1).cpu()

    places = maps.places.mean(1)  # (windows, N, T+N)
    t = places.shape[-1] - places.shape[1]
    received = torch.einsum("wnk,wn->wk", places, weight.flatten(1))[:, None]  # (windows, 1, T+N)
    on_places = whole(received[..., t:])[0]
    if maps.words is None:
        return LayerAttention(None, on_places, None)
    rows = maps.words.mean(1)[:, : len(words)][:, words]  # (windows, words, T+N); behind the expression's are others
    by_word = whole(rows[..., t:]) / len(rows)
    return LayerAttention(by_word, on_places, float(received[..., : len(tokens)][..., tokens].sum()))
