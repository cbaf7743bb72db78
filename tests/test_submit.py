"""`dit-ds experiments submit` and `sweep` without a cluster: the lines, what is left out, what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dit_ds.cli.entry import main
from dit_ds.config.load import load_config
from dit_ds.paper.submit import SHARD_SETS

# what takes the place of SLURM: sbatch gives numbers from 100 on and notes its words, squeue lists what the test wrote
SBATCH = """#!/bin/bash
n=$((100 + $(cat "$FAKE"/sbatch.* 2>/dev/null | wc -l)))
printf '%s\\0' "$@" >"$FAKE/call.$n"
echo x >>"$FAKE/sbatch.count"
case " $* " in *" --parsable "*) echo "$n;here" ;; *) echo "Submitted batch job $n" ;; esac
"""
SQUEUE = """#!/bin/bash
case "$*" in *%F*) echo 99; echo 98 ;; *) cat "$FAKE/queue" 2>/dev/null ;; esac
"""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SBATCH_OUTPUT", "%j.log")  # as if slurm/cluster.env had been read


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """The folder of a SLURM that is none: `call.100` has the words of its first sbatch, `queue` the tasks in its queue."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    """Options with which everything that a run reads is there."""
    (tmp_path / "shards/refcoco/unc").mkdir(parents=True)
    (tmp_path / "shards/refcoco/unc/manifest.json").write_text("{}")
    (tmp_path / "sam.pth").touch()
    return ["--data-root", str(tmp_path / "shards"), "--model.checkpoint", str(tmp_path / "sam.pth")]


@pytest.fixture
def run(capsys) -> Callable[..., dict]:
    def run(*args: object) -> dict:
        capsys.readouterr()
        status = main(["experiments", *map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    return run


def calls(slurm: Path) -> list[list[str]]:
    return [f.read_text().split("\0")[:-1] for f in sorted(slurm.glob("call.*"))]


def finish(folder: Path, epoch: int = 40, evaluated: tuple[str, ...] = ()) -> None:
    """A run's folder as a training of so many epochs leaves it."""
    step = folder / "checkpoints/step_00000007"
    step.mkdir(parents=True, exist_ok=True)
    (step / "manifest.json").write_text("{}")
    (step / "meta.json").write_text(json.dumps({"progress": {"epoch": epoch, "step": 7}}))
    (folder / "evaluations").mkdir(exist_ok=True)
    for split in evaluated:
        (folder / "evaluations" / f"{split}-text-step_00000007.json").write_text("{}")


