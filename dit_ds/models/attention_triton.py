"""The attention of equation 8 by kernels of its own, see `triton_kernels`: relative positions are added tile by tile.

Nothing is folded into the head dimension, so that a head of 80 computes at 80 columns. What a query adds to the logits of
each row and column of the grid (`rel_h`, `rel_w`) is computed here by matrix products, a few samples at a time.

Shapes: B samples, T text tokens, N = H*W visual tokens, `heads` heads of width d.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_ds.config.schema import TRITON_COLUMNS
from dit_ds.errors import UserError


class Tile(NamedTuple):
    """A configuration of one kernel: queries and keys that it works on at once, warps of a program, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """As in 128x64 w8 s2."""
        return f"{self.queries}x{self.keys} w{self.warps} s{self.stages}"

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By kernel and bytes of an element; the first is taken where none was measured, see `choose`. Hopper's products are of 64
# rows and more, from shared memory; before it their operands are in registers, which do for smaller tiles.
_HOPPER: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("forward", 2): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)),
    ("queries", 2): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    ("keys", 2): (Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 2)),
    ("forward", 4): (Tile(32, 32, 8, 1),),
    ("queries", 4): (Tile(16, 32, 8, 1),),
    ("keys", 4): (Tile(32, 32, 8, 1),),
}
_AMPERE: dict[tuple[str, int], tuple[Tile, ...]] = _HOPPER | {
    ("queries", 2): (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("keys", 2): (Tile(16, 64, 4, 2),),
    ("keys", 4): (Tile(16, 32, 8, 1),),
}
_AMPERE_WIDE = _AMPERE | {("queries", 2): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3))}  # of grids of more than 32 columns


class Problem(NamedTuple):
    """What a kernel is compiled for."""

    grid: tuple[int, int]  # H and W
    heads: int
    d: int
    words: int  # T
    masked: bool  # whether some text may be padding
    dtype: torch.dtype
    capability: int  # of the GPU: 80, 90, ...


KINDS = ("forward", "queries", "keys")
_chosen: dict[tuple[str, Problem], Tile] = {}


def choose(kernel: str, problem: Problem, tile: Tile) -> None:
    """Take a tile for a problem from now on, whatever its number of words."""
    _chosen[kernel, _any_words(problem)] = tile


def tile_of(kernel: str, problem: Problem) -> Tile:
    """The tile that `choose` set, or the default."""
    return _chosen.get((kernel, _any_words(problem))) or tiles(kernel, problem)[0]


def tiles(kernel: str, problem: Problem) -> tuple[Tile, ...]:
    """Those that may be chosen."""
    ampere = _AMPERE if problem.grid[1] <= 32 else _AMPERE_WIDE
    return (_HOPPER if _like_hopper(problem) else ampere)[kernel, problem.dtype.itemsize]


def _like_hopper(problem: Problem) -> bool:
    """The data centre's GPUs from Hopper on; GeForce's since then have less shared memory and Ampere's products."""
    return 90 <= problem.capability < 120


def _any_words(p: Problem) -> Problem:
    return p._replace(words=0, masked=False)


