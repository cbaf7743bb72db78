"""Attention of visual queries over [words; visual] keys with SAM's decomposed relative positions.

Words are keys and values only. They have no place in the picture, so their relative-position term is zero.

Backends:
    eager: SAM's own arithmetic; materialises the (B, heads, N, T+N) map. The reference.
    sdpa, xformers: the positions are folded into the head dimension, exactly: with q' = [q, sqrt(d) rel_h,
        sqrt(d) rel_w, pad] and k' = [k, onehot(row), onehot(column), -inf at padding], q'.k' / sqrt(d) is SAM's logit,
        so no bias of the size of the map is ever needed and memory-efficient kernels apply.
    chunked: the folded form for CPUs: a few heads at a time, so that the map stays in the processor's cache, and
        recomputed in the backward pass, so that it is never stored.
    auto: xformers where its kernel runs, else sdpa, on CUDA; chunked on a CPU.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "eager", "sdpa", "xformers", "chunked")
_MASKED = -1e4  # a folded logit that no other can rival, and that bf16 and fp16 can hold


def relative_table(table: Tensor, size: int) -> Tensor:
    """(2*size-1, d) learned offsets to (size, size, d) by query and key coordinate; another length is interpolated."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    return table[_offsets(size, table.device)]


@functools.lru_cache(maxsize=64)
def _offsets(size: int, device: torch.device) -> Tensor:
    i = torch.arange(size, device=device)
    return i[:, None] - i[None, :] + size - 1


