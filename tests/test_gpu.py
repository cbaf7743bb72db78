"""What only a GPU can show: checkpoints through pinned memory, fp16's loss scale, offload between two kinds of memory, and
whether the predicted memory is the measured one."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, dit_ds, metrics_of

sys.path.append(str(ROOT / "benchmarks"))
import memory as memory_benchmark

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("first", "then"), [("0", "2"), ("2", "3"), ("3", "2_offload"), ("2_offload", "0")])
def test_a_run_on_cuda_goes_on_at_another_stage(config_file, tmp_path, precision, first, then):
    """Digests are compared by the run itself; losses here, with the run that was not stopped."""

    def train(run, stage, steps, *more):
        dit_ds("train", "--config", config_file, "--run_dir", tmp_path / run, "--deepspeed.precision", precision,
               "--deepspeed.config", ROOT / f"configs/deepspeed/zero{stage}.json", "--train.max_steps", steps,
               "--train.ema_decay", "0.5", *more)  # fmt: skip
        return [m["loss"] for m in metrics_of(tmp_path / run)]

    whole = train("whole", first, "6")
    train("cut", first, "3")
    cut = train("cut", then, "6", "--resume")
    assert len(cut) == 6
    np.testing.assert_allclose(cut, whole, rtol={"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}[precision])
    meta = json.loads((tmp_path / "cut/checkpoints/step_00000006/meta.json").read_text())
    assert meta["engine"]["loss_scale"] if precision == "fp16" else not meta["engine"]["loss_scale"]
    line = metrics_of(tmp_path / "cut")[-1]
    assert 0 < line["peak_memory_gib"] <= line["reserved_memory_gib"]


@pytest.mark.parametrize("name", memory_benchmark.cases())
def test_the_measured_peak_on_cuda_is_the_predicted_one(name):
    """Each in processes of its own. The tracker must see what the allocator counts, but for kernels' workspaces."""
    row = memory_benchmark.compare(name, memory_benchmark.cases()[name])
    if row["oom"]:
        assert row["predicted_gib"] > 0.9 * row["oom"]["capacity_gib"], row
        return
    assert row["ratio"] == pytest.approx(1, abs=0.05), row
    assert abs(row["measured"]["unseen"]) < 0.05 * row["peak_gib"], row
    for category in ("parameters", "optimizer"):
        assert row["measured"][category] == pytest.approx(row["predicted"][category], rel=0.001), category


def test_running_out_of_memory_on_cuda_is_a_result(tmp_path):
    """More samples than any GPU holds: status 1, the report, no traceback; and a snapshot to look at."""
    config = memory_benchmark.cases()["L-DIT vit_b tuned, checkpointing none, batch 32"]
    config.save(tmp_path / "c.yaml")
    done = dit_ds("memory", "measure", "--json", "--config", tmp_path / "c.yaml", "--train.batch_size", 4096,
                  "--deepspeed.override.train_micro_batch_size_per_gpu", 4096, "--snapshot", tmp_path / "m.pickle",
                  check=1)  # fmt: skip
    result = json.loads(done.stdout)
    assert result["oom"]["phase"] == "forward" and result["oom"]["micro_batch"] == 4096
    assert 0 < result["oom"]["allocated_gib"] <= result["oom"]["capacity_gib"]
    assert "Traceback" not in done.stderr and (tmp_path / "m.pickle").stat().st_size > 0
