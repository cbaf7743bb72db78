"""DeepSpeed computes what plain PyTorch computes, at every ZeRO stage and offloaded, on any number of ranks."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, dit_ds, on_ranks, refused

from dit_ds.config.load import validate
from dit_ds.engine.deepspeed_json import deepspeed_config
from dit_ds.errors import UserError
from dit_ds.models.instruction import SCHEMES

STAGES = [0, 1, 2, 3, "2_offload", "3_offload"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.fast), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_is_plain_adamw_on_one_process(ranks):
    """fp32, weight decay, a moving average, three steps of the same global batch: losses and every trained weight."""
    settings = {"dropout": False, "plain": True, "weight_decay": 0.1, "ema_decay": 0.5}
    stages = [{"stage": s} for s in STAGES]
    if ranks == 4:  # two nodes of two; the offloaded ones are above
        stages = [*stages[:4], {"stage": "3_hpz", "zero": {"zero_hpz_partition_size": 2}}]
    for stage, got in zip(stages, on_ranks(ranks, *(s | settings for s in stages))):
        assert got["loss_error"] <= 1e-5, stage
        assert got["weight_error"] <= 1e-4, stage  # a tenth of one step at lr 1e-3
        assert got["ema_error"] <= 1e-4 < 1e-3 < got["ema_matters"], stage
        assert got["back"], stage


@pytest.mark.slow
def test_norms_are_spared_weight_decay():
    """Two groups of parameters, one of which decays so fast that it would show in the other's weights."""
    settings = {"dropout": False, "plain": True, "weight_decay": 20.0, "weight_decay_norms": False, "ema_decay": 0.5}
    stages = (2, "3_offload")
    for stage, got in zip(stages, on_ranks(2, *({"stage": s} | settings for s in stages))):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4 and got["back"], stage


@pytest.mark.slow
def test_zero_3_with_everything_frozen_that_can_be():
    """Both encoders frozen, each layer recomputed, a moving average."""
    settings = {"freeze_image": True, "policy": "block", "dropout": False, "plain": True, "ema_decay": 0.5}
    for stage, got in zip((3, "3_offload"), on_ranks(2, *({"stage": s} | settings for s in (3, "3_offload")))):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4 and got["back"], stage
        assert got["ema_error"] <= 1e-4 < 5e-4 < got["ema_matters"], stage


@pytest.mark.slow
def test_every_scheme_trains_at_zero_3():
    """With static tokens, which are one parameter that each layer takes a part of."""
    schemes = [s for s in SCHEMES if s not in ("default", "layer_wise")]
    # with Adam's own eps the biases of keys, whose gradients are zero but for rounding, would take steps of any size
    settings = {"stage": 3, "policy": "every_2", "dropout": False, "plain": True, "freeze_image": True, "eps": 1e-6}
    runs = [settings | {"model": {"scheme": s, "adapters": "frozen", "static_tokens": 3}} for s in schemes]
    for scheme, got in zip(schemes, on_ranks(2, *runs), strict=True):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4, scheme


def test_a_step_with_one_ranks_nan_is_left_out_on_all_ranks():
    """Weights, Adam's count and moving average are as if the step had not been."""
    settings = {"dropout": False, "plain": True, "ema_decay": 0.5, "nan_at": 1}
    stages = (0, 1, 2, 3, "3_offload")
    for stage, got in zip(stages, on_ranks(2, *({"stage": s} | settings for s in stages))):
        assert got["left_out"] == [1] and got["counted"] == 1 and got["adam_step"] == 2, stage
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4 and got["ema_error"] <= 1e-4, stage


@pytest.mark.fast
def test_types_are_said_and_go_by_one_switch():
    def said(**deepspeed):
        ds = deepspeed_config(validate({"deepspeed": deepspeed}), 8)
        return ds.get("bf16", {}).get("enabled", False), ds["communication_data_type"], ds["data_types"]

    for path in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        config = {"config": str(path)}
        assert said(**config) == (True, "bf16", {"grad_accum_dtype": "bf16"})
        assert said(**config, precision="fp32") == (False, "fp32", {"grad_accum_dtype": "fp32"})
        assert said(**config, precision="fp16") == (False, "fp16", {"grad_accum_dtype": "fp16"})
        given = {"communication_data_type": "fp32"}
        assert said(**config, override=given) == (True, "fp32", {"grad_accum_dtype": "bf16"})


@pytest.mark.fast
def test_the_same_run_goes_on_more_ranks():
    """Base's 64 in micro-batches of 8: accumulated on few ranks, smaller on many, refused where it can't be shared."""

    def shares(ranks):
        ds = deepspeed_config(validate({}), ranks)
        return ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]

    assert [shares(n) for n in (1, 2, 8, 16, 64)] == [(8, 8), (8, 4), (8, 1), (4, 1), (1, 1)]
    with pytest.raises(UserError, match="set train.batch_size 128, or use 1, 2, 4, 8, 16, 32, 64 ranks"):
        deepspeed_config(validate({}), 128)


@pytest.mark.slow
def test_gradients_are_added_up_in_fp32_where_that_is_asked_for(config_file, tmp_path):
    """bf16 with four micro-batches a step; stage 1 is another optimizer of DeepSpeed's then, and goes on at stage 2."""
    arguments = ["train", "--config", config_file, "--deepspeed.precision", "bf16", "--train.max_steps",
                 "--deepspeed.override.data_types.grad_accum_dtype", "fp32"]  # fmt: skip
    micro = ["--deepspeed.override.train_micro_batch_size_per_gpu", "2", "--resume", "--deepspeed.config"]

    def run(steps, stage, **kwargs):
        at = arguments.index("--train.max_steps") + 1
        return dit_ds(
            *arguments[:at], steps, *arguments[at:], *micro, ROOT / f"configs/deepspeed/zero{stage}.json", **kwargs
        )

    run("2", 1)
    assert "at step 2" in run("3", 2).stderr
    assert "at ZeRO stages 1 to 3 only" in refused(run("4", 0, check=None))


@pytest.mark.fast
def test_what_the_run_owns_is_refused_in_the_json(refusal, tmp_path):
    for key in ("train_batch_size", "gradient_accumulation_steps", "optimizer", "scheduler", "gradient_clipping"):
        (tmp_path / "ds.json").write_text(json.dumps({key: 1}))
        said = refusal("train", "--config", ROOT / "configs/base.yaml", "--deepspeed.config", tmp_path / "ds.json")
        assert f"sets '{key}', which the run owns" in said
