"""Kernels for relative-position attention that keep no attention map, behind one interface.

    forward(x: Operands) -> output (B, N, heads, d), log-sum-exp of each row (B, heads, N)
    backward(x, grad, out, lse) -> gradients as `Operands` without a mask

    chunked: matrix products over a few heads and queries at a time, so that this part of the map stays in the
        processor's cache; recomputed in the backward pass. Any device and dtype; made for CPUs.
    sdpa: on a CPU torch's flash attention, on CUDA its memory-efficient one (as sdpa_efficient).
    sdpa_flash, sdpa_cudnn: torch's other CUDA kernels, which need v as wide as q: it is padded with zeros.
    xformers: xformers' cutlass kernels; v may be narrower.
    flash3, flash4: FlashAttention 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`) where they are installed; v is padded.
    triton: kernels of our own, in `attention_triton`, which has its own interface.

All but chunked and triton take the relative positions folded into the head dimension, see `_fold`.

Shapes: B samples, T text tokens, N = H*W visual tokens, `heads` heads of width d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from dit_ds.models import attention_triton

_aten = torch.ops.aten
CHUNK = 1 << 20  # logits that `chunked` has at once: 4 MiB of fp32
_MASKED = -5e3  # far below any other logit; times sqrt(d) it is still finite in fp16


class Operands(NamedTuple):
    """What attention is computed from: the keys of T text tokens come before those of N = H*W visual tokens."""

    q: Tensor  # (B, N, heads, d)
    k: Tensor  # (B, T+N, heads, d)
    v: Tensor  # (B, T+N, heads, d)
    rel_h: Tensor  # (B, N, heads, H): what a query adds to the logits of the keys in each row of the grid
    rel_w: Tensor  # (B, N, heads, W): ... in each column
    text_mask: Tensor | None  # (B, T) bool, False at padding


class Kernel(NamedTuple):
    """The two directions; see the module's docstring."""

    forward: Callable[[Operands], tuple[Tensor, Tensor]]
    backward: Callable[[Operands, Tensor, Tensor, Tensor], Operands]


# ---- chunked