def constants(kernel: str, problem: Problem, tile: Tile, of_text: bool = False) -> dict[str, Any]:
    """The kernel's compile-time arguments.

    Args:
        kernel: forward, queries or keys.
        of_text: for the text's gradients, of keys.
    """
    (h, w), d = problem.grid, problem.d
    columns = _power_of_two(w)
    # a product has 16 keys or more; many rows of the grid take selections and registers, Hopper's products want 64 keys
    most = 4 if kernel == "keys" and _like_hopper(problem) else 2
    rows = max(-(-16 // columns), min(most, max(1, tile.keys // columns)))
    first = 1 << (d.bit_length() - 1) if d >= 16 else 16
    second = 0 if d <= first else max(16, _power_of_two(d - first))
    interpreted = _interpreted()
    # gradients of 64 keys in 16 bits are products of Hopper's widest instruction, of fewer of a narrower one with more registers
    least = 64 if of_text and problem.dtype.itemsize == 2 and _like_hopper(problem) else 16
    return {
        "H": h, "W": w, "HEADS": problem.heads, "D": d, "D0": first, "D1": second,
        "BM": tile.queries, "R": rows, "WP": columns, "BT": min(64, max(least, _power_of_two(problem.words))),
        "TEXT": of_text if kernel == "keys" else problem.words > 0, "MASK": problem.masked,
        "PRECISION": "ieee",  # of fp32
        "UPCAST": interpreted and problem.dtype == torch.bfloat16,
    }  # fmt: skip


def _power_of_two(n: int) -> int:
    """The least that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run, as far as it can be told without running them."""
    if device != "cuda" and not _interpreted():
        return f"its kernels run on CUDA GPUs, and the model is on '{device}'"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(dtype).removeprefix('torch.')}"
    return None


def refuse_grid(grid: tuple[int, int]) -> None:
    """Raises:
    UserError: the grid is wider than the kernels take.
    """
    if grid[1] > TRITON_COLUMNS:
        raise UserError(
            f"model.attention triton takes grids of at most {TRITON_COLUMNS} columns, and this has {grid[1]}: "
            "set model.attention auto"
        )


def capability(device: torch.device) -> int:
    """90 for 9.0; in the interpreter, too."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _problem(qkv: Tensor, grid: tuple[int, int], text_kv: Tensor | None, masked: bool) -> Problem:
    words = 0 if text_kv is None else text_kv.shape[1]
    heads, d = qkv.shape[3:]
    return Problem(grid, heads, d, words, masked=masked, dtype=qkv.dtype, capability=capability(qkv.device))


def _launch(kernel: str, problem: Problem, tensors: Sequence[Tensor], batch: int, of_text: bool = False) -> None:
    from dit_ds.models import triton_kernels  # needs triton

    tile = tile_of(kernel, problem)
    values = constants(kernel, problem, tile, of_text)
    h, w = problem.grid
    tiles = -(-problem.words // values["BT"]) if of_text else -(-h // values["R"])
    grid = (tiles if kernel == "keys" else -(-h * w // tile.queries), batch * problem.heads)
    run = getattr(triton_kernels, f"{kernel}_kernel")
    run[grid](*tensors, batch, problem.words, **values, **tile.options)


# Operators that write into tensors they are given, so that fake tensors run through them.


def _forward(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    text_kv: Tensor | None,
    text_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    problem = _problem(qkv, (rel_h.shape[0], rel_w.shape[0]), text_kv, text_mask is not None)
    text, mask = _or_placeholder(text_kv, text_mask, qkv)
    _launch("forward", problem, (qkv, rel_h, rel_w, text, mask, out, lse), qkv.shape[0])


def _backward(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    text_kv: Tensor | None,
    text_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    grad_qkv: Tensor,
    grad_rel_h: Tensor,
    grad_rel_w: Tensor,
    grad_text: Tensor,
) -> None:
    problem = _problem(qkv, (rel_h.shape[0], rel_w.shape[0]), text_kv, text_mask is not None)
    batch, inputs = qkv.shape[0], (qkv, rel_h, rel_w, *_or_placeholder(text_kv, text_mask, qkv))
    _launch("queries", problem, (*inputs, out, lse, grad, delta, grad_qkv, grad_rel_h, grad_rel_w), batch)
    _launch("keys", problem, (*inputs, lse, grad, delta, grad_qkv), batch)
    if problem.words:
        _launch("keys", problem, (*inputs, lse, grad, delta, grad_text), batch, of_text=True)


def _or_placeholder(text_kv: Tensor | None, text_mask: Tensor | None, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor where there is none: the kernels don't read it. The mask in bytes."""
    mask = qkv.new_empty(1, dtype=torch.uint8) if text_mask is None else text_mask.contiguous().view(torch.uint8)
    return qkv if text_kv is None else text_kv, mask


_WRITES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "triton_forward": (_forward, ("out", "lse")),
    "triton_backward": (_backward, ("delta", "grad_qkv", "grad_rel_h", "grad_rel_w", "grad_text")),
}
for _name, (_function, _written) in _WRITES.items():
    torch.library.define(f"dit_ds::{_name}", torch.library.infer_schema(_function, mutates_args=_written))
    torch.library.impl(f"dit_ds::{_name}", "default", _function)
    torch.library.register_fake(f"dit_ds::{_name}", lambda *_: None)


def _rows(qkv: Tensor, grid: tuple[int, int], by_column: bool) -> Tensor:
    """Queries by their row of the grid: (H, B*W*heads, d); or by their column: (W, B*H*heads, d)."""
    q = qkv[:, :, 0].unflatten(1, grid)  # (B, H, W, heads, d)
    return (q.permute(2, 0, 1, 3, 4) if by_column else q.transpose(0, 1)).flatten(1, 3)


def _relative(rows: Tensor, rel: Tensor, batch: int, heads: int) -> Tensor:
    """(H, B*W*heads, d) and (H, H, d) to (H, B, W, heads, H); the same of columns."""
    return torch.bmm(rows, rel.transpose(1, 2)).unflatten(1, (batch, -1, heads))


