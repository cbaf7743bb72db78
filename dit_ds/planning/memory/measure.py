"""A training step's memory and time, measured: the run's model and engine on its ranks' GPUs, some steps of zeros.

The first steps run as in training, and the allocator's peaks are read phase by phase. One more step runs under the memory
tracker, for the categories; where it runs out of memory, the result has none.
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.data.progress import progress_bar
from dit_ds.distributed import World, connect, disconnect, gather_objects, set_environment
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import GIB
from dit_ds.models.text_encoder import offline_text
from dit_ds.planning.memory import timeline
from dit_ds.planning.memory.abort import AbortChannel
from dit_ds.planning.memory.allocator_counters import Allocator, AllocatorPhasePeaks, CudaAllocator
from dit_ds.planning.memory.profiled_step import Steps
from dit_ds.planning.memory.tracker import MemoryTracker, Profile
from dit_ds.processes import die_with_parent


@dataclass(frozen=True)
class MeasureRequest:
    """What to measure.

    Attributes:
        steps: number of measured steps, at least 1.
        warmup: number of steps before them, in which Adam's states, communicators and workspaces are allocated.
        timeline: PNG of rank 0's step to write, or None.
        snapshot: PyTorch's memory snapshot to write, or None: all allocations from the load to the last measured step.
    """

    steps: int = 5
    warmup: int = 2
    timeline: str | None = None
    snapshot: str | None = None


def run(config: RunConfig, path: str, request: MeasureRequest, report: Callable[[dict[str, Any]], None]) -> int:
    """Measure on this process's GPU, as one of the ranks under torchrun or srun.

    Args:
        path: of the configuration, for the error message.
        report: called with the result, on one rank: the first that runs out of memory, else rank 0.
    Returns:
        The exit status: 1 if it ran out of memory.
    Raises:
        UserError: no GPU, or a timeline that can't be drawn.
    """
    if not torch.cuda.is_available():
        raise UserError(f"no CUDA GPU here: 'dit-ds memory plan --config {path}' predicts the same without one")
    if request.timeline:
        timeline.require(request.timeline)
    deepspeed_config(config, set_environment()[1])  # refuse a wrong one before any rank waits
    world = connect()
    result = measure(config, world, CudaAllocator(world.device), request, report)
    disconnect()
    return 1 if result["oom"] else 0


def measure(config: RunConfig, world: World, allocator: Allocator, request: MeasureRequest,
            report: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:  # fmt: skip
    """Take the steps and measure them. Collective.

    A rank that runs out of memory can't gather the others' results, as they wait for it in a collective: it reports its
    own numbers, and with several ranks all processes exit here with status 1, through the `AbortChannel` or, where that
    fails, the collective's time-out. In the step under the tracker it reports what was gathered before, and the status
    is 0.

    Args:
        allocator: of the world's device.
        report: called with the result, on one rank.
    Returns:
        What `dit-ds memory measure --json` prints; the same on every rank but for categories and modules, which are the
        rank's.
    """
    # a cache of text features would hold the batch's after the first step
    config = validate(merge(config.model_dump(), {"text": {"cache": 0}}))
    result, peaks, channel = _described(config, world), AllocatorPhasePeaks(allocator), AbortChannel(world)
    if request.snapshot:
        allocator.record()
    try:
        mine, breakdown = _take(config, world, peaks, request, result["micro_batch"])
        result |= _together(gather_objects(mine), config)
        peaks.enter("breakdown")
        profile = breakdown()
        gather_objects(None)  # no rank goes on before all have their profile
    except RuntimeError as e:
        if not _out_of_memory(e):
            channel.close()
            raise
        measured = result["step_seconds"] is not None
        if measured:
            result["breakdown_failed"] = _message(e)
        else:
            result |= _failed(e, world, peaks, result["micro_batch"])
        with channel.first_failure(0 if measured else 1) as first:
            if first and request.snapshot and not measured:
                allocator.snapshot(Path(request.snapshot))
            if first:
                report(result)
        return result
    result |= _categories(profile, _peak(mine))
    channel.close()
    if world.main:
        if request.timeline:
            timeline.draw(profile, request.timeline, f"{_title(result)}: measured")
        report(result)
    return result


def in_process(config: RunConfig, ranks: int = 1, snapshot: str | Path | None = None) -> dict[str, Any]:
    """The result of `dit-ds memory measure`, run in new processes, so that their memory holds nothing else.

    Args:
        snapshot: PyTorch's memory snapshot to write, see `MeasureRequest`.
    Raises:
        RunFailed: it ended without a result.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        config.save(Path(folder) / "config.yaml")
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "dit_ds.cli", "memory", "measure", "--json", "--config",
             f"{folder}/config.yaml", *(["--snapshot", str(snapshot)] if snapshot else [])],
            capture_output=True, text=True, preexec_fn=die_with_parent,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RunFailed(f"memory measure ended with {done.returncode}: {' '.join(done.stderr[-500:].split())}")
    return json.loads(lines[-1])


