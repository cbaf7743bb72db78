"""Parts of a training step that are computed in another way than the plain one: time, memory, and what waits for backward.

python benchmarks/step_parts.py --json

On a CPU in fp32 at a small batch, on a GPU in bf16 at 32 samples. `train_step.py` has the same rows in its report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import common  # noqa: E402
from dit_ds.models import losses, sam  # noqa: E402
from dit_ds.models.image_encoder import linear_of_gelu  # noqa: E402

MIB = 2**20


def loss(device: str, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """BCE at 1024 px of logits at a quarter of that."""
    logits = torch.randn(batch, 256, 256, device=device, requires_grad=True)
    mask = (torch.rand(batch, 1024, 1024, device=device) > 0.5).to(torch.uint8)
    weight = torch.ones(batch, device=device)
    return {
        "plain": lambda: (losses.of_samples(logits, mask.float(), 0.0, False) * weight).mean(),
        "ours": lambda: losses.segmentation_loss(logits, mask, weight),
    }


def decoder_attention(device: str, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The mask decoder's attention of the prompts to a 1024 px image, and back."""
    attention = sam.DecoderAttention(256, 8, downsample_rate=2).to(device, dtype)
    prompts = torch.randn(batch, 25, 256, device=device, dtype=dtype, requires_grad=True)
    image = torch.randn(batch, 4096, 256, device=device, dtype=dtype, requires_grad=True)

    def both(attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        return attend(prompts, image, image).sum() + attend(image, prompts, prompts).sum()

    plain = super(sam.DecoderAttention, attention).forward
    return {"plain": lambda: both(plain), "ours": lambda: both(attention.fused)}


def gelu_and_linear(device: str, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The MLP's second half of a layer of ViT-B at 1024 px."""
    x = torch.randn(batch, 4096, 3072, device=device, dtype=dtype, requires_grad=True)
    linear = torch.nn.Linear(3072, 768).to(device, dtype)
    return {
        "plain": lambda: F.linear(F.gelu(x), linear.weight, linear.bias).sum(),
        "ours": lambda: linear_of_gelu(x, linear.weight, linear.bias).sum(),
    }


PARTS = {"loss at 1024 px": loss, "mask decoder's attention": decoder_attention, "GELU and linear": gelu_and_linear}


def measure(device: str, rounds: int) -> list[dict[str, Any]]:
    """A row a part: seconds forward and backward, bytes kept for backward, and peak."""
    batch, dtype = (32, torch.bfloat16) if device == "cuda" else (2, torch.float32)
    rows = []
    for name, make in PARTS.items():
        calls = make(device, batch, dtype)
        seconds = common.alternate({n: lambda f=f: f().backward() for n, f in calls.items()}, rounds, device)
        row: dict[str, Any] = {"part": name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
        for n, f in calls.items():
            row[n] = {"seconds": seconds[n], "saved_bytes": common.saved_bytes(f), "peak_bytes": _peak(f)}
        rows.append(row)
    return rows


def _peak(forward: Callable[[], torch.Tensor]) -> int:
    """Most bytes of tensors that a forward and backward pass hold at once, beyond those that were there."""
    with common.LiveTensors() as live:
        forward().backward()
    return live.peak


def report(rows: list[dict[str, Any]]) -> str:
    """The Markdown of the table."""
    text = "\n## Parts that are not computed in the plain way\n\nForward and backward; plain / ours.\n\n"
    columns = {"part": lambda r: r["part"], "batch": lambda r: r["batch"]}
    columns["ms"] = lambda r: f"{r['plain']['seconds'] * 1e3:.1f} / {r['ours']['seconds'] * 1e3:.1f}"
    columns["kept MiB"] = lambda r: " / ".join(f"{r[n]['saved_bytes'] / MIB:.1f}" for n in ("plain", "ours"))
    columns["peak MiB"] = lambda r: " / ".join(f"{r[n]['peak_bytes'] / MIB:.1f}" for n in ("plain", "ours"))
    text += common.table(rows, columns)
    return text + (
        "\nOn a CPU the mask decoder's attention is SAM's own, whatever this shows. LayerNorm and residual are the plain "
        "ones: `train.compile` fuses them.\n"
    )


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--name", default="step_parts_cuda" if cuda else "step_parts", help="of the files written")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    result = common.conditions(device) | {"benchmark": "step_parts", "parts": measure(device, args.rounds)}
    text = f"# Parts of a training step\n\n{result['machine']}, {result['date']}.\n{report(result['parts'])}"
    common.write(args.out, args.name, result, text)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
