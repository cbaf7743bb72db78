"""Attention of visual queries over [words; visual] keys with SAM's decomposed relative positions.

Words are keys and values only. They have no place in the picture, so their relative-position term is zero.

Backends:
    eager: SAM's own arithmetic; materialises the (B, heads, N, T+N) map. The reference.
    chunked, sdpa, xformers (and sdpa_flash, sdpa_efficient, sdpa_cudnn, to compare): kernels that keep no map, see
        `attention_kernels`. They run on a few samples at a time, and the backward pass makes their operands again:
        what waits for it is q, k, v, the small position tables, the output and the log-sum-exp of each row.
    auto: see `best_backend`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_ds.errors import UserError
from dit_ds.models.attention_kernels import KERNELS, Operands, why_not

BACKENDS = ("auto", "eager", *KERNELS)
# Query rows (samples x heads x N) given to a kernel at once: on a GPU enough to fill it, on a CPU few enough to stay in its cache.
_ROWS = {"cuda": 1 << 17, "cpu": 1 << 14}


def relative_table(table: Tensor, size: int) -> Tensor:
    """(2*size-1, d) learned offsets to (size, size, d) by query and key coordinate; another length is interpolated."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    return table[_offsets(size, table.device)]


def _offsets(size: int, device: torch.device) -> Tensor:
    i = torch.arange(size, device=device)
    return i[:, None] - i[None, :] + size - 1


def relative_position_attention(
    qkv: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    words: Tensor | None = None,
    word_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q [k_words; k]^T / sqrt(d) + [0; rel_h + rel_w]) [v_words; v].

    Args:
        qkv: (B, N, 3, heads, d): query, key and value of the visual tokens, N = H*W. One tensor, so that its gradient
            is written in place and not gathered from three.
        table_h, table_w: (2H-1, d) and (2W-1, d), SAM's `rel_pos_h` and `rel_pos_w`.
        grid: (H, W).
        words: (B, T, 2, heads, d): key and value of the words.
        word_mask: (B, T) bool, False at padding, which is then not attended to; None attends to all.
        backend: one of `BACKENDS`.
    Returns:
        (B, N, heads, d)
    Raises:
        UserError: a backend that can't run here, and why.
    """
    b, n, _, heads, d = qkv.shape
    if backend == "auto":
        backend = best_backend(qkv.device.type, qkv.dtype, n)
    # under autocast the tables are of a longer type than what came out of a linear layer
    rel_h, rel_w = (relative_table(t, n).to(qkv.dtype) for t, n in zip((table_h, table_w), grid))
    if words is not None and words.shape[1] == 0:
        words = None
    if words is None:
        word_mask = None
    if backend == "eager":
        return _eager(qkv, rel_h, rel_w, words, word_mask)
    require(backend, qkv.device.type, qkv.dtype)
    return torch.ops.dit_ds.attention(qkv, rel_h, rel_w, words, word_mask, backend)[0]


def word_attention(queries: Tensor, qkv: Tensor, words: Tensor, word_mask: Tensor | None) -> Tensor:
    """What the words see of [words; image]: they have no place in the picture, so no positions are added.

    Args:
        queries: (B, T, heads, d) of the words.
        qkv, words, word_mask: as in `relative_position_attention`.
    Returns:
        (B, T, heads, d)
    """
    k, v = (torch.cat([words[:, :, i], qkv[:, :, i + 1]], dim=1).transpose(1, 2) for i in (0, 1))  # (B, heads, T+N, d)
    mask = None if word_mask is None else F.pad(word_mask, (0, qkv.shape[1]), value=True)[:, None, None]
    return F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def require(backend: str, device: str, dtype: torch.dtype) -> None:
    """Raise a `UserError` where a backend can't run, saying why."""
    reason = why_not(backend, device, dtype) if backend in KERNELS else None
    if reason:
        raise UserError(f"model.attention {backend} can't run here: {reason}: set model.attention auto")


def best_backend(device: str, dtype: torch.dtype, n: int) -> str:
    """The fastest backend for N visual tokens of a type on a device.

    CPU, forward and backward in ms a sample and layer on two cores (`benchmarks/attention.py`):

        heads x d, N      fp32: eager    sdpa  chunked    bf16: eager    sdpa  chunked
        4 x 32, 64               0.18    0.33     0.26           0.20    0.48     0.27
        12 x 64, 256             6.3     8.7      6.8            4.3     5.7      7.0
        12 x 64, 1024          151     112       82            106      53       81
        12 x 64, 4096         2823    2016     1081           1332     809     1063
        16 x 80, 1024          159     158      125            145      80      128

    Below 256 places the map is smaller than the layer's other activations.
    CUDA: not measured. The order is that xformers' cutlass kernel takes Q and K of another width than V in every type
    but fp64, and then SDPA's.
    """
    if device == "cuda" and dtype != torch.float64:
        return next((k for k in ("xformers", "sdpa") if why_not(k, device, dtype) is None), "chunked")
    if n < 256:
        return "eager"
    return "sdpa" if device == "cpu" and dtype == torch.bfloat16 else "chunked"


