"""The package's own configurations and scripts, from any folder; and what a path in a configuration is relative to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import MINILM, ROOT

from dit_ds.cli import demo
from dit_ds.cli.entry import main
from dit_ds.config import init_folder, installed_files
from dit_ds.config.load import INPUT_PATHS, field_names, load_config
from dit_ds.engine.deepspeed_json import read_deepspeed_json
from dit_ds.errors import UserError
from dit_ds.planning.tune import output
from dit_ds.planning.tune.candidates import Candidate

pytestmark = pytest.mark.fast


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory, of no clone."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


# --- names


@pytest.mark.parametrize("name", ["base", "sample", "table1_default", "configs/base.yaml", "configs/paper/table8.yaml"])
def test_the_packages_configurations_are_found_from_any_folder(name, elsewhere):
    config = load_config(name)
    assert read_deepspeed_json(config)["zero_optimization"]["stage"] == 2
    assert config.data.root in ("data_shards", "demo/shards")  # of the working directory


@pytest.mark.parametrize("name", installed_files.installed_names(".json"))
def test_deepspeeds_jsons_go_by_their_names(name, elsewhere):
    for given in (name, f"configs/deepspeed/{name}.json"):  # as former runs have it
        config = load_config("base", ["--deepspeed.config", given])
        assert config.deepspeed.config == given
        assert read_deepspeed_json(config)["train_micro_batch_size_per_gpu"] == 8


def test_the_packages_own_json_is_recorded_by_its_name(elsewhere, monkeypatch):
    """Not by where the package lies, which may be elsewhere when the run goes on."""
    assert [load_config(n).deepspeed.config for n in ("base", "sample", "table8", ROOT / "configs/base.yaml")] == [
        "zero2"
    ] * 4
    monkeypatch.chdir(ROOT)
    assert load_config("configs/paper/table8.yaml").deepspeed.config == "configs/deepspeed/zero2.json"


def test_a_file_comes_before_a_name(elsewhere):
    write(elsewhere / "base", {"seed": 7})
    write(elsewhere / "configs/base.yaml", {"seed": 8})
    assert [load_config(name).seed for name in ("base", "configs/base.yaml", "sample")] == [7, 8, 0]


def test_a_name_that_is_none_is_one_line(elsewhere):
    with pytest.raises(UserError, match="cannot read the configuration bsae: .*: did you mean 'base'"):
        load_config("bsae")
    with pytest.raises(UserError, match="no DeepSpeed configuration at zero9"):
        read_deepspeed_json(load_config("base", ["--deepspeed.config", "zero9"]))


def test_a_base_is_beside_its_file_or_a_name(elsewhere, tmp_path):
    write(tmp_path / "mine/base.yaml", {"seed": 3})
    own = write(tmp_path / "mine/own.yaml", {"base": "base.yaml"})
    packages = write(tmp_path / "mine/packages.yaml", {"base": "base", "seed": 4})
    assert load_config(own).seed == 3
    assert (load_config(packages).seed, load_config(packages).train.milestones) == (4, [30, 35])


def test_nothing_is_said_of_the_names_where_they_were_not_installed(elsewhere, tmp_path, monkeypatch):
    """As in an image that was given dit_ds/ alone."""
    monkeypatch.setattr(installed_files, "_PACKAGE", tmp_path / "package")
    assert load_config(write(elsewhere / "c.yaml", {"seed": 5})).seed == 5
    with pytest.raises(UserError, match="cannot read the configuration base: No such file"):
        load_config("base")
    with pytest.raises(UserError, match="installed without its configs/"):
        installed_files.paper_folder()


# --- paths


def test_the_input_paths_are_keys():
    assert set(INPUT_PATHS) <= set(field_names())


def test_what_lies_beside_a_file_is_meant_by_it(elsewhere, tmp_path):
    folder = tmp_path / "mine"
    values = {"data": {"root": "shards"}, "model": {"checkpoint": "../sam.pth"}, "text": {"name": "bert", "tokenizer": "words"},
              "deepspeed": {"config": "zero1.json"}, "run_dir": "bert"}  # fmt: skip
    path = write(folder / "configs/c.yaml", values)
    for name in ("shards", "bert", "words"):
        (path.parent / name).mkdir()
    for file in (folder / "sam.pth", path.parent / "zero1.json"):
        file.write_text("{}")
    config, at = load_config(path), str(path.parent)
    assert (config.data.root, config.model.checkpoint) == (f"{at}/shards", str(folder / "sam.pth"))
    assert (config.text.name, config.text.tokenizer) == (f"{at}/bert", f"{at}/words")
    assert config.deepspeed.config == f"{at}/zero1.json" and config.run_dir == "bert"
    # on the command line: of the working directory
    assert load_config(path, ["--data.root", "shards"]).data.root == "shards"
    os.chdir(folder)
    assert load_config("configs/c.yaml").data.root == "configs/shards"


def test_what_lies_nowhere_beside_it_is_of_the_working_directory(elsewhere, tmp_path):
    values = {
        "data": {"root": "data_shards"},
        "model": {"checkpoint": "sam.pth"},
        "text": {"name": "bert-base-uncased"},
    }
    config = load_config(write(tmp_path / "mine/c.yaml", values))
    assert (config.data.root, config.model.checkpoint) == ("data_shards", "sam.pth")
    assert config.text.name == "bert-base-uncased"


@pytest.mark.parametrize("root", ["https://host/shards", "pipe:cat x", "/abs"])
def test_urls_and_absolute_paths_stay(root, elsewhere, tmp_path):
    assert load_config(write(tmp_path / "c.yaml", {"data": {"root": root}})).data.root == root


def test_a_runs_own_configuration_reads_back_as_it_was(elsewhere):
    """Its folder may hold what its paths would mean beside it."""
    config = load_config("base", ["--data.root", ".", "--run_dir", "runs/x"])
    config.save("runs/x/config.yaml")
    assert load_config("runs/x/config.yaml") == config
    former = yaml.safe_dump(config.model_dump(mode="json") | {"deepspeed": {"config": "configs/deepspeed/zero2.json"}})
    Path("runs/x/former.yaml").write_text(former.replace("root: .", "root: data_shards"))
    read = load_config("runs/x/former.yaml")
    assert read.data.root == "data_shards" and read_deepspeed_json(read)["zero_optimization"]["stage"] == 2


def test_the_files_of_a_search_can_be_moved(elsewhere):
    """They name their JSON beside them, and the package's configuration by its name."""
    config = load_config("base", ["--train.lr", "0.5"])
    candidate = Candidate("zero3", 4, 2, "block", "auto", 25_000_000)
    output.write_run(Path("tune"), candidate, "base", config, read_deepspeed_json(config))
    Path("tune").rename("moved")
    taken = load_config("moved/overrides.yaml")
    assert taken.train.lr == 0.5 and taken.train.milestones == [30, 35]
    assert read_deepspeed_json(taken)["zero_optimization"]["stage"] == 3


