"""Learning rates by part and by layer: what each parameter gets, under every ZeRO stage, in the log and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import MINILM, ROOT, dit_ds, metrics_of, on_ranks, refused, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_worker import rate_by_hand

from dit_ds.checkpointing.reader import Reader
from dit_ds.config.load import validate
from dit_ds.engine.optimizers import parameter_groups
from dit_ds.engine.rates import PARTS, part_of, part_rates, rate_factors
from dit_ds.errors import UserError
from dit_ds.models.build import build_model

RATES = {"lr_scale": {"image_encoder": 0.3, "projections": 2}, "layer_decay": 0.7}
METHODS = {"dit_sam": "vit_t", "lavt": "swin_t_tiny", "rela": "swin_t_tiny"}
scales = st.floats(1e-3, 10)


def tiny(name: str = "dit_sam", train: dict | None = None, **model):
    config = validate({
        "model": {"name": name, "size": METHODS[name]} | model,
        "data": {"image_size": 64, "resize": "pad" if name == "dit_sam" else "stretch"},
        "text": {"name": MINILM, "layers": 1},
        "train": train or {},
    })  # fmt: skip
    return config, build_model(config)


@pytest.fixture(scope="module")
def model():
    return tiny(static_tokens=2)[1]


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries({part: scales for part in PARTS}), st.floats(0.3, 1), st.booleans())
def test_each_parameter_has_the_rate_of_its_part_and_layer(model, scale, decay, norms):
    """In groups that hold each trained parameter once, as many as there are rates, each with decay and without."""
    t = validate({"train": {"lr_scale": scale, "layer_decay": decay, "weight_decay": 0.1, "weight_decay_norms": norms}})
    groups = parameter_groups(model, t.train)
    names = {id(p): n for n, p in model.named_parameters()}
    got = {names[id(p)]: g for g in groups for p in g["params"]}
    assert len(got) == sum(len(g["params"]) for g in groups)
    assert got.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in got.items():
        assert group["lr_scale"] == pytest.approx(rate_by_hand(name, t.train), rel=1e-12)
        assert group["lr"] == t.train.lr * group["lr_scale"]
        assert norms <= (group["weight_decay"] == 0.1)
    rates = [(g["lr_scale"], g["weight_decay"]) for g in groups]
    assert rates == sorted(set(rates), reverse=True)


def test_where_nothing_is_set_the_groups_are_as_ever(model):
    t = validate({}).train
    assert [g["lr_scale"] for g in parameter_groups(model, t)] == [1.0]
    assert set(rate_factors(model, t).values()) == {1.0}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_method_has_a_part(name):
    config, model = tiny(name, {"lr_scale": {"image_encoder": 0.1, "projections": 3}})
    assert {part_of(n) for n, _ in model.named_parameters()} == set(PARTS)
    rates = part_rates(rate_factors(model, config.train))
    assert rates == {"image_encoder": 0.1, "text_encoder": 1, "mask_decoder": 1, "projections": 3}


def test_a_part_that_does_not_train_or_exist_is_named():
    def said(train, **model):
        config, built = tiny(train=train, **model)
        with pytest.raises(UserError) as e:
            rate_factors(built, config.train)
        return str(e.value)

    frozen = {"freeze_image_encoder": True}
    assert "train.lr_scale.image_encoder is 0.1, and nothing trains" in said(
        {"lr_scale": {"image_encoder": 0.1}}, **frozen
    )
    assert "the ViT does not train" in said({"layer_decay": 0.9}, **frozen)
    for part, text in (("image_encoder", "model.freeze_image_encoder"), ("text_encoder", "text.freeze")):
        with pytest.raises(UserError, match=f"lr_scale.{part} is 0, .*set {text} true"):
            tiny(train={"lr_scale": {part: 0}})
    with pytest.raises(UserError, match=r"lavt knows no train\.layer_decay"):
        tiny("lavt", {"layer_decay": 0.9})


@pytest.mark.slow
def test_every_stage_is_plain_adamw_with_a_rate_for_each_parameter():
    """Two ranks, twelve groups or so, with decay and without."""
    told = {"dropout": False, "plain": True, "weight_decay": 0.1, "weight_decay_norms": False, "ema_decay": 0.5}
    stages = (0, 1, 2, 3, "2_offload", "3_offload")
    for stage, got in zip(stages, on_ranks(2, *({"stage": s} | told | RATES for s in stages)), strict=True):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4 and got["ema_error"] <= 1e-4, stage


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory) -> Path:
    """Four steps, two groups of each rate."""
    values = tiny_config(shards, tmp_path_factory.mktemp("rates") / "whole")
    # biases of keys have gradients of rounding errors alone, of which Adam's own eps would make whole steps
    values["train"] |= RATES | {"max_steps": 4, "weight_decay": 0.1, "weight_decay_norms": False, "eps": 1e-6}
    values["checkpoint"], values["eval"] = {"every_steps": 2}, {"every_epochs": 0}
    path = Path(values["run_dir"]).parent / "rates.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_says_its_rates_and_goes_on_with_them_at_another_stage(config, tmp_path):
    dit_ds("train", "--config", config)
    whole = config.parent / "whole"
    log = (whole / "log.txt").read_text()
    assert "learning rate" in log
    assert [x for x in log.splitlines() if x.endswith(f"{0.3 * 0.7**5 * 1e-3:.3g} to 0.0003")]
    for line in metrics_of(whole):
        assert line["lr/image_encoder"] == line["lr"] * 0.3 and line["lr/projections"] == line["lr"] * 2
        assert line["lr/image_encoder_lowest"] == pytest.approx(line["lr"] * 0.3 * 0.7**5)
    run = ["train", "--config", config, "--run_dir", tmp_path / "cut", "--resume"]
    dit_ds(*run, "--train.max_steps", "2")
    dit_ds(*run, "--deepspeed.config", ROOT / "configs/deepspeed/zero3.json", ranks=2)
    a, b = (Reader(r / "checkpoints/step_00000004").whole("master") for r in (whole, tmp_path / "cut"))
    assert max((a[n] - b[n]).abs().max().item() for n in a) <= 1e-5
    done = dit_ds(*run, "--train.max_steps", "5", "--train.layer_decay", "1")
    assert "train.layer_decay is 1.0 from here on, 0.7 until now" in done.stderr
    meta = json.loads((tmp_path / "cut/checkpoints/step_00000005/meta.json").read_text())
    assert meta["config"]["train"]["layer_decay"] == 1


def test_a_refused_rate_leaves_no_run(config, tmp_path):
    run = ["train", "--config", config, "--run_dir", tmp_path / "run", "--train.lr_scale.text_encoder", "0.5"]
    assert "train.lr_scale.text_encoder is 0.5" in refused(dit_ds(*run, check=None))
    assert not (tmp_path / "run").exists()
