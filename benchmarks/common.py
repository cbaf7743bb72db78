"""What the benchmarks share: paired timings, memory of a call, the naive formulation, and where results go."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dit_ds.planning.memory.live_tensors import LiveTensors
from dit_ds.processes import usable_cores

RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call in each round; one after another, so that the machine's moods hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            if i:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


def alternate(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call, see `in_turns`."""
    return {name: statistics.median(s) for name, s in in_turns(calls, rounds, device).items()}


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


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: `private`, `shared` with others, and `share`, its part of them (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private, shared = (sum(kilobytes[f"{kind}_{x}"] for x in ("Clean", "Dirty")) for kind in ("Private", "Shared"))
    return {"private": private * 1024, "shared": shared * 1024, "share": kilobytes["Pss"] * 1024}


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
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{usable_cores()} cores, {cpu}"
    return {"date": str(datetime.date.today()), "machine": machine, "torch": torch.__version__}


def table(rows: list[dict], columns: dict[str, Callable[[dict], object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(f(r)) for f in columns.values()) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[dict], label: Callable[[dict], str], title: str) -> None:
    """Speed-up and memory ratio of each row over the naive formulation."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    names = [label(r) for r in rows]
    figure = Figure(figsize=(11, 0.8 + 0.38 * len(rows)))
    axes = figure.subplots(1, 2, sharey=True)
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
