"""`dit-ds experiments submit` and `sweep` on a real cluster of two nodes: from a line to a table."""

from __future__ import annotations

import json
import re
import sys

import pytest
import yaml
from slurm_cluster import NODES, Site

pytestmark = pytest.mark.slurm


def experiments(site: Site, *args: object) -> dict:
    """`dit-ds experiments ARGS --json`, from a shell that has not read the cluster's settings."""
    command = [sys.executable, "-m", "dit_ds.cli", "experiments", *map(str, args), "--json"]
    return json.loads(site.cluster.run(*command, env={"CLUSTER_ENV": str(site.settings)}))


def wait_for_all(site: Site, timeout: float = 200) -> None:
    def over() -> bool:
        return not site.cluster.run("squeue", "-h")

    site.cluster.wait_for(over, "empty queue", site.cluster.folder / "slurmctld.log", timeout)


def logs(site: Site, name: str) -> list[str]:
    return [f.read_text() for f in sorted(site.logs.glob(f"{name}-*.log"))]


def test_a_task_that_is_interrupted_comes_back_alone(cluster, shards, tmp_path):
    """Of an array, the last task to start has the array's own number, which means all of them to scontrol."""
    rank = tmp_path / "rank"  # as `python -m dit_ds.cli train --resume --config STATUS`
    rank.write_text(f'#!/bin/bash\necho "$@" >>"{tmp_path}/task $SLURM_ARRAY_TASK_ID"\nexit "$6"\n')
    rank.chmod(0o755)
    site = Site(cluster, tmp_path, shards, PYTHON=rank)
    tasks = [w for i, status in enumerate((0, 0, 75)) for w in (f"--task={i}", "--config", str(status))]
    job = cluster.submit(site.settings, "--nodes=1", "--array=0-2", "slurm/train.sbatch", *tasks, "--all", "$HOME")
    cluster.wait_for(lambda: cluster.run("squeue", "-h", "-r", "-o", "%K %r") == "2 BeginTime", "a task that waits to "
                     "begin again", site.cluster.folder / "slurmctld.log")  # fmt: skip
    cluster.run("scancel", job)
    started = {i: (tmp_path / f"task {i}").read_text().splitlines() for i in range(3)}
    assert all(len(lines) == 1 for lines in started.values()), started
    assert started[1] == ["-m dit_ds.cli train --resume --config 0"]
    assert started[2] == ["-m dit_ds.cli train --resume --config 75 --all $HOME"]  # all that follows is the last one's


def test_the_lines_of_a_dry_run_do_what_they_say(cluster, shards, tmp_path):
    """Pasted into a shell: each evaluation follows its training, the comparison all; ranks only note that they ran."""
    rank, ran = tmp_path / "rank", tmp_path / "ran"
    rank.write_text(
        f'#!/bin/bash\nsleep 0.3\necho "$3 $SLURM_ARRAY_TASK_ID" >>{ran}\n'
        '[[ "$3 $SLURM_ARRAY_TASK_ID" != "train 1" ]]'  # the second row fails
    )
    rank.chmod(0o755)
    site = Site(cluster, tmp_path, shards, PYTHON=rank)
    command = [sys.executable, "-m", "dit_ds.cli", "experiments", "submit", "--table", "9", "--dry-run"]
    lines = cluster.run(*command, "--runs", f"{tmp_path}/it's here", "--data-root", str(shards))
    cluster.run("bash", "-c", f'source "$CLUSTER_ENV"\n{lines}', env={"CLUSTER_ENV": str(site.settings)})
    wait_for_all(site)
    order = ran.read_text().splitlines()
    assert sorted(order) == ["compare ", "eval 0", "eval 0", "eval 0", "train 0", "train 1"], order
    assert order.index("train 0") < order.index("eval 0") and order[-1] == "compare "


@pytest.mark.slow  # a minute or two
def test_a_sweep_of_four_runs_over_two_nodes_ends_with_one_table(site, tmp_path):
    lines = tmp_path / "over rides.txt"
    lines.write_text(
        "# rates\n--train.lr 1e-3\n--train.lr 3e-3 --seed 1\n\n--train.lr 1e-2 --data.scales '[48, 64]'\n--train.lr 1e-4\n"
    )
    runs = tmp_path / "my runs"
    args = ("sweep", lines, "--config", site.config, "--runs", runs, "--train.max_steps", 3)
    job = site.submit("sweep", *map(str, args[1:]), nodes=1)
    site.completed(job, "sweep")
    assert "sweep-train, 4 to do" in site.read(job, "sweep")
    again = experiments(site, *args)  # all of it is queued or runs
    assert not again["jobs"] and len(again["queued"]) == 5
    wait_for_all(site)
    table = (runs / "sweep.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| >")]
    assert len(rows) == 4 and "left out" not in table, table
    heads = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert heads[1:5] == ["Run", "seed", "data.scales", "train.lr"] and {"val oIoU", "val mIoU"} <= set(heads)
    assert [row[heads.index("train.lr")].strip() for row in rows] == ["0.001", "0.003", "0.01", "0.0001"]
    assert all(float(re.sub("[*]|</?u>", "", row[heads.index("val mIoU")])) >= 0 for row in rows)
    used = {node for log in logs(site, "sweep-train") for node in NODES if f"first node {node}" in log}
    assert used == set(NODES), logs(site, "sweep-train")
    over = experiments(site, *args)
    assert not over["jobs"] and not over["queued"] and len(over["finished"]) == 5
    lines.write_text(lines.read_text().replace("1e-3", "2e-3"))
    changed = experiments(site, *args, "--dry-run")  # another run, and the others as they are
    assert [j["tasks"] for j in changed["jobs"]][0][0].startswith("train 02_lr_2e-3_")
    assert len(changed["jobs"][0]["tasks"]) == 1


@pytest.mark.slow  # a minute or two
def test_a_table_is_written_also_if_a_row_fails(site, tmp_path):
    """Table 9's rows as tiny runs, one of which can't train: its evaluations don't run, the comparison does."""
    base = yaml.safe_load(site.config.read_text())
    for name, own in {
        "table9_layer_wise": {},
        "table9_cascade": {"deepspeed": base["deepspeed"] | {"override": {"train_micro_batch_size_per_gpu": 3}}},
    }.items():
        model = {"scheme": name.removeprefix("table9_"), "size": "vit_t", "freeze_image_encoder": True}
        config = base | {"model": model, "run_dir": f"runs/{name}"} | own
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    args = ("submit", "--table", 9, "--configs", tmp_path, "--runs", tmp_path / "runs", "--train.max_steps", 2)
    first = experiments(site, *args)
    assert [len(j["tasks"]) for j in first["jobs"]] == [2, 2, 2, 2, 1]
    wait_for_all(site)
    table = (tmp_path / "runs/table9.md").read_text()
    assert "runs/table9\\_layer\\_wise" in table and "left out: " in table and "table9_cascade is no run" in table
    assert {f.name for f in (tmp_path / "runs/table9_layer_wise/evaluations").iterdir()} == {
        f"{split}-text-step_00000002.json" for split in ("val", "testA", "testB")
    }
    again = experiments(site, *args, "--dry-run")
    assert [j["tasks"] for j in again["jobs"]] == [
        ["train table9_cascade"],
        *([f"evaluate table9_cascade {split} text"] for split in ("val", "testA", "testB")),
        ["table table9.md"],
    ]
