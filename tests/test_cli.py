"""The command line as people meet it: quick help, one-line answers, clean stdout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT, dit_ds, environment, refused

from dit_ds.cli import entry
from dit_ds.config.load import fields, help_text, load_config
from dit_ds.config.suggestions import _COMMANDS, _OPTIONS
from dit_ds.errors import UserError


def test_help_imports_no_torch():
    code = "import sys; from dit_ds.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout.endswith("False\n") and "train" in done.stdout


def test_training_imports_what_it_uses_only_where_it_does():
    """Each of these costs every rank's start; timed in benchmarks/import_time.py."""
    heavy = {
        "deepspeed", "matplotlib", "pyarrow", "pycocotools", "segment_anything", "tensorboard", "torch._dynamo",
        "torch.utils.tensorboard", "torchvision", "transformers", "webdataset", "xformers",
    }  # fmt: skip
    code = "import sys; import dit_ds.training.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert "segment_anything.modeling" in (imported := set(done.stdout.split()))
    assert not heavy & imported


def test_a_reader_that_goes_away_is_no_error():
    for command in ("train --help", "data shard --help"):
        line = f"{sys.executable} -m dit_ds.cli {command} | head -n 1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), timeout=60)
        assert done.stdout.startswith("usage") and "Traceback" not in done.stderr


def test_help_of_train_explains_every_key():
    text = dit_ds("train", "--help").stdout
    for name, default, _, meaning in fields():
        assert meaning, name
        assert f"--{name}  [" in text and meaning in text and f"default {default}]" in text


@pytest.mark.parametrize(
    "command", [[], ["data"], ["train"], ["frobnicate"], ["eval", "x", "--frob", "1"], ["data", "shard"]]
)
def test_a_wrong_command_is_status_2(command):
    done = dit_ds(*command, check=None)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("data shard --images x --refer_root y", "did you mean --refer-root?"),
        ("data shard --refer-root y --images x --output z", "did you mean --out?"),
        ("data shard --refer-root y --images x --num_workers=3", "did you mean --processes?"),
        ("predict x --out y --prompt z", "did you mean --text?"),
        ("status x --xyz", "see 'dit-ds status --help'"),
        ("evaluate x", "invalid choice: 'evaluate': did you mean 'dit-ds eval'?"),
        ("data validate x", "did you mean 'dit-ds data verify'?"),
        ("frobnicate", "see 'dit-ds --help'"),
        ("tune --config base --output x", "unknown argument --output: did you mean --out?"),
        ("memory plan --config base --num_gpus 8", "did you mean --gpus?"),
        ("memory plan --config base --wd 0.1", "did you mean 'train.weight_decay'?"),
        ("train --config base --lr 1", "did you mean 'train.lr'?"),
        ("train --config base --out x", "did you mean 'run_dir'?"),
    ],
)
def test_what_does_not_exist_is_answered_by_meaning(words, says, refusal):
    assert says in refusal(*words.split())


def test_options_and_commands_elsewhere_lead_to_ones_that_exist():
    commands, options = set(), set()
    parsers = [entry.make_parser()]
    for parser in parsers:
        for action in parser._actions:
            options |= {o.lstrip("-").replace("-", "_") for o in action.option_strings}
            if isinstance(action, argparse._SubParsersAction):
                commands |= action.choices.keys()
                parsers += action.choices.values()
    assert set(_OPTIONS) <= options and set(_COMMANDS) <= commands


def test_help_of_train_goes_by_section():
    lines = help_text().splitlines()
    heads = [line.partition(":")[0] for line in lines if line and line[0] != " "][1:]
    assert heads[:3] == ["the run", "data", "model"] and len(set(heads)) == len(heads)
    assert {"train.lr_scale", "model.lora", "log"} <= set(heads)
    of, head = {}, ""
    for line in lines:
        if line.startswith("  --"):
            of[line.split()[0][2:]] = head
        elif line and line[0] != " ":
            head = line.partition(":")[0]
    assert (
        of["seed"] == "the run" and of["train.lr"] == "train" and of["train.lr_scale.projections"] == "train.lr_scale"
    )


def test_shipped_configurations_load():
    for path in ROOT.glob("configs/*.yaml"):
        load_config(path)
    assert load_config(ROOT / "configs/base.yaml").train.milestones == [30, 35]


def test_overrides_and_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {lr: 0.5, epochs: 3}\ndata: {workers: 1}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {epochs: 7}\n")
    config = load_config(
        tmp_path / "b.yaml", ["--data.workers=2", "--deepspeed.override.bf16.enabled", "false", "--text.layers", "null"]
    )
    assert (config.train.lr, config.train.epochs, config.data.workers) == (0.5, 7, 2)
    assert config.deepspeed.override == {"bf16": {"enabled": False}} and config.text.layers is None
    config.save(tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("trian: {lr: 1}", [], "did you mean 'train'"),
        ("train: {epoch: 1}", [], "did you mean 'train.epochs'"),
        ("train: {lr: -1}", [], "train.lr = -1"),
        ("train: [1]", [], "train = "),
        ("data: {dataset: refcoco/unc}", [], "dataset and split_by are two keys"),
        ("data: {image_size: 100}", [], "data.image_size = 100: input should be a multiple of 16"),
        ("- 1", [], "must hold keys and values"),
        ("a: [", [], "not valid YAML"),
        ("base: c.yaml", [], "based on itself"),
        ("base: nowhere.yaml", [], "nowhere.yaml"),
        ("", ["--train.lr"], "has no value"),
        ("", ["lr", "1"], "has no key before it"),
        ("", ["--seed.x", "1"], "seed"),
    ],
)
def test_configuration_errors_are_one_line(tmp_path, text, arguments, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path, arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(command, option) of every option that holds one value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from leaves(inner, (*words, name))
        elif action.option_strings and isinstance(action, entry._StoreOnce):
            yield words, action


@pytest.mark.parametrize(("command", "option"), [pytest.param(c, o, id=f"{' '.join(c)} {o.dest}") for c, o in leaves(entry.make_parser())])  # fmt: skip
def test_an_option_given_twice_is_refused(command, option, refusal):
    """Of every command. The second would silently replace the first."""
    tried = option.choices or ["1", "64", "0.5", "1,2", "1,2,3,4", "train=1", "80GiB", "x.png"]
    name = option.option_strings[-1]
    said = [refusal(*command, name, value, f"{name}={value}") for value in tried]
    assert any(f"{name} is given twice: give it once" in line for line in said), said


def test_json_is_all_there_is_on_stdout(tmp_path):
    import json

    done = dit_ds("data", "sample", tmp_path, "--images", "20", "--json", real=True)
    assert json.loads(done.stdout)["images"] == 20
    assert "--images 5" in refused(dit_ds("data", "sample", tmp_path, "--images", "5", check=None))