def forward(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    text_kv: Tensor | None,
    text_mask: Tensor | None,
    slices: list[slice],
    out: Tensor,
    lse: Tensor,
) -> None:
    """As `attention.attention_forward`, into `out` and `lse`.

    Args:
        slices: of the batch, samples that are computed together.
    """
    qkv, grid, heads = qkv.contiguous(), (rel_h.shape[0], rel_w.shape[0]), qkv.shape[3]
    refuse_grid(grid)
    text_kv = None if text_kv is None else text_kv.contiguous()
    for s in slices:
        x = qkv[s]
        bias_h, bias_w = (
            _relative(_rows(x, grid, by_column), rel, x.shape[0], heads)
            for by_column, rel in ((False, rel_h), (True, rel_w))
        )
        text, mask = (y if y is None else y[s] for y in (text_kv, text_mask))
        torch.ops.dit_ds.triton_forward(x, bias_h, bias_w, text, mask, out[s], lse[s])


class Gradients(NamedTuple):
    """What `backward` writes into; a tensor that isn't needed has no elements."""

    qkv: Tensor  # (B, N, 3, heads, d)
    text: Tensor  # (B, T, 2, heads, d)
    rel_h: Tensor  # (H, H, d), added to
    rel_w: Tensor  # (W, W, d), added to


def backward(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    text_kv: Tensor | None,
    text_mask: Tensor | None,
    slices: list[slice],
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grads: Gradients,
) -> None:
    """As `attention.attention_backward`, into `grads`."""
    qkv, grid, heads = qkv.contiguous(), (rel_h.shape[0], rel_w.shape[0]), qkv.shape[3]
    refuse_grid(grid)
    text_kv, grad = None if text_kv is None else text_kv.contiguous(), grad.contiguous()
    for s in slices:
        x = qkv[s]
        rows_h, rows_w = _rows(x, grid, False), _rows(x, grid, True)
        bias_h, bias_w = (_relative(r, rel, x.shape[0], heads) for r, rel in ((rows_h, rel_h), (rows_w, rel_w)))
        grad_h, grad_w = torch.empty_like(bias_h), torch.empty_like(bias_w)
        grad_x = grads.qkv[s] if grads.qkv.numel() else torch.empty_like(x)
        text, mask = (y if y is None else y[s] for y in (text_kv, text_mask))
        delta = torch.empty_like(lse[s])
        torch.ops.dit_ds.triton_backward(
            x, bias_h, bias_w, text, mask, out[s], lse[s], grad[s], delta, grad_x, grad_h, grad_w,
            grads.text if text is None else grads.text[s],
        )  # fmt: skip
        del bias_h, bias_w, delta
        grad_h, grad_w = grad_h.flatten(1, 3), grad_w.flatten(1, 3)  # (H, B*W*heads, H), (W, B*H*heads, W)
        if grads.rel_h.numel():
            grads.rel_h.add_(torch.bmm(grad_h.transpose(1, 2), rows_h))
            grads.rel_w.add_(torch.bmm(grad_w.transpose(1, 2), rows_w))
        if grads.qkv.numel():
            grad_q, (h, w), b = grad_x[:, :, 0].unflatten(1, grid), grid, x.shape[0]  # (B, H, W, heads, d)
            grad_q += torch.bmm(grad_h, rel_h).view(h, b, w, heads, -1).transpose(0, 1)
            grad_q += torch.bmm(grad_w, rel_w).view(w, b, h, heads, -1).permute(1, 2, 0, 3, 4)


def try_out(device: str, dtype: torch.dtype) -> None:
    """Run all kernels once on three text tokens and a 4 x 4 grid.

    Raises:
        ImportError: triton is missing.
        RuntimeError: they do not run.
    """
    qkv, rel = (torch.zeros(s, device=device, dtype=dtype) for s in ((1, 16, 3, 2, 16), (4, 4, 16)))
    text = torch.zeros(1, 3, 2, 2, 16, device=device, dtype=dtype)
    out, lse = torch.empty_like(qkv[:, :, 0]), torch.empty(1, 2, 16, device=device)
    forward(qkv, rel, rel, text, None, [slice(None)], out, lse)
    grads = Gradients(
        torch.empty_like(qkv), torch.empty_like(text), rel_h=torch.zeros_like(rel), rel_w=torch.zeros_like(rel)
    )
    backward(qkv, rel, rel, text, None, [slice(None)], out, lse=lse, grad=out, grads=grads)
