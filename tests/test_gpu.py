"""What only a GPU can show: checkpoints through pinned memory, fp16's loss scale, offload between two kinds of memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, dit_ds, metrics_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("first", "then"), [("0", "2"), ("2", "3"), ("3", "2_offload"), ("2_offload", "0")])
def test_a_run_on_cuda_goes_on_at_another_stage(config_file, tmp_path, precision, first, then):
    """Digests are compared by the run itself; losses here, with the run that was not stopped."""

    def train(run, stage, steps, *more):
        dit_ds("train", "--config", config_file, "--run_dir", tmp_path / run, "--deepspeed.precision", precision,
               "--deepspeed.config", ROOT / f"configs/deepspeed/zero{stage}.json", "--train.max_steps", steps,
               "--train.ema", "0.5", *more)  # fmt: skip
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
