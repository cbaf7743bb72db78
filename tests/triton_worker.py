"""Runs the Triton attention kernels in Triton's interpreter, on CPU tensors; prints what was found as JSON.

A process of its own: the interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, for all of a process.
"""

from __future__ import annotations

import copy
import json
import time

import torch
from torch import Tensor

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.models import attention, attention_triton
from dit_ds.models.attention import relative_position_attention
from dit_ds.models.image_encoder import JointAttention, JointBlock

# grid, width of a head, text tokens, whether some are padding, type, the lengths of tables to interpolate
CASES = {
    "d 80, fp32": ((8, 8), 80, 6, True, "float32", None),
    "d 64, not square": ((5, 7), 64, 20, True, "float32", None),
    "no text, N no multiple": ((5, 14), 80, 0, False, "float32", None),
    "one word, 16 x 16": ((16, 16), 64, 1, False, "float32", None),
    "two tiles of text": ((3, 4), 80, 70, True, "float32", None),
    "narrow heads, tables to interpolate": ((6, 5), 8, 5, True, "float32", (27, 7)),
    "d 80, fp16": ((8, 8), 80, 6, True, "float16", None),
    "d 64, fp16, not square": ((4, 6), 64, 20, True, "float16", None),
    "a grid of 32 columns, fp16": ((3, 32), 16, 3, False, "float16", None),
    "d 80, bf16": ((4, 8), 80, 6, True, "bfloat16", None),
}


def inputs_of(case: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """In fp64, of values that the case's type has; in the last sample all text is padding, in the one before a half."""
    (h, w), d, words, masked, dtype, lengths = CASES[case]
    batch = 2 if masked else 1
    g = torch.Generator().manual_seed(3)
    shapes = {
        "qkv": (batch, h * w, 3, 2, d), "text": (batch, words, 2, 2, d),
        "table_h": ((lengths or (2 * h - 1,))[0], d), "table_w": ((lengths or (0, 2 * w - 1))[1], d),
    }  # fmt: skip
    inputs = {n: torch.randn(*s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    inputs["table_h"] *= 0.3
    inputs["table_w"] *= 0.3
    mask = torch.arange(words).expand(2, -1) < torch.tensor([[words // 2], [0]]) if masked else None
    return {n: x.to(getattr(torch, dtype)).double() for n, x in inputs.items()}, mask


def results(backend: str, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients."""
    inputs, mask = inputs_of(case)
    x = {n: y.to(dtype).requires_grad_() for n, y in inputs.items()}
    tables = (x["table_h"], x["table_w"])
    out = relative_position_attention(x["qkv"], *tables, CASES[case][0], x["text"], text_mask=mask, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out.backward(grad.to(getattr(torch, CASES[case][4])).to(dtype))
    return {"out": out.detach()} | {n: y.grad for n, y in x.items() if y.numel()}


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, by norms."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def errors(case: str) -> dict[str, float]:
    """Against fp64."""
    dtype = getattr(torch, CASES[case][4])
    wanted, got = results("eager", case, torch.float64), results("triton", case, dtype)
    return {n: error(got[n], wanted[n]) for n in wanted}


def repeated(case: str) -> dict[str, bool]:
    """Whether a second run has the same bits, and one sample at a time the same results."""
    first = results("triton", case, torch.float32)
    again = results("triton", case, torch.float32)
    attention._ROWS["cpu"] = 1
    one_by_one = results("triton", case, torch.float32)
    return {n: torch.equal(first[n], again[n]) and error(one_by_one[n], first[n]) < 1e-6 for n in first}


def every_tile() -> dict[str, float]:
    """The largest error with each of the tiles that may be chosen, in fp16."""
    found, case = {}, "a grid of 32 columns, fp16"
    (grid, d), wanted = CASES[case][:2], results("eager", case, torch.float64)
    problem = attention_triton.Problem(grid, 2, d, words=0, masked=False, dtype=torch.float16, capability=90)
    for kernel in attention_triton.KINDS:
        for tile in attention_triton.tiles(kernel, problem):
            attention_triton.choose(kernel, problem, tile)
            got = results("triton", case, torch.float16)
            found[f"{kernel} {tile.name}"] = max(error(got[n], wanted[n]) for n in wanted)
    return found


def windows() -> dict[str, float]:
    """A block with windows, the last ones padded, and text that is updated: all gradients against eager in fp64."""
    torch.manual_seed(5)
    block = JointBlock(32, 2, (3, 7), "eager", window_size=4)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, text, mask = torch.randn(1, 3, 7, 32), torch.randn(1, 3, 32), torch.tensor([[True, True, False]])
    found = []
    for backend, dtype in (("eager", torch.float64), ("triton", torch.float32)):
        b = copy.deepcopy(block).to(dtype)
        b.attn.backend = backend
        leaves = [y.to(dtype).requires_grad_() for y in (x, text)]
        out, text_out = b(*leaves, mask, update_text=True)
        (out.square().sum() + text_out.square().sum()).backward()
        found.append({"out": out, "text": text_out, "x": leaves[0].grad, "words": leaves[1].grad}
                     | {n: p.grad for n, p in b.named_parameters()})  # fmt: skip
    return {n: error(found[1][n].detach(), found[0][n].detach()) for n in found[0]}


def kept_bytes(backend: str) -> int:
    """Bytes that a layer keeps for the backward pass."""
    layer, storages = JointAttention(64, 1, (8, 4), backend), {}
    x, text = torch.randn(1, 8, 4, 64, requires_grad=True), torch.randn(1, 5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        layer(x, text)
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def checked(words: int) -> bool:
    """torch's own check of the operator: schema, fake tensors, gradients under compilation."""
    qkv, rel = torch.randn(1, 12, 3, 1, 16, requires_grad=True), torch.randn(3, 3, 16, requires_grad=True)
    kv = torch.randn(1, words, 2, 1, 16, requires_grad=True) if words else None
    mask = torch.arange(words).expand(1, -1) < 2 if words else None
    arguments = (qkv, rel, torch.randn(4, 4, 16, requires_grad=True), kv, mask, "triton")
    torch.library.opcheck(torch.ops.dit_ds.attention.default, arguments)
    return True


def main() -> None:
    start = time.perf_counter()
    found = {
        "errors": {c: errors(c) for c in CASES}, "windows": windows(), "repeated": repeated("narrow heads, tables to interpolate"),
        "every tile": every_tile(), "kept": {b: kept_bytes(b) for b in ("chunked", "triton")}, "checked": checked(3),
    }  # fmt: skip
    print(json.dumps(found | {"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
