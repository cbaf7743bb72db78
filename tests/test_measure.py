"""`memory measure` without a GPU: on CPUs, where counting all tensors stands in for CUDA's allocator."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, dit_ds, launch, refused, warm
from memory_worker import CountingAllocator, configuration

from dit_ds.files import GIB
from dit_ds.planning.memory import measure

WORKER = ROOT / "tests/memory_worker.py"


def on_ranks(ranks: int, *settings: dict, program: Path = WORKER, real: bool = False) -> subprocess.CompletedProcess:
    """`memory_worker.py measure`, or a variation on it; under torchrun if `real`."""
    return (launch if real else warm)([str(program), "measure", *map(json.dumps, settings)], ranks, timeout=200)


def test_two_ranks_are_gathered_and_agree_with_the_tracker(tmp_path):
    files = {"timeline": str(tmp_path / "t.png"), "snapshot": str(tmp_path / "s.pickle")}
    done = on_ranks(2, {"stage": 2, "accumulation": 2, "ema_decay": 0.5} | files, {"stage": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    *reports, everything = map(json.loads, done.stdout.splitlines())
    assert reports == [ranks[0] for ranks in json.loads(done.stdout.splitlines()[-1])]  # one report, rank 0's
    for stage, (r, other) in zip((2, 3), everything):
        assert (r["measured"], r["stage"], r["ranks"], r["micro_batch"], r["oom"]) == (True, stage, 2, 2, None)
        assert r["precision"] == "bf16" and r["device"] == "CPU"
        assert list(r["phases"]) == ["load", "warmup", "forward", "backward", "step"]
        in_step = [r["phases"][p] for p in ("forward", "backward", "step")]
        assert r["peak_gib"] == max(r["ranks_gib"]) == max(in_step) and len(r["ranks_gib"]) == 2
        assert r["reserved_gib"] == 2 * r["peak_gib"]
        # the step under the tracker, which was not there when the rest was made, comes to the same
        assert sum(r["categories"].values()) == pytest.approx(r["ranks_gib"][0])
        assert abs(r["categories"]["unseen"]) < 0.02 * r["peak_gib"]
        assert other["phases"] == r["phases"] and other["categories"]["optimizer"] == r["categories"]["optimizer"]
        assert (r["after"]["average"] > 0) == (stage == 2)
        assert r["modules"]["image_encoder.blocks.0"] == r["modules"]["image_encoder.blocks.3"] > 0
        batch = 8 if stage == 2 else 4
        assert r["samples_per_second"] == pytest.approx(batch / r["step_seconds"])
    assert (tmp_path / "t.png").stat().st_size > 10_000 and (tmp_path / "s.pickle").exists()


@pytest.mark.parametrize(("capacity", "phase"), [(5 << 20, "load"), (60 << 20, "backward")])
def test_running_out_of_memory_is_a_result(world, tmp_path, capacity, phase):
    reports, config = [], configuration(str(tmp_path), 2)
    request = measure.MeasureRequest(1, 0, snapshot=str(tmp_path / "s.pickle"))
    with CountingAllocator(capacity) as allocator:
        result = measure.measure(config, world, allocator, request, reports.append)
    assert reports == [result]
    oom = result["oom"]
    assert (oom["phase"], oom["micro_batch"], oom["rank"]) == (phase, 2, 0)
    assert oom["allocated_gib"] > oom["capacity_gib"] == capacity / GIB
    assert "\n" not in oom["message"] and "out of memory" in oom["message"]
    assert result["phases"][phase] == oom["allocated_gib"] and result["peak_gib"] >= oom["allocated_gib"]
    assert (tmp_path / "s.pickle").exists()  # with what to look for
    assert any(f"out of memory in {phase} on rank 0" in line for line in measure.lines(result))


def test_one_ranks_lack_of_memory_ends_all():
    """Rank 1 alone runs out, in a backward pass whose collectives rank 0 waits in."""
    start = time.monotonic()
    done = on_ranks(2, {"stage": 2, "capacity": 60 << 20})
    assert done.returncode == 1 and time.monotonic() - start < 120
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["oom"] | {"message": ""} == json.loads(line)["oom"] | {"rank": 1, "message": ""}
    assert "RuntimeError" not in done.stderr and "OutOfMemoryError" not in done.stderr


VARIATION = """
import json, sys, time
sys.path.insert(0, {tests!r})
import memory_worker as worker
{change}
world = worker.connect()
worker.measured(json.loads(sys.argv[2]), world, {folder!r})
"""


def variation(tmp_path: Path, change: str) -> Path:
    """Ranks of `memory_worker.py measure` with something changed."""
    program = tmp_path / "variation.py"
    program.write_text(VARIATION.format(tests=str(ROOT / "tests"), change=change, folder=str(tmp_path / "text")))
    return program


@pytest.mark.slow
def test_ranks_stay_until_the_first_has_spoken(tmp_path):
    """Rank 1 alone runs out, and takes its time to write the snapshot; torchrun ends it as soon as rank 0 ends."""
    slow = "worker.CountingAllocator.snapshot = lambda self, path: (time.sleep(3), path.write_text('whole'))"
    settings = {"stage": 2, "capacity": 60 << 20, "snapshot": str(tmp_path / "s.pickle")}
    done = on_ranks(2, settings, program=variation(tmp_path, slow), real=True)
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["oom"]["rank"] == 1 and (tmp_path / "s.pickle").read_text() == "whole"
    assert "RuntimeError" not in done.stderr


def test_a_breakdown_that_does_not_fit_leaves_the_measurement(tmp_path):
    """Rank 1 alone runs out in the step under the tracker, whose collectives rank 0 waits in."""
    change = """
def breakdown(steps, *rest, before=worker.measure.__globals__["_breakdown"]):
    if steps.world.rank == 1:
        raise worker.torch.OutOfMemoryError("CUDA out of memory. Tried")
    return before(steps, *rest)
worker.measure.__globals__["_breakdown"] = breakdown
"""
    files = {"timeline": str(tmp_path / "t.png"), "snapshot": str(tmp_path / "s.pickle")}
    done = on_ranks(2, {"stage": 2} | files, program=variation(tmp_path, change))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["oom"] is None and result["categories"] == {} == result["modules"]
    assert result["peak_gib"] == max(result["ranks_gib"]) > 0 < result["step_seconds"]
    assert (tmp_path / "s.pickle").exists() and not (tmp_path / "t.png").exists()
    assert "no categories: the extra step that finds them didn't fit: CUDA out of memory. Tried" in measure.lines(
        result
    )


@pytest.mark.parametrize(
    "said",
    [
        "NCCL error: Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_libraries_lack_of_memory_is_recognised(said):
    assert measure._out_of_memory(RuntimeError(said))
    assert not measure._out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))


@pytest.mark.skipif(measure.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_points_to_plan():
    base = str(ROOT / "configs/base.yaml")
    said = refused(dit_ds("memory", "measure", "--config", base, check=None))
    assert said.endswith(f"no CUDA GPU here: 'dit-ds memory plan --config {base}' predicts the same without one")
    for wrong in (["--steps", "0"], ["--warmup", "x"], ["--trian.lr", "1"]):
        assert dit_ds("memory", "measure", "--config", base, *wrong, check=None).returncode == 2
