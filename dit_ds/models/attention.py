"""Attention of the ViT's visual queries over [text; visual] keys with SAM's decomposed relative positions (equation 8).

Text tokens are keys and values only. They have no coordinates, so their relative-position term is zero.

Shapes: B samples, T text tokens, N = H*W visual tokens, `heads` heads of width d.

Backends:
    eager: SAM's own arithmetic; materialises the (B, heads, N, T+N) attention map. The reference.
    triton, xformers, sdpa, flash3, chunked, ...: kernels that keep no map, see `attention_kernels`. They run on a few
        samples at a time, and the backward pass recomputes their operands: saved for it are q, k, v, the small position
        tables, the output and the log-sum-exp of each row.
    auto: see `best_backend`; training on a GPU measures instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_ds.errors import UserError
from dit_ds.models import attention_triton
from dit_ds.models.attention_kernels import FUSED, KERNELS, Operands, why_not
from dit_ds.models.positions import relative_positions

BACKENDS = ("auto", "eager", *FUSED)
# Query rows (samples x heads x N) given to a kernel at once: on a GPU enough to fill it, on a CPU few enough to stay in its cache.
_ROWS = {"cuda": 1 << 17, "cpu": 1 << 14}


def relative_table(table: Tensor, size: int) -> Tensor:
    """SAM's `get_rel_pos`: learned offsets (L, d) to (size, size, d) by query and key coordinate.

    A table of another length than 2*size-1 is interpolated linearly.
    """
    return relative_positions(table, 2 * size - 1)[_offsets(size, table.device)]


def _offsets(size: int, device: torch.device) -> Tensor:
    """(size, size) int: query coordinate minus key coordinate, shifted to start at 0."""
    i = torch.arange(size, device=device)
    return i[:, None] - i[None, :] + size - 1


def relative_position_attention(
    qkv: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    text_kv: Tensor | None = None,
    text_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q [k_text; k]^T / sqrt(d) + [0; rel_h + rel_w]) [v_text; v], the attention of equation 8.

    Args:
        qkv: (B, N, 3, heads, d): query, key and value of the visual tokens, N = H*W. One tensor, so that its gradient
            is written in place and not gathered from three.
        table_h, table_w: SAM's `rel_pos_h` and `rel_pos_w`, (2H-1, d) and (2W-1, d) or of any other length.
        grid: (H, W).
        text_kv: (B, T, 2, heads, d): key and value of the text tokens.
        text_mask: (B, T) bool, False at padding, which is then not attended to; None attends to all.
        backend: one of `BACKENDS`.
    Returns:
        (B, N, heads, d)
    Raises:
        UserError: the backend can't run here; the message says why.
    """
    n = qkv.shape[1]
    if backend == "auto":
        backend = best_backend(qkv.device.type, qkv.dtype, n)
    # under autocast the tables have a wider type than the output of a linear layer; (H, H, d) and (W, W, d)
    rel_h, rel_w = (relative_table(t, size).to(qkv.dtype) for t, size in zip((table_h, table_w), grid))
    if text_kv is not None and text_kv.shape[1] == 0:
        text_kv = None
    if text_kv is None:
        text_mask = None
    if backend == "eager":
        return _eager(qkv, rel_h, rel_w, text_kv, text_mask)
    require(backend, qkv.device.type, qkv.dtype)
    return torch.ops.dit_ds.attention(qkv, rel_h, rel_w, text_kv, text_mask, kernel=backend)[0]


def text_attention(queries: Tensor, qkv: Tensor, text_kv: Tensor, text_mask: Tensor | None) -> Tensor:
    """Attention of the text tokens over [text; visual] keys (equation 6), without relative positions.

    Args:
        queries: (B, T, heads, d) of the text tokens.
        qkv, text_kv, text_mask: as in `relative_position_attention`.
    Returns:
        (B, T, heads, d)
    """
    k, v = (
        rearrange(torch.cat([text_kv[:, :, i], qkv[:, :, i + 1]], dim=1), "b keys heads d -> b heads keys d")
        for i in (0, 1)
    )  # (B, heads, T+N, d)
    mask = None if text_mask is None else F.pad(text_mask, (0, qkv.shape[1]), value=True)[:, None, None]
    out = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, attn_mask=mask)  # (B, heads, T, d)
    return out.transpose(1, 2)