@pytest.mark.fast
def test_table_1_in_lines(capsys, caplog, tmp_path):
    """As a new user calls it: no SLURM, no shards, no weights; stdout has the lines alone."""
    runs = tmp_path / "runs"
    assert main(["experiments", "submit", "--table", "1", "--seeds", "3", "--dry-run", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    lines = [shlex.split(line) for line in out.splitlines()]
    assert all(words[0] == "sbatch" for words in lines) and not runs.exists()
    scripts = [next(w for w in words if w.endswith(".sbatch")) for words in lines]
    assert scripts == [f"slurm/{s}.sbatch" for s in ("shard", "train", "eval", "eval", "eval", "compare")]
    assert all((ROOT / s).exists() for s in scripts)
    assert [w for words in lines for w in words if w.startswith("--array")] == ["--array=0"] + 4 * ["--array=0-29"]
    train = lines[1]
    folders = [train[i + 1] for i, w in enumerate(train) if w == "--run_dir"]
    assert len(set(folders)) == 30 and folders[0].endswith("table1_default") and folders[2].endswith("default_seed2")
    assert train.count("--seed") == 20
    for words in lines[2:5]:  # each task evaluates the run that the training of its number trained
        assert [words[i + 1] for i, w in enumerate(words) if w.startswith("--task=")] == folders
    assert lines[5][lines[5].index("slurm/compare.sbatch") + 1 :][:30] == folders
    assert all(w in caplog.text for w in ("--refer-root", "--images", "model.checkpoint")) and len(caplog.records) == 3


def test_what_is_submitted_waits_for_what_it_needs(slurm, run, inputs, tmp_path):
    result = run(
        "submit", "--table", "2,6", "--runs", tmp_path / "runs", "--nodes", 2, *inputs, "--train.compile", "true"
    )
    options = [[w for w in words if re.match("--(dep|array|nodes|job-name)", w)] for words in calls(slurm)]
    after_training = "--dependency=aftercorr:100"
    assert (
        options
        == [
            ["--job-name=table2-6-train", "--nodes=2", "--array=0-5"],
            *(
                [f"--job-name=table2-6-eval-{split}", "--nodes=1", "--array=0-5", after_training]
                for split in ("val", "testA", "testB")
            ),
            *(  # SAM as it was released
                [f"--job-name=table2-6-eval-{split}-{prompt}-trained", "--nodes=1", "--array=0"]
                for prompt in ("point", "box")
                for split in ("val", "testA", "testB")
            ),
            *(  # the mix
                [f"--job-name=table2-6-eval-{split}-{prompt}", "--nodes=1", "--array=5", after_training]
                for prompt in ("point", "box")
                for split in ("val", "testA", "testB")
            ),
            ["--job-name=table2-compare", "--nodes=1", "--dependency=afterany:" + ":".join(map(str, range(100, 116)))],
            ["--job-name=table6-compare", "--nodes=1", "--dependency=afterany:" + ":".join(map(str, range(100, 116)))],
        ]
        or sorted(map(str, options)) == []
    )
    assert [j["number"] for j in result["jobs"]] == [str(n) for n in range(100, 100 + len(options))]
    assert "--train.compile" in calls(slurm)[0]
    sam = tmp_path / "runs/table6_sam/config.yaml"
    assert str(sam) in calls(slurm)[4] and load_config(sam).model.checkpoint == inputs[3]


def test_submitted_again_it_goes_on_where_it_was(slurm, run, inputs, tmp_path):
    runs = tmp_path / "runs"
    args = ("submit", "--table", 9, "--runs", runs, *inputs)
    run(*args)
    assert len(calls(slurm)) == 5
    (slurm / "queue").write_text("\n".join([f"{n}_{i}" for n in (100, 101, 102, 103) for i in (0, 1)] + ["104"]))
    assert run(*args)["jobs"] == []  # all of it waits
    both = run("submit", "--table", "1,9", "--runs", runs, *inputs, "--dry-run")
    assert len(both["jobs"][0]["tasks"]) == 9  # one of Table 1's rows is in Table 9 and waits already
    (slurm / "queue").write_text("\n".join(["100_1", "101_1", "102_1", "104"]))
    finish(runs / "table1_layer_wise_frozen", evaluated=("val",))
    again = run(*args, "--dry-run")  # the first is trained; of the second an evaluation was cancelled
    assert [j["tasks"] for j in again["jobs"]] == [
        ["evaluate table1_layer_wise_frozen testA text"],
        ["evaluate table1_layer_wise_frozen testB text"],
        ["evaluate table9_cascade testB text"],
        ["table table9.md"],
    ]
    lines = [j["line"] for j in again["jobs"]]
    assert "--dependency" not in lines[0] and "--array=1 --dependency=aftercorr:100 " in lines[2]
    (slurm / "queue").write_text("")
    finish(runs / "table9_cascade", epoch=12)
    assert run(*args, "--dry-run")["jobs"][0]["tasks"] == ["train table9_cascade"]  # half trained
    for name in ("table1_layer_wise_frozen", "table9_cascade"):
        finish(runs / name, evaluated=("val", "testA", "testB"))
    assert [j["tasks"] for j in run(*args, "--dry-run")["jobs"]] == [["table table9.md"]]
    (runs / "table9.md").touch()
    assert run(*args, "--dry-run")["jobs"] == []


ODD = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"),
    min_size=1,
    max_size=12,
).filter(lambda name: name.strip(".") and not name.startswith("-"))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=ODD)
@example(name="$(touch here); `id` 'x' \"y\" \\")
@example(name="two words * ? ! # ~ & | < > [0-9] {a,b} %j")
def test_a_pasted_line_says_what_was_meant(name, slurm, capsys, tmp_path):
    """The shell hands on the words that the submission itself would, whatever the folders are called."""
    for old in slurm.glob("call.*"):
        old.unlink()
    runs = tmp_path / "x" / name
    data = ["--data-root", str(tmp_path / name), "--refer-root", name, "--images", "it's"]
    capsys.readouterr()
    assert main(["experiments", "submit", "--table", "9", "--runs", str(runs), *data, "--dry-run"]) == 0
    lines = capsys.readouterr().out
    assert lines.count("\n") == 6
    subprocess.run(["bash"], input=lines, text=True, check=True, capture_output=True, timeout=60)
    pasted = sorted(slurm.glob("call.*"), key=lambda f: f.stat().st_mtime_ns)
    words = [f.read_text().split("\0")[:-1] for f in pasted]
    shard, train, *evals, compare = words
    assert shard[shard.index("--refer-root") :] == [
        "--refer-root",
        name,
        "--images",
        "it's",
        "--out",
        str(tmp_path / name),
    ]
    folders = [str(runs / "table1_layer_wise_frozen"), str(runs / "table9_cascade")]
    assert [train[i + 1] for i, w in enumerate(train) if w == "--run_dir"] == folders
    assert all(set(folders) <= set(e) and "--dependency=aftercorr:99" in e for e in evals)
    assert compare[-1] == str(runs / "table9.md")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--table", "1"], "no SLURM here (sbatch is not found)"),
        (["--table", "8"], "Table 8 is about memory, and trains nothing: sbatch --gpus-per-node=8 slurm/table8.sbatch"),
        (["--table", "10"], "the paper has no table 10"),
        (["--table", "1", "--run_dir", "x"], "name the folder of all with --runs"),
        (["--table", "1", "--train.lerning_rate", "1"], "unknown key"),
        (["--table", "7"], "no shards in SHARDS/refcoco+/unc, SHARDS/refcocog/umd, and no refer to make them from"),
        (["--table", "1", "--model.checkpoint", "nowhere.pth"], "model.checkpoint nowhere.pth is not there"),
        (["--table", "1", "--runs=-x"], "--runs -x reads as an option"),
        (["--table", "1", "--runs", "a\nb"], "has a line break in it"),
    ],
)
def test_refusals(arguments, says, refusal, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    given_checkpoint = "--model.checkpoint" in arguments
    runs = [] if any(a.startswith("--runs") for a in arguments) else ["--runs", tmp_path / "runs"]
    shared = inputs[:2] if given_checkpoint else inputs
    line = refusal("experiments", "submit", *arguments, *runs, *shared)
    assert says.replace("SHARDS", str(tmp_path / "shards")) in line
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_refuses_is_one_line(slurm, refusal, inputs, tmp_path):
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    line = refusal("experiments", "submit", "--table", "9", "--runs", tmp_path / "runs", *inputs)
    assert "SLURM refuses: sbatch: error: invalid partition specified: gpu: see slurm/cluster.env" in line


def test_another_run_in_the_folder_is_not_taken_for_this_one(slurm, run, refusal, inputs, tmp_path):
    args = ("submit", "--table", 9, "--runs", tmp_path / "runs", *inputs)
    load_config("configs/paper/table9_cascade.yaml", ["--train.lr", "3e-4"]).save(
        tmp_path / "runs/table9_cascade/config.yaml"
    )
    line = refusal("experiments", *args)
    assert "table9_cascade is a run with another train.lr: choose another --runs" in line and not calls(slurm)
    run(*args, "--train.lr", "3e-4")


@pytest.mark.parametrize("text", ["{", "[1]", '{"progress": 3}', '{"train table9_cascade": "100; rm"}'])
def test_damaged_files_are_named(text, slurm, refusal, inputs, tmp_path):
    runs = tmp_path / "runs"
    finish(runs / "table9_cascade")
    wrong = runs / "table9_cascade/checkpoints/step_00000007/meta.json", runs / "submitted.json"
    for path in wrong:
        before = path.read_text() if path.exists() else "{}"
        path.write_text(text)
        line = refusal("experiments", "submit", "--table", "9", "--runs", runs, *inputs)
        assert str(path) in line and not calls(slurm)
        path.write_text(before)


def test_the_sets_are_those_of_the_script():
    script = (ROOT / "slurm/shard.sbatch").read_text()
    sets = re.findall(r'"(\S+) (\S+)"', re.search(r"sets=\((.*)\)", script)[1])
    assert tuple(f"{dataset}/{split_by}" for dataset, split_by in sets) == SHARD_SETS


# --- sweeps -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(run, inputs, tmp_path) -> Callable[..., dict]:
    """`experiments sweep` of a text, as a dry run."""

    def sweep(text: str, *args: str) -> dict:
        (tmp_path / "overrides.txt").write_text(text)
        data = ["--data.root", inputs[1], *inputs[2:]]
        return run("sweep", tmp_path / "overrides.txt", "--config", "configs/base.yaml", "--runs", tmp_path / "runs",
                   *data, "--dry-run", *args)  # fmt: skip

    return sweep


def folders(result: dict) -> list[str]:
    return [task.removeprefix("train ") for task in result["jobs"][0]["tasks"]]


def test_a_line_is_a_run_and_nothing_in_it_is_carried_out(sweep):
    result = sweep("\n# lr\n--train.lr 1e-4\r\n\n--data.flip 0 --text.name '$(touch here); `id` ~ *'\n")
    first, second = folders(result)
    assert first.startswith("03_lr_1e-4_") and second.startswith("05_flip_0_name_touch_here_id_")
    words = shlex.split(result["jobs"][0]["line"])
    assert words[words.index("--text.name") + 1] == "$(touch here); `id` ~ *" and "--array=0-1" in words
    assert [j["name"] for j in result["jobs"]] == ["sweep-train", "sweep-compare"]
    with_splits = sweep("--train.lr 1e-4", "--splits", "val,testA")
    assert [j["name"] for j in with_splits["jobs"]] == [
        "sweep-train",
        "sweep-eval-val",
        "sweep-eval-testA",
        "sweep-compare",
    ]


def test_a_changed_line_is_another_run(sweep):
    one = folders(sweep("--train.lr 1e-4 --data.scales '[48, 64]'\n--train.lr 2e-4"))
    two = folders(sweep("--train.lr 1e-4 --data.scales '[48,  64, 80]'\n--train.lr 2e-4"))
    assert one[0] != two[0] and one[1] == two[1]
    shared = folders(sweep("--train.lr 1e-4 --data.scales '[48, 64]'\n--train.lr 2e-4", "--seed", "5"))
    assert not set(one) & set(shared)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--train.lr 1e-4\n--train.lr 0.0001", "line 2 is the run of line 1: remove one"),
        ("--train.lr 1e-4\n--train.lerning_rate 1", "line 2: unknown key"),
        ("--train.lr '1e-4", "line 1: no closing quotation: quote it as in a shell"),
        ("1e-4", "line 1: '1e-4' has no key before it"),
        ("--run_dir x", "line 1: --run_dir is each run's own"),
        ("--config x", "line 1: unknown key 'config'"),
        ("# nothing\n", "has no overrides: write a line a run"),
        (None, "cannot read the overrides"),
    ],
)
def test_a_wrong_line_is_named(text, says, refusal, tmp_path):
    if text is not None:
        (tmp_path / "o.txt").write_text(text)
    assert says in refusal("experiments", "sweep", tmp_path / "o.txt", "--config", "configs/base.yaml", "--dry-run")
