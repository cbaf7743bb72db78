"""Errors of memory predictions in the terms of the literature: figures for benchmarks/results/memory_error*

python benchmarks/memory_error.py             # predictions alone; with a GPU also its figures and the errors

A transformer of this file's own is trained for some steps: on the fake GPU, and where there is a GPU, on it. Of each
configuration the peaks that PyTorch's allocator counts are compared: the median and the largest relative error, and the
share of plans that would have run out of memory: runs that take more than the GPU which the plan says is enough.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dit_ds.files import GIB  # noqa: E402
from dit_ds.planning.gpus import known_gpu  # noqa: E402
from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors  # noqa: E402
from dit_ds.planning.memory.figures import figures  # noqa: E402
from dit_ds.planning.memory.kernels.gpu_scratch import GpuScratch  # noqa: E402
from dit_ds.planning.memory.plan import MARGIN  # noqa: E402
from dit_ds.planning.memory.tracker import MemoryTracker  # noqa: E402

VOCABULARY, STEPS = 8192, 3
# width, layers, samples, tokens, autocast, allocator settings
SIZES = [(512, 4, 8, 256), (768, 8, 8, 512), (1024, 12, 4, 512), (1024, 6, 16, 256)]
CASES = [
    {"width": w, "layers": n, "batch": b, "tokens": t, "autocast": autocast, "settings": settings}
    for (w, n, b, t), autocast, settings in itertools.product(SIZES, (False, True), ("", "expandable_segments:True"))
]


class Layer(nn.Module):
    """Attention with its maps kept, and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        attended = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(b, n, width))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Token ids (B, N) to logits (B, N, vocabulary)."""

    def __init__(self, width: int, layers: int, tokens: int):
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(tokens, width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(ids) + self.positions)))


def train(case: dict, device: torch.device) -> None:
    """Some AdamW steps, with gradients set to None after each, as by default."""
    model = Transformer(case["width"], case["layers"], case["tokens"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(STEPS):
        ids = torch.zeros(case["batch"], case["tokens"], dtype=torch.long, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=case["autocast"]):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss, ids


def predicted(case: dict, gpu: str) -> dict[str, float]:
    """GiB by figure, from the fake GPU."""
    tracker = MemoryTracker(host=lambda x: x.device.type == "cpu", gpu=GpuScratch(gpu))
    with fake_cluster(1) as world, fake_tensors(tracker):
        train(case, world.device)
    found = figures(tracker.requests.requests, tracker.requests.sites, case["settings"], share=0.002)
    return {k: getattr(found, k) / GIB for k in ("allocated", "least_capacity", "reserved")}


def measured(case: dict) -> dict[str, float]:
    """GiB by figure, from this GPU."""
    train(case, torch.device("cuda", 0))
    return {"allocated": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}


def in_process(what: str, case: dict, gpu: str) -> dict[str, float]:
    """The same in a process of its own, under the case's settings."""
    environment = {"PYTORCH_ALLOC_CONF": case["settings"]} if case["settings"] else {}
    done = subprocess.run([sys.executable, __file__, "--one", what, "--case", json.dumps(case), "--gpu", gpu],
                          stdout=subprocess.PIPE, text=True, check=True, timeout=600,
                          env={**os.environ, **environment})  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def errors(rows: list[dict]) -> dict:
    """The literature's terms, of rows that were measured."""
    found = {}
    for figure in ("allocated", "reserved"):
        relative = [abs(r["predicted"][figure] / r["measured"][figure] - 1) for r in rows]
        found[figure] = {"median": statistics.median(relative), "largest": max(relative)}
    short = [r["predicted"]["least_capacity"] * (1 + MARGIN) < r["measured"]["allocated"] for r in rows]
    return found | {"would_have_run_out": sum(short) / len(short)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=["predicted", "measured"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="one tiny case: that it works")
    parser.add_argument("--gpu", default="H100", help="to predict for where there is none (default H100)")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(predicted(args.case, args.gpu) if args.one == "predicted" else measured(args.case)))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = known_gpu(torch.cuda.get_device_name()) or args.gpu if device == "cuda" else args.gpu
    rows = []
    for case in [CASES[0] | {"width": 64, "layers": 1}] if args.small else CASES:
        row = {**case, "predicted": in_process("predicted", case, gpu)}
        if device == "cuda":
            row["measured"] = in_process("measured", case, gpu)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    result = {"conditions": common.conditions(device), "gpu": gpu, "rows": rows}
    if device == "cuda":
        result["errors"] = errors(rows)
    common.write(args.out, "memory_error_cuda" if device == "cuda" else "memory_error", result, in_words(result))
    return 0


def in_words(result: dict) -> str:
    """memory_error*.md"""
    columns = {
        "transformer": lambda r: f"{r['layers']} layers of {r['width']}, {r['batch']} x {r['tokens']} tokens",
        "precision": lambda r: "autocast bf16" if r["autocast"] else "fp32",
        "allocator": lambda r: r["settings"] or "default",
    }
    for figure in ("allocated", "least_capacity", "reserved"):
        columns[f"{figure.replace('_', ' ')}, predicted"] = lambda r, k=figure: f"{r['predicted'][k]:.3f}"
        if "errors" in result and figure != "least_capacity":
            columns[f"{figure}, measured"] = lambda r, k=figure: f"{r['measured'][k]:.3f}"
    where = result["conditions"]
    text = f"Training steps of a transformer, GiB, predicted for {result['gpu']} with torch {where['torch']}, {where['date']}."
    if "errors" in result:
        e = result["errors"]
        text += " " + "; ".join(
            f"{k}: median error {e[k]['median']:.2%}, largest {e[k]['largest']:.2%}" for k in ("allocated", "reserved")
        )
        text += (
            f"; {e['would_have_run_out']:.0%} of plans would have run out of memory (measured on {where['machine']})."
        )
    else:
        text += " Not measured: there was no GPU."
    return f"{text}\n\n{common.table(result['rows'], columns)}\n`python benchmarks/memory_error.py`\n"


if __name__ == "__main__":
    sys.exit(main())