def attention_map(
    qkv: Tensor, rel_h: Tensor, rel_w: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None
) -> Tensor:
    """The map itself, (B, heads, N, T+N), whose rows sum to one: what each place gives to the words, then to each place.

    Args:
        qkv, words, word_mask: as in `relative_position_attention`.
        rel_h, rel_w: (H, H, d) and (W, W, d) of `relative_table`.
    """
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    b, heads, n, d = q.shape
    h, w = rel_h.shape[0], rel_w.shape[0]
    on_grid = q.reshape(b, heads, h, w, d)
    # SAM multiplies the positions with the unscaled query
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", on_grid, rel_h)[..., :, None]
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", on_grid, rel_w)[..., None, :]
    logits = ((q * d**-0.5) @ k.transpose(-2, -1)).view(b, heads, h, w, h, w)
    logits = (logits + of_rows + of_columns).view(b, heads, n, n)
    if words is not None:
        word_k = words[:, :, 0].transpose(1, 2)  # (B, heads, T, d)
        word_logits = (q * d**-0.5) @ word_k.transpose(-2, -1)  # (B, heads, N, T)
        if word_mask is not None:
            word_logits = word_logits.masked_fill(~word_mask[:, None, None, :], float("-inf"))
        logits = torch.cat([word_logits, logits], dim=-1)  # (B, heads, N, T+N)
    return logits.softmax(dim=-1)


def _eager(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, words: Tensor | None, word_mask: Tensor | None) -> Tensor:
    v = qkv[:, :, 2].transpose(1, 2)  # (B, heads, N, d)
    if words is not None:
        v = torch.cat([words[:, :, 1].transpose(1, 2), v], dim=2)
    return (attention_map(qkv, rel_h, rel_w, words, word_mask) @ v).transpose(1, 2)


