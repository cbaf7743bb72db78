"""Muon and 8-bit Adam: what they compute, where they are refused, their states in checkpoints and in the memory plan."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MINILM, ROOT, dit_ds, metrics_of, on_ranks, refused, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds.checkpointing.reader import Reader
from dit_ds.config.load import validate
from dit_ds.engine import deepspeed_json
from dit_ds.engine.deepspeed_json import read_deepspeed_json
from dit_ds.engine.eight_bit import BLOCK, dequantize, quantize
from dit_ds.engine.optimizers import muon_matrices
from dit_ds.errors import UserError
from dit_ds.models.build import build_model
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.request import MemoryRequest

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
TOLD = {"dropout": False, "plain": True, "ema_decay": 0.5, "eps": 1e-6, "weight_decay": 0.1}
END = "checkpoints/step_00000004"


def test_muon_is_its_polynomial_of_the_singular_values_at_stages_1_and_2():
    """Against a loop of one process in fp64, with AdamW for the rest; a step with a NaN leaves the momentum as it was."""
    muon = TOLD | {"optimizer": "muon", "muon_lr": 1e-3, "lr_scale": {"image_encoder": 0.3}, "layer_decay": 0.8}
    for got in on_ranks(2, {"stage": 1} | muon, {"stage": 2, "nan_at": 1} | muon):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-5 and got["ema_error"] <= 1e-4
        assert got["back"] and got["adam_step"] == 3 - len(got["left_out"])


@needs_bitsandbytes
def test_8_bit_adam_is_adamw_but_for_the_rounding_of_its_moments():
    stages = (0, 1, 2, 3)
    for stage, got in zip(stages, on_ranks(2, *({"stage": s, "optimizer": "adamw_8bit"} | TOLD for s in stages))):
        assert got["loss_error"] <= 1e-4 and 0 < got["weight_error"] <= 2e-3, stage  # two steps at lr 1e-3
        assert got["back"] and got["adam_step"] == 3, stage


def table(signed: bool) -> torch.Tensor:
    """256 ascending values up to 1 that lie denser near 0; with signs down to a little above -1, as bitsandbytes' has."""
    x = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 127 if signed else 255)])
    return torch.cat([-0.993 * x[1:].flip(0), x, torch.ones(1)]).sort().values if signed else x


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5 * BLOCK), st.booleans(), st.floats(-30, 5))
def test_a_stored_moment_is_read_written_and_read_as_the_same_bits(seed, numel, signed, magnitude):
    """Any codes of blocks whose largest element has an outermost code, as rounding makes them; from any start."""
    g = torch.Generator().manual_seed(seed)
    values = table(signed)
    codes = torch.randint(0, 256, (numel,), generator=g, dtype=torch.uint8)
    for block in range(0, numel, BLOCK):
        codes[block] = int(torch.randint(0, 2, (), generator=g)) * 255 if signed else 255
    scales = torch.rand(-(-numel // BLOCK), generator=g) * 10**magnitude
    scales[::3] = 0
    read = dequantize(codes, scales, values, 0, numel)
    again, other = torch.zeros_like(codes), torch.zeros_like(scales)
    quantize(read, again, other, values)
    assert torch.equal(dequantize(again, other, values, 0, numel), read)
    start = numel // 3
    assert torch.equal(dequantize(codes, scales, values, start, numel - start), read[start:])


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_another_partition_rounds_a_moment_to_the_nearest_code(seed):
    x, values = torch.randn(1000, generator=torch.Generator().manual_seed(seed)), table(True)
    codes, scales = torch.zeros(1000, dtype=torch.uint8), torch.zeros(4)
    quantize(x, codes, scales, values)
    steps = (values[1:] - values[:-1]).max()
    error = (dequantize(codes, scales, values, 0, 1000) - x).abs()
    assert (error <= scales.repeat_interleave(BLOCK)[:1000] * (steps / 2 + 0.008)).all()


def refusal(optimizer: str, stage: str = "2", zero: dict | None = None, ds: dict | None = None, **train) -> str:
    config = validate({
        "train": {"optimizer": optimizer} | train,
        "deepspeed": {"config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                      "override": {"zero_optimization": zero or {}} | (ds or {})},
    })  # fmt: skip
    with pytest.raises(UserError) as e:
        read_deepspeed_json(config)
    return str(e.value)


def test_what_an_optimizer_does_not_go_with_is_refused(monkeypatch):
    assert "ZeRO stages 1 and 2, not 3" in refusal("muon", "3")
    assert "ZeRO stages 1 and 2, not 0" in refusal("muon", "0")
    for optimizer in ("muon", "adamw_8bit"):
        assert "does not go with offload" in refusal(optimizer, "2_offload")
    assert "set train.gradient_clipping 0" in refusal("muon", gradient_clipping=1.0)
    assert "fp16" in refusal("muon", ds={"bf16": {"enabled": False}, "fp16": {"enabled": True}})
    assert "use stage 2" in refusal("muon", "1", ds={"data_types": {"grad_accum_dtype": "fp32"}})
    assert "round_robin_gradients" in refusal("muon", zero={"round_robin_gradients": True})
    monkeypatch.setattr(deepspeed_json.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dit-ds[8bit]'" in refusal("adamw_8bit")


def write_config(shards: Path, folder: Path, precision: str, **train) -> Path:
    values = tiny_config(shards, folder / "whole")
    values["train"] |= {"max_steps": 4, "gradient_clipping": 0.0, "eps": 1e-6} | train
    values["checkpoint"], values["eval"] = {"every_steps": 2}, {"every_epochs": 0}
    values["deepspeed"]["precision"] = precision
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def digests(run: Path) -> dict:
    return json.loads((run / END / "meta.json").read_text())["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_goes_on_to_the_bit_and_on_other_ranks_at_another_stage(shards, tmp_path, precision):
    config = write_config(shards, tmp_path, precision, optimizer="muon", muon_lr=2e-3, ema_decay=0.5)
    dit_ds("train", "--config", config)
    whole = tmp_path / "whole"
    assert digests(whole).keys() == {"master", "momentum", "exp_avg", "exp_avg_sq", "ema"}
    assert all(line["lr/muon"] == pytest.approx(2 * line["lr"]) for line in metrics_of(whole))
    run = ["train", "--config", config, "--resume", "--run_dir"]
    dit_ds(*run, tmp_path / "cut", "--train.max_steps", "2")
    dit_ds(*run, tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(whole)
    dit_ds(*run, tmp_path / "two", "--train.max_steps", "2", ranks=2)
    dit_ds(*run, tmp_path / "two", "--deepspeed.config", ROOT / "configs/deepspeed/zero1.json")
    a, b = (Reader(r / END).whole("master") for r in (whole, tmp_path / "two"))
    assert max((a[n] - b[n]).abs().max().item() for n in a) <= (1e-5 if precision == "fp32" else 2e-3)
    said = refused(dit_ds(*run, tmp_path / "cut", "--train.optimizer", "adamw", "--train.max_steps", "5", check=None))
    assert "was saved with optimizer muon, this run has adamw" in said


@needs_bitsandbytes
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_8_bit_adam_goes_on_to_the_bit_and_at_another_stage(shards, tmp_path, stage):
    config = write_config(shards, tmp_path, "bf16", optimizer="adamw_8bit")
    path = ["--deepspeed.config", ROOT / f"configs/deepspeed/zero{stage}.json"]
    dit_ds("train", "--config", config, *path, ranks=2)
    run = ["train", "--config", config, "--resume", "--run_dir", tmp_path / "cut"]
    dit_ds(*run, *path, "--train.max_steps", "2", ranks=2)
    dit_ds(*run, *path, ranks=2)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    dit_ds(*run, "--train.max_steps", "5")


@pytest.mark.slow
def test_the_memory_plan_knows_the_states_that_each_optimizer_keeps():
    """AdamW: two moments in fp32; Muon: of its matrices one in the gradients' bf16; 8-bit: two bytes, a scale a block."""
    names = ["adamw", "muon", *(["adamw_8bit"] if find_spec("bitsandbytes") else [])]
    runs = {
        name: validate({
            "model": {"size": "vit_t"}, "text": {"name": MINILM, "layers": 1, "freeze": True}, "data": {"image_size": 64},
            "train": {"batch_size": 1, "optimizer": name},
            "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json")},
        })
        for name in names
    }  # fmt: skip
    model = build_model(runs["muon"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(model.get_parameter(n).numel() for n in muon_matrices(model, runs["muon"].train))
    want = {
        "adamw": 12 * trained,
        "muon": 4 * trained + 2 * matrices + 8 * (trained - matrices),
        "adamw_8bit": 6 * trained + 2 * 4 * trained // BLOCK,
    }
    assert 0.8 * trained < matrices < trained
    answers = predict([MemoryRequest(run, micro_batches=(1,)) for run in runs.values()])
    for name, answer in zip(names, answers, strict=True):
        assert answer.profiles[1].after["optimizer"] == pytest.approx(want[name], rel=0.01), name
