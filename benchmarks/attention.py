"""One attention layer, forward and backward: every backend against the naive formulation, in one process, alternating.

The naive formulation concatenates words and image and materialises the map and the positions' bias (SAM's code). Writes
attention.json, .md and .png; `--json` prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common
from dit_ds.models.attention import BACKENDS, best_backend
from dit_ds.models.attention_kernels import FUSED, why_not
from dit_ds.models.image_encoder import JointBlock
from dit_ds.models.naive import naive_attention
from dit_ds.models.sam import SIZES

WORDS = 20


def layer(width: str, image_size: int, batch: int, device: str, dtype: torch.dtype):
    """A block and its inputs: normalised image tokens, words and the words' mask."""
    torch.manual_seed(0)
    size, side = SIZES[width], image_size // 16
    block = JointBlock(size.embed_dim, size.num_heads, (side, side), "auto").to(device, dtype)
    for p in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(batch, side, side, size.embed_dim, device=device, dtype=dtype, requires_grad=True)
    words = torch.randn(batch, WORDS, size.embed_dim, device=device, dtype=dtype, requires_grad=True)
    mask = torch.arange(WORDS, device=device).expand(batch, -1) < 8
    return block, x, words, mask


def row(width: str, image_size: int, batch: int, device: str, dtype: torch.dtype, rounds: int) -> dict:
    """All backends that run here, and the naive formulation, at one size."""
    block, x, words, mask = layer(width, image_size, batch, device, dtype)
    chosen = best_backend(device, dtype, (image_size // 16) ** 2)
    refused = {b: r for b in FUSED if (r := why_not(b, device, dtype))}
    backends = [b for b in BACKENDS if b not in refused and b != "auto"]

    def ours(backend: str) -> torch.Tensor:
        block.attn.backend = backend
        return block.attn(x, words, mask)[0]

    def naive() -> torch.Tensor:
        return naive_attention(block.attn, torch.cat([words, x.flatten(1, 2)], dim=1), x.shape[1:3], mask)[:, WORDS:]

    forwards = {"naive": naive} | {b: partial(ours, b) for b in backends}
    grad = torch.randn_like(naive())

    def step(forward) -> None:
        out = forward()
        out.backward(grad.view_as(out))
        block.zero_grad()
        x.grad = words.grad = None

    steps = {name: partial(step, f) for name, f in forwards.items()}
    for name in backends:  # a kernel may run in general and not at this width
        try:
            steps[name]()
        except Exception as e:  # compilers of kernels raise types of their own
            refused[name] = (str(e).splitlines() or [type(e).__name__])[0]
            del steps[name]
    backends = [b for b in backends if b in steps]
    seconds = common.alternate(steps, rounds, device)
    saved = {name: common.saved_bytes(forwards[name]) for name in ("naive", chosen)}
    peaks = {name: common.peak_bytes(steps[name], device) for name in ("naive", chosen)}
    return {
        "width": width, "size": image_size, "device": device, "dtype": str(dtype)[6:], "batch": batch, "words": WORDS,
        "backend": chosen,
        "step_seconds": seconds[chosen], "naive_seconds": seconds["naive"],
        "speedup": seconds["naive"] / seconds[chosen],
        "saved_bytes": saved[chosen], "naive_saved_bytes": saved["naive"],
        "memory_ratio": saved[chosen] / saved["naive"],
        "peak_bytes": peaks[chosen], "naive_peak_bytes": peaks["naive"],
        "seconds_by_backend": {b: seconds[b] for b in backends}, "cannot_run": refused,
    }  # fmt: skip


def flex_seconds(width: str, image_size: int, batch: int, dtype: torch.dtype, rounds: int) -> float | str:
    """FlexAttention with the positions as a score modification, compiled; CUDA only. Why not, where it fails."""
    from torch.nn.attention.flex_attention import flex_attention

    block, x, words, _ = layer(width, image_size, batch, "cuda", dtype)
    side, heads = image_size // 16, SIZES[width].num_heads
    n, d = side * side, SIZES[width].embed_dim // heads
    q, k, v = (torch.randn(batch, heads, m, d, device="cuda", dtype=dtype) for m in (n, n + WORDS, n + WORDS))
    rel_h, rel_w = (torch.randn(batch, heads, n, side, device="cuda", dtype=dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, v, rel_h, rel_w)]

    def score(logit, b, h, i, j):
        place = (j - WORDS).clamp(min=0)
        rel = rel_h[b, h, i, place // side] + rel_w[b, h, i, place % side]
        return torch.where(j < WORDS, logit, logit + rel)

    attend = torch.compile(partial(flex_attention, score_mod=score))
    grad = torch.randn_like(q)
    try:
        call = {"flex": lambda: torch.autograd.grad(attend(q, k, v), leaves, grad)}
        return common.alternate(call, rounds, "cuda")["flex"]
    except Exception as e:  # whatever the compiler makes of it is the result
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"


COLUMNS = {
    "ViT": lambda r: r["width"],
    "px": lambda r: r["size"],
    "type": lambda r: r["dtype"],
    "batch": lambda r: r["batch"],
    "backend": lambda r: r["backend"],
    "ms": lambda r: f"{r['step_seconds'] * 1e3:.1f}",
    "naive ms": lambda r: f"{r['naive_seconds'] * 1e3:.1f}",
    "faster": lambda r: f"{r['speedup']:.2f}x",
    "kept MiB": lambda r: f"{r['saved_bytes'] / 2**20:.0f}",
    "naive MiB": lambda r: f"{r['naive_saved_bytes'] / 2**20:.0f}",
    "ratio": lambda r: f"{r['memory_ratio']:.2f}",
    "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.0f}",
    "naive peak": lambda r: f"{r['naive_peak_bytes'] / 2**20:.0f}",
    "ms of each": lambda r: ", ".join(f"{b} {s * 1e3:.1f}" for b, s in r["seconds_by_backend"].items()),
}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", nargs="+", default=["vit_b", "vit_h"], choices=list(SIZES))
    parser.add_argument("--size", nargs="+", type=int, default=[512, 1024], help="pixels")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    parser.add_argument("--device", default=device)
    parser.add_argument("--batch", type=int, default=32 if device == "cuda" else 1, help="at 512 px, a quarter above")
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    rows = []
    for dtype in (getattr(torch, d) for d in args.dtype):
        for width in args.width:
            for size in args.size:
                batch = args.batch if size <= 512 else max(1, args.batch // 4)
                rows.append(row(width, size, batch, args.device, dtype, args.rounds))
                if args.device == "cuda":
                    rows[-1]["flex_seconds"] = flex_seconds(width, size, batch, dtype, args.rounds)
                print(common.table(rows[-1:], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    result = common.conditions(args.device) | {"benchmark": "attention", "rows": rows}
    name = "attention" if args.device == "cpu" else f"attention_{args.device}"
    text = f"# One attention layer, forward and backward\n\n{result['machine']}, {result['date']}. "
    text += "kept: bytes that wait for the backward pass; peak: measured, beyond what was there before.\n\n"
    common.write(args.out, name, result, text + common.table(rows, COLUMNS))
    common.plot(
        args.out / f"{name}.png",
        rows,
        lambda r: f"{r['width']} {r['size']} px {r['dtype']} ({r['backend']})",
        f"Attention with words and relative positions, against the naive formulation ({result['machine']})",
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