def _pieces(batch: int, rows: int, device: str) -> list[slice]:
    """The batch in slices of about `_ROWS` query rows, of even size; `rows` is those of a sample."""
    count = math.ceil(batch / max(1, _ROWS.get(device, _ROWS["cuda"]) // rows))
    size = math.ceil(batch / count)
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


def _operands(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, words: Tensor | None, word_mask: Tensor | None) -> Operands:
    """q with what it adds to the logits of each row and column; k and v behind the words'."""
    q, k, v = qkv.unbind(2)
    on_grid = q.unflatten(1, (rel_h.shape[0], rel_w.shape[0]))
    # SAM multiplies the positions with the unscaled query
    of_rows = torch.einsum("bhwnc,hkc->bhwnk", on_grid, rel_h).flatten(1, 2)  # (B, N, heads, H)
    of_columns = torch.einsum("bhwnc,wkc->bhwnk", on_grid, rel_w).flatten(1, 2)  # (B, N, heads, W)
    if words is not None:
        k, v = torch.cat([words[:, :, 0], k], dim=1), torch.cat([words[:, :, 1], v], dim=1)
    return Operands(q, k, v, rel_h=of_rows, rel_w=of_columns, word_mask=word_mask)


def _at(x: Tensor | None, s: slice) -> Tensor | None:
    return None if x is None else x[s]


def attention_forward(
    qkv: Tensor, rel_h: Tensor, rel_w: Tensor, words: Tensor | None, word_mask: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output (B, N, heads, d) and log-sum-exp (B, heads, N), a few samples at a time."""
    b, n, _, heads, d = qkv.shape
    device = qkv.device.type
    out = qkv.new_empty(b, n, heads, d)
    lse = qkv.new_empty(b, heads, n, dtype=torch.promote_types(qkv.dtype, torch.float32))
    for s in _pieces(b, heads * n, device):
        x = _operands(qkv[s], rel_h, rel_w, _at(words, s), _at(word_mask, s))
        out[s], lse[s] = KERNELS[kernel](device).forward(x)
    return out, lse


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    words: Tensor | None,
    word_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: str,
    of_image: bool,
    of_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, rel_h, rel_w and words; those that nobody needs are empty."""
    b, n, _, heads, _ = qkv.shape
    h, w, t = rel_h.shape[0], rel_w.shape[0], 0 if words is None else words.shape[1]
    device = qkv.device.type
    of_qkv = qkv.new_empty(qkv.shape if of_image else 0)
    of_words = qkv.new_empty(0 if words is None else words.shape)
    # summed over the batch in fp32 at least
    of_rel_h, of_rel_w = (x.new_zeros(x.shape if of_tables else 0, dtype=lse.dtype) for x in (rel_h, rel_w))
    for s in _pieces(b, heads * n, device):
        x = _operands(qkv[s], rel_h, rel_w, _at(words, s), _at(word_mask, s))
        of = KERNELS[kernel](device).backward(x, grad[s], out[s], lse[s])
        # (B, H, W, heads, H) and (B, H, W, heads, W)
        of_rows, of_columns = (y.unflatten(1, (h, w)).to(qkv.dtype) for y in (of.rel_h, of.rel_w))
        if words is not None:
            of_words[s, :, 0], of_words[s, :, 1] = of.k[:, :t], of.v[:, :t]
        if of_image:
            of_qkv[s, :, 1], of_qkv[s, :, 2] = of.k[:, t:], of.v[:, t:]
            of_q = of_qkv[s, :, 0].unflatten(1, (h, w))
            of_q.copy_(of.q.unflatten(1, (h, w)))
            of_q += torch.einsum("bhwnk,hkc->bhwnc", of_rows, rel_h)
            of_q += torch.einsum("bhwnk,wkc->bhwnc", of_columns, rel_w)
        if of_tables:
            on_grid = x.q.unflatten(1, (h, w))
            of_rel_h += torch.einsum("bhwnk,bhwnc->hkc", of_rows, on_grid)
            of_rel_w += torch.einsum("bhwnk,bhwnc->wkc", of_columns, on_grid)
    return of_qkv, of_rel_h.to(qkv.dtype), of_rel_w.to(qkv.dtype), of_words


# Operators of torch, so that torch.compile passes over them, selective checkpointing can keep their output, and
# fake tensors know their shapes.
for _name, _function in {"attention": attention_forward, "attention_backward": attention_backward}.items():
    torch.library.define(f"dit_ds::{_name}", torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(f"dit_ds::{_name}", "default", _function)


@torch.library.register_fake("dit_ds::attention")
def _(qkv, rel_h, rel_w, words, word_mask, kernel):
    b, n, _, heads, d = qkv.shape
    lse_type = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(b, n, heads, d), qkv.new_empty(b, heads, n, dtype=lse_type)


@torch.library.register_fake("dit_ds::attention_backward")
def _(grad, qkv, rel_h, rel_w, words, word_mask, out, lse, kernel, of_image, of_tables):
    tables = [x.new_empty(x.shape if of_tables else 0) for x in (rel_h, rel_w)]
    of_words = qkv.new_empty(0) if words is None else words.new_empty(words.shape)
    return qkv.new_empty(qkv.shape if of_image else 0), *tables, of_words


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, grad_lse):
    del grad_lse  # a by-product: nothing is computed from it
    of_qkv, of_rel_h, of_rel_w, of_words = ctx.needs_input_grad[:4]
    grads = torch.ops.dit_ds.attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.kernel, of_qkv, of_rel_h or of_rel_w
    )
    needed = (of_qkv, of_rel_h, of_rel_w, of_words)
    return *(g if need else None for g, need in zip(grads, needed)), None, None


torch.library.register_autograd("dit_ds::attention", _differentiate, setup_context=_save)


def count_flops() -> FlopCounterMode:
    """A context that counts, our own operators' FLOPs by formula."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _attention_flops(qkv: Any, rel_h: Any, rel_w: Any, words: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Queries by keys, weights by values, and queries by the positions of rows and columns."""
    b, n, _three, heads, d = qkv
    keys = n + (words[1] if words is not None else 0)
    return 2 * b * heads * n * d * (2 * keys + rel_h[0] + rel_w[0])


def _attention_backward_flops(grad: Any, qkv: Any, rel_h: Any, rel_w: Any, words: Any, *rest: Any, **__: Any) -> int:
    """Five products for the forward's two, as in FlashAttention; the positions again, and for their gradients."""
    *_, of_tables = (x for x in rest if isinstance(x, bool))
    b, n, _three, heads, d = qkv
    keys = n + (words[1] if words is not None else 0)
    return 2 * b * heads * n * d * (5 * keys + (2 + of_tables) * (rel_h[0] + rel_w[0]))


_FORMULAS = {
    torch.ops.dit_ds.attention: _attention_flops,
    torch.ops.dit_ds.attention_backward: _attention_backward_flops,
}