@functools.lru_cache(maxsize=16)
def _one_hot_places(grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H*W, H+W): each place's row and column, one-hot."""
    h, w = grid
    place = torch.arange(h * w, device=device)
    return torch.cat([F.one_hot(place // w, h), F.one_hot(place % w, w)], dim=1).to(dtype)


def relative_position_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    words: tuple[Tensor, Tensor] | None = None,
    word_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q [k_words; k]^T / sqrt(d) + [0; rel_h + rel_w]) [v_words; v].

    Args:
        q, k, v: (B, heads, N, d) of the visual tokens, N = H*W.
        table_h, table_w: (2H-1, d) and (2W-1, d), SAM's `rel_pos_h` and `rel_pos_w`.
        grid: (H, W).
        words: k and v of the words, (B, heads, T, d) each.
        word_mask: (B, T) bool, False at padding, which is then not attended to; None attends to all.
        backend: one of `BACKENDS`.
    Returns:
        (B, heads, N, d)
    """
    b, heads, n, d = q.shape
    on_grid = q.view(b, heads, *grid, d)
    # SAM multiplies the positions with the unscaled query
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", on_grid, relative_table(table_h, grid[0]))  # (B, heads, H, W, H)
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", on_grid, relative_table(table_w, grid[1]))  # (B, heads, H, W, W)
    if backend == "auto":
        backend = _best_backend(q)
    attend = _eager if backend == "eager" else functools.partial(_folded, kernel=backend)
    return attend(q, k, v, rel_h, rel_w, words, word_mask)


def _eager(q, k, v, rel_h, rel_w, words, word_mask) -> Tensor:
    b, heads, n, d = q.shape
    _, _, h, w, _ = rel_h.shape
    logits = ((q * d**-0.5) @ k.transpose(-2, -1)).view(b, heads, h, w, h, w)
    logits = (logits + rel_h[..., :, None] + rel_w[..., None, :]).view(b, heads, n, n)
    if words is not None:
        word_logits = (q * d**-0.5) @ words[0].transpose(-2, -1)  # (B, heads, N, T)
        if word_mask is not None:
            word_logits = word_logits.masked_fill(~word_mask[:, None, None, :], float("-inf"))
        logits = torch.cat([word_logits, logits], dim=-1)  # (B, heads, N, T+N)
        v = torch.cat([words[1], v], dim=2)
    return logits.softmax(dim=-1) @ v


def _folded(q, k, v, rel_h, rel_w, words, word_mask, kernel: str) -> Tensor:
    b, heads, n, d = q.shape
    _, _, h, w, _ = rel_h.shape
    places = _one_hot_places((h, w), q.device, q.dtype).expand(b, heads, n, h + w)
    queries = [q, rel_h.reshape(b, heads, n, h) * d**0.5, rel_w.reshape(b, heads, n, w) * d**0.5]
    keys = torch.cat([k, places], dim=-1)  # (B, heads, N, d+H+W)
    if words is not None:
        word_keys = F.pad(words[0], (0, h + w))  # words have no place
        if word_mask is not None:  # one more dimension masks the padding; kernels want multiples of 8
            queries.append(F.pad(q.new_ones(b, heads, n, 1), (0, 7)))
            at_padding = (~word_mask).to(q.dtype)[:, None, :, None].expand(-1, heads, -1, 1) * (_MASKED * d**0.5)
            word_keys = torch.cat([word_keys, F.pad(at_padding, (0, 7))], dim=-1)
            keys = F.pad(keys, (0, 8))
        keys = torch.cat([word_keys, keys], dim=2)  # (B, heads, T+N, d+H+W[+8])
        v = torch.cat([words[1], v], dim=2)
    q = torch.cat(queries, dim=-1)
    if kernel == "xformers":
        from xformers.ops import memory_efficient_attention

        q, keys, v = (x.transpose(1, 2) for x in (q, keys, v))  # xformers wants (B, N, heads, d)
        return memory_efficient_attention(q, keys, v, scale=d**-0.5).transpose(1, 2)
    if kernel == "chunked":
        q, keys, v = (x.flatten(0, 1) for x in (q, keys, v))
        return _ChunkedAttention.apply(q, keys, v, d**-0.5).view(b, heads, n, d)
    return F.scaled_dot_product_attention(q, keys, v, scale=d**-0.5)


class _ChunkedAttention(torch.autograd.Function):
    """softmax(q k^T scale) v for (G, N, a), (G, M, a), (G, M, d), by pieces of at most `PIECE` logits.

    Saves q, k, v, the output and the log-sum-exp of each row.
    """

    PIECE = 1 << 18  # logits: 1 MiB of fp32, within a core's second-level cache

    @staticmethod
    def _pieces(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """Which groups and which query rows go together."""
        groups, n, m = q.shape[0], q.shape[1], k.shape[1]
        rows = max(1, min(n, _ChunkedAttention.PIECE // m))
        together = max(1, _ChunkedAttention.PIECE // (n * m))
        return [
            (slice(g, g + together), slice(r, r + rows)) for g in range(0, groups, together) for r in range(0, n, rows)
        ]

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q = q * scale
        out = v.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(*q.shape[:2], 1)
        for g, r in _ChunkedAttention._pieces(q, k):
            p = torch.bmm(q[g, r], k[g].transpose(1, 2))
            top = p.amax(-1, keepdim=True)
            total = p.sub_(top).exp_().sum(-1, keepdim=True)
            out[g, r] = torch.bmm(p, v[g]).div_(total)
            lse[g, r] = top + total.log()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (grad * out).sum(-1, keepdim=True)  # what softmax's backward subtracts from each row
        for g, r in _ChunkedAttention._pieces(q, k):
            p = torch.bmm(q[g, r], k[g].transpose(1, 2)).sub_(lse[g, r]).exp_()
            grad_v[g].baddbmm_(p.transpose(1, 2), grad[g, r])
            p.mul_(torch.bmm(grad[g, r], v[g].transpose(1, 2)).sub_(inner[g, r]))
            grad_q[g, r] = torch.bmm(p, k[g])
            grad_k[g].baddbmm_(p.transpose(1, 2), q[g, r])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None


def _best_backend(q: Tensor) -> str:
    if q.device.type != "cuda":
        return "chunked"
    return "xformers" if _xformers_runs(q.dtype) else "sdpa"


@functools.lru_cache(maxsize=8)
def _xformers_runs(dtype: torch.dtype) -> bool:
    """Whether xformers' kernel runs here, found out by running it: what it lists as available need not be."""
    try:
        from xformers.ops import memory_efficient_attention

        x = torch.zeros(1, 8, 1, 16, device="cuda", dtype=dtype)
        memory_efficient_attention(x, x, x[..., :8])
        return True
    except (ImportError, NotImplementedError, ValueError, RuntimeError):
        return False