def _chunks(groups: int, n: int, m: int) -> list[tuple[slice, slice]]:
    """Slices of groups (a sample's head each) and of query rows that are computed together, for n queries and m keys."""
    rows, together = max(1, min(n, CHUNK // m)), max(1, CHUNK // (n * m))
    return [(slice(g, g + together), slice(r, r + rows)) for g in range(0, groups, together) for r in range(0, n, rows)]


def _by_group(x: Tensor) -> Tensor:
    return rearrange(x, "b rows heads c -> (b heads) rows c")


class _Logits:
    """Chunks of the logits (B*heads, N, T+N)."""

    def __init__(self, x: Operands):
        self.q, self.k, self.rel_h, self.rel_w = (_by_group(y) for y in (x.q, x.k, x.rel_h, x.rel_w))
        self.grid = (x.rel_h.shape[-1], x.rel_w.shape[-1])
        self.t = x.k.shape[1] - x.q.shape[1]
        text_bias = x.q.new_zeros(x.q.shape[0], 1, 1, self.t)
        if x.text_mask is not None:
            text_bias.masked_fill_(~x.text_mask[:, None, None], float("-inf"))
        self.text_bias = text_bias.expand(-1, x.q.shape[2], 1, -1).flatten(0, 1)  # (B*heads, 1, T)
        self.scale = x.q.shape[-1] ** -0.5

    def chunk(self, g: slice, r: slice, less: Tensor | None = None) -> Tensor:
        """(groups, queries, T+N); `less` (B*heads, N, 1) is subtracted."""
        q, rel_h, text_bias = self.q[g, r], self.rel_h[g, r], self.text_bias[g]
        if less is not None:
            rel_h, text_bias = rel_h - less[g, r], text_bias - less[g, r]
        p = q.new_empty(*q.shape[:2], self.k.shape[1])
        p[..., : self.t] = text_bias
        torch.add(rel_h[..., :, None], self.rel_w[g, r][..., None, :], out=self.visual(p))
        return p.baddbmm_(q, self.k[g].transpose(1, 2), alpha=self.scale)

    def visual(self, p: Tensor) -> Tensor:
        """The visual keys' part of a chunk, a view: (groups, queries, T+N) to (groups, queries, H, W)."""
        return p[..., self.t :].unflatten(-1, self.grid)


def _in_fp32(x: Operands) -> Operands:
    """At least: a logit rounded to bf16 is off by up to a hundredth."""
    q, k, v, rel_h, rel_w = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in x[:-1])
    return Operands(q, k, v, rel_h=rel_h, rel_w=rel_w, text_mask=x.text_mask)


def _chunked_forward(x: Operands) -> tuple[Tensor, Tensor]:
    x = _in_fp32(x)
    b, n, heads, d = x.q.shape
    logits, v = _Logits(x), _by_group(x.v)
    out, lse = v.new_empty(b * heads, n, d), v.new_empty(b * heads, n, 1)
    for g, r in _chunks(b * heads, n, v.shape[1]):
        p = logits.chunk(g, r)  # (groups, queries, T+N)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        out[g, r] = torch.bmm(p, v[g]).div_(total)
        lse[g, r] = top + total.log_()
    return rearrange(out, "(b heads) n d -> b n heads d", b=b), lse.view(b, heads, n)


def _chunked_backward(x: Operands, grad: Tensor, out: Tensor, lse: Tensor) -> Operands:
    x = _in_fp32(x)
    b, n, heads, _ = x.q.shape
    logits, v, lse = _Logits(x), _by_group(x.v), lse.view(b * heads, n, 1)
    grad = grad.to(v.dtype)
    inner = _by_group((grad * out).sum(-1, keepdim=True))  # (B*heads, N, 1), subtracted by softmax's backward
    grad = _by_group(grad)
    grad_q, grad_rel_h, grad_rel_w = (torch.empty_like(y) for y in (logits.q, logits.rel_h, logits.rel_w))
    grad_k, grad_v = torch.zeros_like(v), torch.zeros_like(v)
    for g, r in _chunks(b * heads, n, v.shape[1]):
        p = logits.chunk(g, r, less=lse).exp_()  # (groups, queries, T+N) rows of the map
        grad_v[g].baddbmm_(p.transpose(1, 2), grad[g, r])
        p.mul_(torch.bmm(grad[g, r], v[g].transpose(1, 2)).sub_(inner[g, r]))  # the logits' gradient
        visual = logits.visual(p)
        grad_rel_h[g, r], grad_rel_w[g, r] = visual.sum(-1), visual.sum(-2)
        grad_q[g, r] = torch.bmm(p, logits.k[g])
        grad_k[g].baddbmm_(p.transpose(1, 2), logits.q[g, r])
    grad_q *= logits.scale
    grad_k *= logits.scale
    q, k, v, rel_h, rel_w = (
        rearrange(y, "(b heads) rows c -> b rows heads c", b=b)
        for y in (grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w)
    )
    return Operands(q, k, v, rel_h=rel_h, rel_w=rel_w, text_mask=None)


# ---- folded


def _fold(x: Operands) -> tuple[Tensor, Tensor]:
    """q' = [q, sqrt(d) rel_h, sqrt(d) rel_w, 1] and k' = [k, onehot(row), onehot(column), -inf at padding].

    (B, N, heads, a) and (B, T+N, heads, a): a is d+H+W, one more where text is masked, rounded up to the multiple of
    8 that kernels need. Then q'.k' / sqrt(d) is the logit.
    """
    b, n, heads, d = x.q.shape
    h, w, t = x.rel_h.shape[-1], x.rel_w.shape[-1], x.k.shape[1] - n
    end = d + h + w
    width = -(-(end + (x.text_mask is not None)) // 8) * 8
    q, k = x.q.new_zeros(b, n, heads, width), x.q.new_zeros(b, t + n, heads, width)
    q[..., :d], k[..., :d] = x.q, x.k
    torch.mul(x.rel_h, d**0.5, out=q[..., d : d + h])
    torch.mul(x.rel_w, d**0.5, out=q[..., d + h : end])
    rows, columns = (torch.eye(size, device=q.device, dtype=q.dtype) for size in (h, w))
    k[:, t:, :, d : d + h] = repeat(rows, "h k -> (h w) 1 k", w=w)  # (N, 1, H)
    k[:, t:, :, d + h : end] = repeat(columns, "w k -> (h w) 1 k", h=h)  # (N, 1, W)
    if x.text_mask is not None:
        q[..., end] = 1
        k[:, :t, :, end] = (~x.text_mask[..., None]).to(q.dtype) * (_MASKED * d**0.5)
    return q, k


def _unfold(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, x: Operands) -> Operands:
    """Gradients of the folded operands to those of the operands; the one-hot columns are constants."""
    d, h, w = x.q.shape[-1], x.rel_h.shape[-1], x.rel_w.shape[-1]
    rel_h, rel_w = (grad_q[..., d : d + h + w] * d**0.5).split([h, w], dim=-1)
    return Operands(grad_q[..., :d], grad_k[..., :d], grad_v, rel_h=rel_h, rel_w=rel_w, text_mask=None)


def _sdpa(forward: Callable, backward: Callable, padded: bool) -> Kernel:
    """From a pair of torch's operators, which take (B, heads, rows, c); `padded`: they need v as wide as q."""

    def widen(y: Tensor, width: int) -> Tensor:
        return F.pad(y, (0, width - y.shape[-1])) if padded else y

    def run_forward(x: Operands) -> tuple[Tensor, Tensor]:
        q, k = _fold(x)
        out, lse = forward(*(y.transpose(1, 2) for y in (q, k, widen(x.v, q.shape[-1]))), x.q.shape[-1] ** -0.5)
        return out.transpose(1, 2)[..., : x.v.shape[-1]], lse[..., : q.shape[1]]

    def run_backward(x: Operands, grad: Tensor, out: Tensor, lse: Tensor) -> Operands:
        q, k = _fold(x)
        grad, v, out = (widen(y, q.shape[-1]) for y in (grad, x.v, out))
        grads = backward(*(y.transpose(1, 2) for y in (grad, q, k, v, out)), lse, x.q.shape[-1] ** -0.5)
        grad_q, grad_k, grad_v = (y.transpose(1, 2) for y in grads)
        return _unfold(grad_q, grad_k, grad_v[..., : x.v.shape[-1]], x)

    return Kernel(run_forward, run_backward)


def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """A seed and an offset: arguments of the backward operators, which don't read them without dropout."""
    return torch.empty((), dtype=torch.long, device=device), torch.empty((), dtype=torch.long, device=device)


def _cpu_forward(q, k, v, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def _cpu_backward(grad, q, k, v, out, lse, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False, scale=scale)


def _efficient_forward(q, k, v, scale):
    return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]


def _efficient_backward(grad, q, k, v, out, lse, scale):
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # as the forward operator pads it
    seeds, wanted = _no_dropout(q.device), [True, True, True, False]
    backward = _aten._scaled_dot_product_efficient_attention_backward
    return backward(grad, q, k, v, None, out, lse, *seeds, 0.0, wanted, False, scale=scale)[:3]


def _flash_forward(q, k, v, scale):
    return _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(grad, q, k, v, out, lse, scale):
    lengths = (None, None, q.shape[2], k.shape[2])
    backward = _aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, *lengths, 0.0, False, *_no_dropout(q.device), scale=scale)


def _cudnn_forward(q, k, v, scale):
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.view(lse.shape[:3])


def _cudnn_backward(grad, q, k, v, out, lse, scale):
    lengths = (None, None, q.shape[2], k.shape[2])
    backward = _aten._scaled_dot_product_cudnn_attention_backward
    seeds = _no_dropout(q.device)
    return backward(grad, q, k, v, out, lse[..., None], *seeds, None, *lengths, 0.0, False, scale=scale)


def _xformers_forward(x: Operands) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    q, k = _fold(x)
    forward, scale = fmha.memory_efficient_attention_forward_requires_grad, x.q.shape[-1] ** -0.5
    out, lse = forward(q, k, x.v, scale=scale, op=fmha.cutlass.FwOp)
    return out, lse[..., : q.shape[1]]


def _xformers_backward(x: Operands, grad: Tensor, out: Tensor, lse: Tensor) -> Operands:
    from xformers.ops import fmha

    q, k = _fold(x)
    backward, scale = fmha.memory_efficient_attention_backward, x.q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = backward(grad, out, lse, q, k, x.v, scale=scale, op=fmha.cutlass.BwOp)
    return _unfold(grad_q, grad_k, grad_v, x)


def _flash3_forward(q, k, v, scale):
    from flash_attn_interface import _flash_attn_forward

    out, lse = _flash_attn_forward(*(y.transpose(1, 2) for y in (q, k, v)), softmax_scale=scale)[:2]
    return out.transpose(1, 2), lse


def _flash3_backward(grad, q, k, v, out, lse, scale):
    from flash_attn_interface import _flash_attn_backward

    grad, q, k, v, out = (y.transpose(1, 2).contiguous() for y in (grad, q, k, v, out))
    grads = [torch.empty_like(y) for y in (q, k, v)]
    _flash_attn_backward(
        grad, q, k, v, out, lse.contiguous(), dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale
    )
    return [y.transpose(1, 2) for y in grads]


def _flash4_forward(q, k, v, scale):
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out, lse = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)[:2]
    return out.transpose(1, 2), lse