# --- commands from a folder of no clone


def run(capsys, *args: object) -> dict:
    capsys.readouterr()
    status = main([*map(str, args), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_experiments_name_configurations_that_train_takes(elsewhere, capsys):
    rows = run(capsys, "experiments", "--table", 9)["experiments"]
    assert [r["config"] for r in rows] == ["table9_layer_wise", "table9_cascade"]
    assert [load_config(r["config"]).run_dir for r in rows] == [r["run"] for r in rows]


def test_init_writes_a_folder_to_work_in_and_overwrites_nothing(elsewhere, capsys, refusal, monkeypatch):
    answer = run(capsys, "init", "x")
    files = {str(f.relative_to("x")) for f in Path("x").rglob("*") if f.is_file()}
    assert answer["files"] == len(files) and {"README.md", "configs/base.yaml", "slurm/train.sbatch"} <= files
    assert "x/configs is there already" in refusal("init", "x")
    assert "give one of them" in refusal("init", "y", "--out", "z") and "is required" in refusal("init")
    Path("x/configs/deepspeed/zero2.json").write_text('{"train_micro_batch_size_per_gpu": 3}')
    assert read_deepspeed_json(load_config("x/configs/paper/table8.yaml"))["train_micro_batch_size_per_gpu"] == 3
    monkeypatch.setenv("SBATCH_OUTPUT", "%j.log")
    assert "no slurm/ here: " in refusal("experiments", "submit", "--table", "9", "--dry-run")
    monkeypatch.setenv("DIT_DS_SLURM", str(elsewhere / "x/slurm"))  # as its cluster.env leaves it
    lines = [j["line"] for j in run(capsys, "experiments", "submit", "--table", "9", "--dry-run")["jobs"]]
    assert all(f" {elsewhere}/x/slurm/" in line for line in lines)
    monkeypatch.chdir("x")
    lines = [j["line"] for j in run(capsys, "experiments", "submit", "--table", "9", "--dry-run")["jobs"]]
    assert all(" slurm/" in line for line in lines) and load_config("configs/base.yaml").data.root == "data_shards"


def test_the_readme_of_a_new_folder_names_what_is_there(elsewhere):
    init_folder.init_folder("x")
    text = Path("x/README.md").read_text()
    for name in (
        "configs/base.yaml",
        "configs/sample.yaml",
        "configs/paper/",
        "configs/deepspeed/",
        "slurm/cluster.env",
    ):
        assert f"`{name}`" in text and Path("x", name).exists()
    assert f"runs/{Path(load_config('x/configs/base.yaml').run_dir).name} " in text


def test_the_demo_trains_by_the_packages_configuration_and_keeps_former_runs(elsewhere, monkeypatch):
    ran: list[list[str]] = []

    def note(command: list[object]) -> str:
        ran.append([str(c) for c in command])
        return '{"miou": 0.5, "train_seconds": 1}\n'

    monkeypatch.setattr(demo, "_run", note)
    first = demo.demo(Path("demo"), "default")
    Path(first["run"]).mkdir(parents=True)
    second = demo.demo(Path("demo"), "default")
    assert (first["run"], second["run"]) == ("demo/default", "demo/default_2") and len(ran) == 12
    (train,) = [c for c in ran[:6] if "train" in c]
    words = train[train.index("--config") + 1 :]
    overrides = words[1 : words.index("--json")]
    assert load_config(words[0], overrides).text.name == MINILM and "demo/shards" in overrides


def test_a_step_of_the_demo_that_fails_ends_it(elsewhere, capfd):
    with pytest.raises(UserError, match="'dit-ds data verify nowhere' ended with status 2"):
        demo._run(["dit-ds", "data", "verify", "nowhere"])
    assert "$ dit-ds data verify nowhere\ndit-ds: error: " in capfd.readouterr().err