def require(backend: str, device: str, dtype: torch.dtype) -> None:
    """Check that a backend can run.

    Raises:
        UserError: it can't; the message says why.
    """
    reason = why_not(backend, device, dtype) if backend in FUSED else None
    if reason:
        raise UserError(f"model.attention {backend} can't run here: {reason}: set model.attention auto")


def best_backend(device: str, dtype: torch.dtype, n: int) -> str:
    """The fastest backend for N visual tokens of a dtype on a device.

    CPU, forward and backward in ms a sample and layer on two cores (`benchmarks/attention.py`):

        heads x d, N      fp32: eager    sdpa  chunked    bf16: eager    sdpa  chunked
        4 x 32, 64               0.18    0.33     0.26           0.20    0.48     0.27
        12 x 64, 256             6.3     8.7      6.8            4.3     5.7      7.0
        12 x 64, 1024          151     112       82            106      53       81
        12 x 64, 4096         2823    2016     1081           1332     809     1063
        16 x 80, 1024          159     158      125            145      80      128

    Below 256 tokens the map is smaller than the layer's other activations.
    CUDA: not measured. The order is that xformers' cutlass kernel takes Q and K of another width than V in every dtype
    but fp64, and then SDPA's.
    """
    if device == "cuda" and dtype != torch.float64:
        return next((k for k in ("xformers", "sdpa") if why_not(k, device, dtype) is None), "chunked")
    if n < 256:
        return "eager"
    return "sdpa" if device == "cpu" and dtype == torch.bfloat16 else "chunked"


