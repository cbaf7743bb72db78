"""Settings that do not go together, and keys under their former names, are refused, with what to set."""

from __future__ import annotations

import json

import pytest
import yaml

from dit_ds.checkpointing.weights import load_model
from dit_ds.config.load import RENAMED_KEYS, field_names, load_config, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.zero_state import MASTER, MOMENTS
from dit_ds.errors import UserError
from dit_ds.paper.scored_runs import read_run


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": {"prompts": ["text", "text"]}}, "names one twice"),
        ({"data": {"prompts": []}}, "data.prompts"),
        ({"data": {"prompts": ["mask"]}}, "data.prompts"),
        ({"data": {"scales": [600]}}, "data.scales"),
        (
            {"data": {"train_mask_rule": "soft"}, "model": {"name": "lavt", "size": "swin_b"}},
            "data.train_mask_rule half or any",
        ),
        ({"data": {"prompts": ["box"]}, "model": {"name": "rela", "size": "swin_b"}}, "knows no data.prompts"),
        ({"eval": {"mask_rule": "any"}}, "eval.mask_rule"),
    ],
)
def test_settings_that_do_not_go_together(values, says):
    with pytest.raises(UserError, match=says):
        validate(values)


def with_former_key(former: str) -> dict:
    """A whole configuration, as a run saves it, with one key under its former name."""
    values = RunConfig().model_dump(mode="json")
    (section, old), (_, new) = former.split("."), RENAMED_KEYS[former].split(".")
    values[section][old] = values[section].pop(new)
    return values


@pytest.mark.parametrize("former", RENAMED_KEYS)
def test_a_former_key_is_refused_with_its_new_name(former, tmp_path):
    new = RENAMED_KEYS[former]
    assert new in field_names() and former not in field_names()
    line = f"'{former}' is now '{new}': rename it"
    path, empty = tmp_path / "run.yaml", tmp_path / "empty.yaml"
    path.write_text(yaml.safe_dump(with_former_key(former)))
    empty.write_text("")
    for based in (path, tmp_path / "based.yaml"):  # the file is named that holds the key
        (tmp_path / "based.yaml").write_text("base: run.yaml\n")
        with pytest.raises(UserError) as error:
            load_config(based, ["--train.epochs", "1"])
        assert str(error.value) == f"{path}: {line}"
    for override in ([f"--{former}", "1"], [f"--{former}=null"]):
        with pytest.raises(UserError) as error:
            load_config(empty, override)
        assert str(error.value) == line


def whole_meta(config: dict) -> dict:
    """A checkpoint's meta.json with this configuration."""
    progress = {"step": 4, "epoch": 0, "batch": 4, "seconds": 1.0, "best_score": 0.5, "best_step": 4, "metrics": {},
                "evaluated": 4, "bad_samples": []}  # fmt: skip
    engine = {"global_steps": 4, "global_samples": 8, "micro_steps": 4, "skipped_steps": 0, "loss_scale": {}}
    return {"config": config, "step": 4, "epoch": 0, "samples_seen": 8, "seed": 0, "manifest_sha": "0" * 64,
            "frozen": "0" * 64, "world_size": 1, "zero_stage": 2, "adam_step": 4.0, "shapes": {},
            "digest": {kind: "0" * 16 for kind in (MASTER, *MOMENTS)}, "progress": progress, "engine": engine}  # fmt: skip


def test_a_former_key_in_a_runs_folder_or_a_checkpoint_is_one_line(refusal, tmp_path):
    line, values = "'train.ema' is now 'train.ema_decay': rename it", with_former_key("train.ema")
    run = tmp_path / "run"
    checkpoint = run / "checkpoints/step_00000004"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "meta.json").write_text(json.dumps(whole_meta(values)))
    with pytest.raises(UserError, match=line):
        load_model(run)
    with pytest.raises(UserError, match=line):
        read_run(run)
    assert f"{run}/config.yaml: {line}" in refusal("train", "--config", run / "config.yaml", "--resume")
    assert f"{checkpoint}: {line}" in refusal("eval", run)
    assert f"{run}/config.yaml: {line}" in refusal("compare", run)


def test_sections_are_not_shared_between_configurations():
    one, two = RunConfig(), RunConfig()
    one.deepspeed.override["bf16"] = {"enabled": True}
    assert two.deepspeed.override == {} and RunConfig().deepspeed.override == {}