def _described(config: RunConfig, world: World) -> dict[str, Any]:
    """The result's keys: what is measured, and None or nothing for the numbers."""
    ds_config = deepspeed_config(config, world.world_size)
    cuda = world.device.type == "cuda"
    return {
        "measured": True,
        "device": torch.cuda.get_device_name(world.device) if cuda else "CPU",
        "stage": DeepSpeedJson(ds_config).stage,
        "ranks": world.world_size,
        "micro_batch": DeepSpeedJson(ds_config).micro_batch,
        "precision": DeepSpeedJson(ds_config).precision,
        "peak_gib": None, "reserved_gib": None, "device_used_gib": None, "phases": {}, "categories": {}, "after": {},
        "modules": {}, "host_gib": None, "step_seconds": None, "samples_per_second": None, "ranks_gib": [], "oom": None,
        "breakdown_failed": None,
    }  # fmt: skip


_IN_STEP = ("forward", "backward", "step")


def _take(config: RunConfig, world: World, meter: AllocatorPhasePeaks, request: MeasureRequest,
          micro_batch: int) -> tuple[dict[str, Any], Callable[[], Profile]]:  # fmt: skip
    """This rank's numbers (bytes, seconds) of steps as in training, and a function that profiles one more step."""
    allocator, seconds, before = meter.allocator, [], _tensors()
    with offline_text(config):
        steps = Steps.load(config, world, meter)
    accumulation = steps.engine.gradient_accumulation_steps()
    number = request.warmup + request.steps
    for i in progress_bar(range(number), "measure", unit="step", disable=not world.main, mininterval=1):
        meter.warming = i < request.warmup
        allocator.synchronize()
        start = time.perf_counter()
        steps.take(micro_batch, accumulation)
        allocator.synchronize()
        if not meter.warming:
            seconds.append(time.perf_counter() - start)
    if request.snapshot and world.main:
        allocator.snapshot(Path(request.snapshot))
    mine = {"peaks": dict(meter.peaks), "used": allocator.used(), "seconds": statistics.median(seconds)}
    return mine, lambda: _breakdown(steps, micro_batch, before)


def _breakdown(steps: Steps[None], micro_batch: int, before: list[Tensor]) -> Profile:
    """Profile one more step under a tracker, which is first given the tensors that exist.

    Args:
        before: tensors that existed before the engine.
    """
    device, others = steps.world.device.type, {id(x) for x in before}
    tracker = MemoryTracker(host=lambda x: x.device.type != device)
    tracked = Steps(steps.config, steps.world, tracker, steps.engine, steps.state)
    gradients = (p.grad for p in steps.engine.module.parameters() if p.grad is not None)
    tracker.track_existing(itertools.chain((x for x in _tensors() if id(x) not in others), gradients))
    with tracker:
        tracked.tag_state()
        return tracked.take(micro_batch)


def _tensors() -> list[Tensor]:
    """All existing tensors that have storage."""
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]  # isinstance would import lazy modules
    return [x for x in found if x.device.type != "meta" and x.layout == torch.strided]