def attention_map(
    qkv: Tensor, rel_h: Tensor, rel_w: Tensor, text_kv: Tensor | None = None, text_mask: Tensor | None = None
) -> Tensor:
    """The attention map (B, heads, N, T+N): a row sums to one, the weights of the text keys come first.

    Args:
        qkv, text_kv, text_mask: as in `relative_position_attention`.
        rel_h, rel_w: (H, H, d) and (W, W, d) of `relative_table`.
    """
    q, k, _ = rearrange(qkv, "b n three heads d -> three b heads n d")  # (B, heads, N, d) each
    h, w, d = rel_h.shape[0], rel_w.shape[0], q.shape[-1]
    q_grid = rearrange(q, "b heads (h w) d -> b heads h w d", h=h)
    # SAM multiplies the positions with the unscaled query
    bias_h = torch.einsum("bnhwc,hkc->bnhwk", q_grid, rel_h)[..., :, None]  # (B, heads, H, W, H, 1)
    bias_w = torch.einsum("bnhwc,wkc->bnhwk", q_grid, rel_w)[..., None, :]  # (B, heads, H, W, 1, W)
    logits = (q * d**-0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    logits = rearrange(logits, "b heads (h w) (i j) -> b heads h w i j", h=h, i=h, j=w)
    logits = rearrange(logits + bias_h + bias_w, "b heads h w i j -> b heads (h w) (i j)")
    if text_kv is not None:
        text_k = rearrange(text_kv[:, :, 0], "b t heads d -> b heads d t")
        text_logits = (q * d**-0.5) @ text_k  # (B, heads, N, T)
        if text_mask is not None:
            text_logits = text_logits.masked_fill(~text_mask[:, None, None, :], float("-inf"))
        logits = torch.cat([text_logits, logits], dim=-1)  # (B, heads, N, T+N)
    return logits.softmax(dim=-1)


def _eager(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, text_kv: Tensor | None, text_mask: Tensor | None) -> Tensor:
    """(B, N, heads, d) through the materialised map."""
    v = qkv[:, :, 2].transpose(1, 2)  # (B, heads, N, d)
    if text_kv is not None:
        v = torch.cat([text_kv[:, :, 1].transpose(1, 2), v], dim=2)  # (B, heads, T+N, d)
    return (attention_map(qkv, rel_h, rel_w, text_kv, text_mask) @ v).transpose(1, 2)


def _batch_slices(batch: int, rows: int, device: str) -> list[slice]:
    """The batch in slices of about `_ROWS` query rows, of even size; `rows` is those of a sample."""
    count = math.ceil(batch / max(1, _ROWS.get(device, _ROWS["cuda"]) // rows))
    size = math.ceil(batch / count)
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


def _operands(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, text_kv: Tensor | None, text_mask: Tensor | None) -> Operands:
    """q with its relative-position terms; k and v with the text's before them."""
    q, k, v = qkv.unbind(2)  # (B, N, heads, d) each
    q_grid = q.unflatten(1, (rel_h.shape[0], rel_w.shape[0]))  # (B, H, W, heads, d)
    # SAM multiplies the positions with the unscaled query
    bias_h = torch.einsum("bhwnc,hkc->bhwnk", q_grid, rel_h).flatten(1, 2)  # (B, N, heads, H)
    bias_w = torch.einsum("bhwnc,wkc->bhwnk", q_grid, rel_w).flatten(1, 2)  # (B, N, heads, W)
    if text_kv is not None:
        k, v = torch.cat([text_kv[:, :, 0], k], dim=1), torch.cat([text_kv[:, :, 1], v], dim=1)  # (B, T+N, heads, d)
    return Operands(q, k, v, rel_h=bias_h, rel_w=bias_w, text_mask=text_mask)


def _at(x: Tensor | None, s: slice) -> Tensor | None:
    return None if x is None else x[s]


def attention_forward(
    qkv: Tensor, rel_h: Tensor, rel_w: Tensor, text_kv: Tensor | None, text_mask: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output (B, N, heads, d) and log-sum-exp (B, heads, N), a few samples at a time.

    Args:
        qkv, text_kv, text_mask: as in `relative_position_attention`.
        rel_h, rel_w: (H, H, d) and (W, W, d) of `relative_table`.
        kernel: one of `FUSED`.
    """
    b, n, _, heads, d = qkv.shape
    device = qkv.device.type
    out = qkv.new_empty(b, n, heads, d)
    lse = qkv.new_empty(b, heads, n, dtype=torch.promote_types(qkv.dtype, torch.float32))
    slices = _batch_slices(b, heads * n, device)
    if kernel == "triton":
        attention_triton.forward(qkv, rel_h, rel_w, text_kv, text_mask, slices=slices, out=out, lse=lse)
        return out, lse
    for s in slices:
        x = _operands(qkv[s], rel_h, rel_w, _at(text_kv, s), _at(text_mask, s))
        out[s], lse[s] = KERNELS[kernel](device).forward(x)
    return out, lse


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    text_kv: Tensor | None,
    text_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: str,
    need_qkv: bool,
    need_rel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, rel_h, rel_w and text_kv, of their shapes; (0,) where `need_qkv` or `need_rel` is false.

    Args:
        grad: (B, N, heads, d), of the output.
        out, lse: what `attention_forward` returned.
    """
    b, n, _, heads, _ = qkv.shape
    h, w, t = rel_h.shape[0], rel_w.shape[0], 0 if text_kv is None else text_kv.shape[1]
    device = qkv.device.type
    grad_qkv = qkv.new_empty(qkv.shape if need_qkv else 0)
    grad_text = qkv.new_empty(0 if text_kv is None else text_kv.shape)
    # summed over the batch in fp32 at least
    grad_rel_h, grad_rel_w = (x.new_zeros(x.shape if need_rel else 0, dtype=lse.dtype) for x in (rel_h, rel_w))
    slices = _batch_slices(b, heads * n, device)
    if kernel == "triton":
        results = attention_triton.Gradients(grad_qkv, grad_text, rel_h=grad_rel_h, rel_w=grad_rel_w)
        attention_triton.backward(
            qkv, rel_h, rel_w, text_kv, text_mask, slices=slices, out=out, lse=lse, grad=grad, grads=results
        )
        slices = []
    for s in slices:
        x = _operands(qkv[s], rel_h, rel_w, _at(text_kv, s), _at(text_mask, s))
        grads = KERNELS[kernel](device).backward(x, grad[s], out[s], lse[s])
        # (B, H, W, heads, H) and (B, H, W, heads, W)
        bias_h, bias_w = (y.unflatten(1, (h, w)).to(qkv.dtype) for y in (grads.rel_h, grads.rel_w))
        if text_kv is not None:
            grad_text[s, :, 0], grad_text[s, :, 1] = grads.k[:, :t], grads.v[:, :t]
        if need_qkv:
            grad_qkv[s, :, 1], grad_qkv[s, :, 2] = grads.k[:, t:], grads.v[:, t:]
            grad_q = grad_qkv[s, :, 0].unflatten(1, (h, w))  # (B, H, W, heads, d)
            grad_q.copy_(grads.q.unflatten(1, (h, w)))
            grad_q += torch.einsum("bhwnk,hkc->bhwnc", bias_h, rel_h)
            grad_q += torch.einsum("bhwnk,wkc->bhwnc", bias_w, rel_w)
        if need_rel:
            q_grid = x.q.unflatten(1, (h, w))
            grad_rel_h += torch.einsum("bhwnk,bhwnc->hkc", bias_h, q_grid)
            grad_rel_w += torch.einsum("bhwnk,bhwnc->wkc", bias_w, q_grid)
    return grad_qkv, grad_rel_h.to(qkv.dtype), grad_rel_w.to(qkv.dtype), grad_text


# PyTorch operators, so that torch.compile has no graph break at them, selective checkpointing can save their output, and
# fake tensors know their shapes.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "attention": attention_forward,
    "attention_backward": attention_backward,
}
for _name, _function in _OPERATORS.items():
    torch.library.define(f"dit_ds::{_name}", torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(f"dit_ds::{_name}", "default", _function)


@torch.library.register_fake("dit_ds::attention")
def _(qkv, rel_h, rel_w, text_kv, text_mask, kernel):
    b, n, _, heads, d = qkv.shape
    lse_dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(b, n, heads, d), qkv.new_empty(b, heads, n, dtype=lse_dtype)


@torch.library.register_fake("dit_ds::attention_backward")
def _(grad, qkv, rel_h, rel_w, text_kv, text_mask, out, lse, kernel, need_qkv, need_rel):
    grad_rel = [x.new_empty(x.shape if need_rel else 0) for x in (rel_h, rel_w)]
    grad_text = qkv.new_empty(0) if text_kv is None else text_kv.new_empty(text_kv.shape)
    return qkv.new_empty(qkv.shape if need_qkv else 0), *grad_rel, grad_text


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    del grad_lse  # the log-sum-exp is saved for backward only: no output depends on it
    need_qkv, need_rel_h, need_rel_w, need_text = needed = ctx.needs_input_grad[:4]
    grads = torch.ops.dit_ds.attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.kernel, need_qkv=need_qkv, need_rel=need_rel_h or need_rel_w
    )
    return *(g if need else None for g, need in zip(grads, needed)), None, None


torch.library.register_autograd("dit_ds::attention", _differentiate, setup_context=_save)


def count_flops() -> FlopCounterMode:
    """A context manager that counts FLOPs (a multiply-add is two), those of the attention operators by formula."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


# The counter hands the formulas the shapes of the operators' arguments in place of the tensors.
def _attention_flops(qkv: Any, rel_h: Any, rel_w: Any, text_kv: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 B heads N d (2 (T+N) + H + W): queries by keys, weights by values, queries by the relative positions."""
    b, n, _three, heads, d = qkv
    keys = n + (text_kv[1] if text_kv is not None else 0)
    return 2 * b * heads * n * d * (2 * keys + rel_h[0] + rel_w[0])


def _attention_backward_flops(grad: Any, qkv: Any, rel_h: Any, rel_w: Any, text_kv: Any, *rest: Any, **__: Any) -> int:
    """Five matrix products for the forward's two, as in FlashAttention; those of the relative positions recomputed, and
    one each for the gradients of the query and, where needed, of the tables."""
    *_, need_rel = (x for x in rest if isinstance(x, bool))
    b, n, _three, heads, d = qkv
    keys = n + (text_kv[1] if text_kv is not None else 0)
    return 2 * b * heads * n * d * (5 * keys + (2 + need_rel) * (rel_h[0] + rel_w[0]))


_FORMULAS = {
    torch.ops.dit_ds.attention: _attention_flops,
    torch.ops.dit_ds.attention_backward: _attention_backward_flops,
}