def _flash4_backward(grad, q, k, v, out, lse, scale):
    from flash_attn.cute.interface import _flash_attn_bwd

    grad, q, k, v, out = (y.transpose(1, 2).contiguous() for y in (grad, q, k, v, out))
    grads = _flash_attn_bwd(q, k, v, out, grad, lse=lse.contiguous(), softmax_scale=scale)[:3]
    return [y.transpose(1, 2) for y in grads]


_CHUNKED = Kernel(_chunked_forward, _chunked_backward)
_CPU = _sdpa(_cpu_forward, _cpu_backward, padded=True)
_EFFICIENT = _sdpa(_efficient_forward, _efficient_backward, padded=False)
_FLASH = _sdpa(_flash_forward, _flash_backward, padded=True)
_CUDNN = _sdpa(_cudnn_forward, _cudnn_backward, padded=True)
_FLASH3 = _sdpa(_flash3_forward, _flash3_backward, padded=True)
_FLASH4 = _sdpa(_flash4_forward, _flash4_backward, padded=True)
_XFORMERS = Kernel(_xformers_forward, _xformers_backward)
KERNELS: dict[str, Callable[[str], Kernel]] = {  # by the device's type
    "chunked": lambda device: _CHUNKED,
    "sdpa": lambda device: _CPU if device == "cpu" else _EFFICIENT,
    "sdpa_efficient": lambda device: _EFFICIENT,
    "sdpa_flash": lambda device: _FLASH,
    "sdpa_cudnn": lambda device: _CUDNN,
    "flash3": lambda device: _FLASH3,
    "flash4": lambda device: _FLASH4,
    "xformers": lambda device: _XFORMERS,
}
FUSED = (*KERNELS, "triton")  # all that keep no attention map


_PROBE = ((16, 2, 16), (19, 2, 16), (16, 2, 4))  # queries, keys, rel_h of three text tokens, a 4 x 4 grid, two heads


def why_not(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why one of `FUSED` can't run on this machine, None if it can.

    It is run once to find out: that torch or xformers list a kernel as available does not mean that it runs.
    """
    if name == "triton" and (reason := attention_triton.refusal(device, dtype)):
        return reason
    if name not in ("chunked", "sdpa", "triton") and device != "cuda":
        return f"its kernels run on CUDA GPUs, and the model is on '{device}'"
    return _failure(name, device, dtype)


@functools.lru_cache(maxsize=64)
def _failure(name: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        if name == "triton":
            attention_triton.try_out(device, dtype)
            return None
        kernel = KERNELS[name](device)
        q, k, rel = (torch.zeros(1, *s, device=device, dtype=dtype) for s in _PROBE)
        x = Operands(q, k, k, rel_h=rel, rel_w=rel, text_mask=None)
        kernel.backward(x, q, *kernel.forward(x))
        return None
    except ImportError:
        return f"{name} is not installed"
    except Exception as e:  # compilers of kernels raise types of their own
        return " ".join(str(e).split("\n", 1)[0].split())[:200] or type(e).__name__
