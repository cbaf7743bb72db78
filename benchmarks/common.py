"""What the benchmarks share: paired timings, memory of a call, the naive formulation, and where results go."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.memory.ledger import LiveTensors
from dit_ds.models.image_encoder import WordBlock

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def naive_attention(block: WordBlock, tokens: Tensor, words: int, word_mask: Tensor | None) -> Tensor:
    """SAM's attention over the concatenation [words; image] (B, T+N, D), with a map and a bias of its size.

    The positions are added by segment_anything's own function to the image's part of the map.
    """
    from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

    attn = block.attn
    b, length, dim = tokens.shape
    heads = attn.num_heads
    side = int((length - words) ** 0.5)
    qkv = nn.functional.linear(tokens, attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.view(b, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, b * heads, length, -1).unbind(0)
    logits = (q * attn.scale) @ k.transpose(-2, -1)  # (B*heads, T+N, T+N)
    places = (logits[:, words:, words:], q[:, words:])
    logits[:, words:, words:] = add_decomposed_rel_pos(
        *places, attn.rel_pos_h, attn.rel_pos_w, (side, side), (side, side)
    )
    if word_mask is not None:
        padding = nn.functional.pad(~word_mask, (0, length - words)).repeat_interleave(heads, 0)[:, None]
        logits.masked_fill_(padding, float("-inf"))
    out = (logits.softmax(-1) @ v).view(b, heads, length, -1).transpose(1, 2).reshape(b, length, dim)
    return attn.proj(out)


def naive_block(block: WordBlock, x: Tensor, words: Tensor | None = None, word_mask: Tensor | None = None) -> Tensor:
    """SAM's `Block` over the concatenation, all rows through everything; the words' rows are dropped at the end."""
    b, h, w, dim = x.shape
    t = 0 if words is None else words.shape[1]
    tokens = x.flatten(1, 2) if words is None else torch.cat([words, x.flatten(1, 2)], dim=1)
    tokens = tokens + naive_attention(block, block.norm1(tokens), t, word_mask)
    hidden = nn.functional.gelu(block.mlp.lin1(block.norm2(tokens)))
    tokens = tokens + nn.functional.linear(hidden, block.mlp.lin2.weight, block.mlp.lin2.bias)
    return tokens[:, t:].view(b, h, w, dim)


def make_naive(model: nn.Module, autocast: torch.dtype | None = None) -> None:
    """Give a DITSAM's layers the naive formulation, with the same weights; under autocast where a type is given."""
    for block in model.image_encoder.blocks:
        block.forward = naive_block.__get__(block)
    if autocast is not None:
        device = next(model.parameters()).device.type
        model.forward = torch.autocast(device if device == "cuda" else "cpu", autocast)(model.forward)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call; one after another in every round, so that the machine's moods hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that a call has beyond those before it: CUDA's allocator, or the process's resident memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that the allocator kept would hide the call's own
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that wait for the backward pass after a forward: all storages made in it that are still alive."""
    with LiveTensors() as live:
        result = forward()
        kept = live.now
    del result
    return kept


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the bound against which a CPU's MFU is given."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / alternate({"matmul": lambda: a @ b}, 5, device)["matmul"]


def conditions(device: str) -> dict[str, object]:
    """Date, machine and versions."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{len(os.sched_getaffinity(0))} cores, {cpu}"
    return {"date": str(datetime.date.today()), "machine": machine, "torch": torch.__version__}


def table(rows: list[dict], columns: dict[str, Callable[[dict], object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(f(r)) for f in columns.values()) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[dict], label: Callable[[dict], str], title: str) -> None:
    """Speed-up and memory ratio of each row over the naive formulation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [label(r) for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.8 + 0.38 * len(rows)), sharey=True)
    for axis, key, text in zip(
        axes, ("speedup", "memory_ratio"), ("times faster", "share of the memory kept for backward")
    ):
        bars = axis.barh(names, [r[key] for r in rows], color="#3b6ea5")
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(text)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})


def write(out: Path, name: str, result: dict, markdown: str) -> None:
    """`NAME.json` and `NAME.md`, and the JSON as the last line of stdout."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown)