def _together(ranks: list[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    """The result from all ranks' numbers."""

    def most(phase: str, kind: int) -> int:
        return max(r["peaks"].get(phase, (0, 0))[kind] for r in ranks)

    names = [n for n in ("load", "warmup", "forward", "backward", "step") if n in ranks[0]["peaks"]]
    peaks, seconds = [_peak(r) for r in ranks], max(r["seconds"] for r in ranks)
    return {
        "peak_gib": max(peaks) / GIB,
        "reserved_gib": max(most(n, 1) for n in _IN_STEP) / GIB,
        "device_used_gib": max(r["used"] for r in ranks) / GIB,
        "phases": {n: most(n, 0) / GIB for n in names},
        "step_seconds": seconds,
        "samples_per_second": config.train.batch_size / seconds,
        "ranks_gib": [p / GIB for p in peaks],
    }


def _peak(mine: dict[str, Any]) -> int:
    """A rank's peak in a measured step, bytes."""
    return max(mine["peaks"][n][0] for n in _IN_STEP)


def _categories(profile: Profile, peak: int) -> dict[str, Any]:
    """The result's part from this rank's profile and measured peak."""
    return {
        # not allocated by operators: workspaces of cuBLAS and cuDNN, memory held for other streams
        "categories": _gib(profile.at_peak) | {"unseen": (peak - profile.peak) / GIB},
        "after": _gib(profile.after),
        "modules": _gib(by_block(profile.kept)),
        "host_gib": profile.host / GIB,
    }


def _gib(sizes: dict[str, int]) -> dict[str, float]:
    return {name: size / GIB for name, size in sizes.items()}


def by_block(kept: dict[str, int]) -> dict[str, int]:
    """Sizes by module, summed over the parts of a numbered block (`image_encoder.blocks.7`), else two names deep."""
    sums: dict[str, int] = defaultdict(int)
    for module, size in kept.items():
        parts = module.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        sums[".".join(parts[: numbers[0] + 1 if numbers else 2])] += size
    return dict(sums)


# --- out of memory


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether it is PyTorch's error, or NCCL's, cuBLAS', cuDNN's or the driver's message."""
    said = re.search(r"out of memory|_STATUS_\w*ALLOC\w*_FAILED", str(error), re.IGNORECASE)
    return isinstance(error, torch.OutOfMemoryError) or said is not None


def _message(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:400]


def _failed(error: RuntimeError, world: World, meter: AllocatorPhasePeaks, micro_batch: int) -> dict[str, Any]:
    """The result of a rank that ran out of memory."""
    allocated, reserved = meter.allocator.peaks()
    phase = meter.phase
    meter.enter("")
    peaks = meter.peaks
    return {
        "peak_gib": max(p[0] for p in peaks.values()) / GIB,
        "reserved_gib": max(p[1] for p in peaks.values()) / GIB,
        "device_used_gib": meter.allocator.used() / GIB,
        "phases": {n: p[0] / GIB for n, p in peaks.items()},
        "oom": {
            "phase": phase,
            "rank": world.rank,
            "micro_batch": micro_batch,
            "message": _message(error),
            "allocated_gib": allocated / GIB,
            "capacity_gib": meter.allocator.capacity() / GIB,
        },
    }


# --- as text


def _title(result: dict[str, Any]) -> str:
    ranks = "1 rank" if result["ranks"] == 1 else f"{result['ranks']} ranks"
    stage = f"ZeRO stage {result['stage']}, {result['precision']}"
    return f"{result['device']}, {ranks}, {stage}, micro-batch {result['micro_batch']}"


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text; sizes in GiB."""
    r, out = result, [_title(result)]
    if r["oom"]:
        oom = r["oom"]
        out.append(f"out of memory in {oom['phase']} on rank {oom['rank']}, {oom['allocated_gib']:.2f} GiB allocated "
                   f"of {oom['capacity_gib']:.2f}: {oom['message']}")  # fmt: skip
    else:
        out.append(f"peak {r['peak_gib']:.2f} GiB allocated, {r['reserved_gib']:.2f} reserved, "
                   f"{r['device_used_gib']:.2f} used on the device")  # fmt: skip
        out.append(f"{r['step_seconds']:.4f} s a step, {r['samples_per_second']:.1f} samples a second")
    out.append("by phase: " + ", ".join(f"{n} {x:.2f}" for n, x in r["phases"].items()))
    if r["categories"]:
        out += ["", f"{'GiB of rank 0':<14}{'at the peak':>12}{'after a step':>14}"]
        out += [f"{n:<14}{x:>12.3f}{r['after'].get(n, 0):>14.3f}" for n, x in r["categories"].items()]
        largest = sorted(r["modules"].items(), key=lambda item: -item[1])[:12]
        out += ["", "kept for the backward pass, GiB, the largest:"]
        out += [f"  {n or '(the model itself)'}  {x:.3f}" for n, x in largest]
    if r["breakdown_failed"]:
        out += ["", f"no categories: the extra step that finds them didn't fit: {r['breakdown_failed']}"]
    if len(set(r["ranks_gib"])) > 1:
        out += ["", "peaks of the ranks: " + ", ".join(f"{x:.2f}" for x in r["ranks_gib"])]
    return out
