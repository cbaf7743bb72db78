"""Which nodes a training's next start takes, with a stand-in `srun` and `scontrol`; no cluster is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment, tiny_config

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
SITE = """LOG_DIR="{folder}/logs" PYTHON="{python}" CONTAINER=() SRUN_OPTIONS=() TASKS_PER_NODE=1 CPU_BIND= MAX_REQUEUES=20
RESTARTS=9 MASTER_ADDR=
"""
# nodes in the file `down` do not answer
STUBS = """
scontrol() {{
    case "$1 $2" in
    "show hostnames") tr , '\\n' <<<"$3" ;;
    "show job") echo JobState=RUNNING ;;
    esac
}}
timeout() {{ while [ "$1" != srun ]; do shift; done; srun "${{@:2}}"; }}
srun() {{
    local word
    for word; do
        case $word in
        --nodelist=*) ! grep -qx "${{word#*=}}" {folder}/down; return ;;
        slurm/node_counts.py) break ;;
        esac
    done
    while [ "$1" != "$PYTHON" ]; do shift; done
    "$@"
}}
rank_said() {{ printf '%s\\n' "$@" >"$rank_logs/srun.log"; }}
chosen() {{ echo "chosen $step_nodes ${{step_on[*]}} $MASTER_ADDR"; }}
"""


def chosen(folder: Path, then: str, nodes: str = "n1,n2,n3", **settings: str) -> subprocess.CompletedProcess:
    """What bash does `then` after it has read the scripts, as in a job on these nodes."""
    site = folder / "site.env"
    site.write_text(
        SITE.format(folder=folder, python=sys.executable) + "".join(f"{k}={v}\n" for k, v in settings.items())
    )
    (folder / "down").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": str(nodes.count(",") + 1),
           "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": nodes, "CLUSTER_ENV": str(site)}  # fmt: skip
    env = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "MASTER"))} | job
    script = f"{STUBS.format(folder=folder)}\nsource slurm/common.sh\nsource slurm/spares.sh\n{then}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    return [line.removeprefix("chosen ") for line in done.stdout.splitlines() if line.startswith("chosen ")]


def test_the_last_node_waits_and_takes_a_lost_ones_place(tmp_path):
    then = f"choose_nodes; chosen; echo n2 >{tmp_path}/down; starts_again 137 && chosen"
    done = chosen(tmp_path, then, SPARES="1")
    assert lines(done) == ["2 --exclude=n3 n1", "2 --exclude=n2 --overlap n1"], done.stderr
    assert (tmp_path / "logs/train-7/bad_nodes").read_text().startswith("n2 ")


def test_the_address_follows_the_first_node_in_use(tmp_path):
    done = chosen(tmp_path, f"choose_nodes; echo n1 >{tmp_path}/down; starts_again 1 && chosen", SPARES="1")
    assert lines(done) == ["2 --exclude=n1 --overlap n2"], done.stderr


def test_rank_0_is_on_the_first_node_in_slurms_order_where_an_excluded_one_is_taken_again(tmp_path):
    (tmp_path / "logs/train-7").mkdir(parents=True)
    (tmp_path / "logs/train-7/bad_nodes").write_text("n1 failed twice\n")
    done = chosen(tmp_path, f"echo n2 >{tmp_path}/down; find_lost_nodes; choose_nodes; chosen", SPARES="1")
    assert lines(done) == ["2 --exclude=n2 --overlap n1"], done.stderr


@pytest.mark.parametrize(
    ("status", "again"), [(137, True), (76, True), (1, False), (2, False), (75, False), (0, False)]
)
def test_what_starts_again_on_nodes_that_all_answer(tmp_path, status, again):
    done = chosen(tmp_path, f"choose_nodes; rank_said; starts_again {status} && chosen", SPARES="1")
    assert lines(done) == (["2 --exclude=n3 n1"] if again else []), done.stderr


def test_a_lost_node_without_a_spare_is_the_queues(tmp_path):
    done = chosen(tmp_path, f"choose_nodes; rank_said; echo n2 >{tmp_path}/down; starts_again 137 && chosen")
    assert lines(done) == [], done.stderr
    done = chosen(tmp_path, "choose_nodes; chosen")  # after the requeue the same node is better than none
    assert lines(done) == ["3  n1"], done.stderr


KILLED = '"5 srun: error: n2: task 1: Killed" "5 srun: error: n1: task 0: Exited with exit code 1"'
HUNG = '"5 srun: error: n2: task 1: Exited with exit code 76" "5 srun: error: n1: task 0: Terminated"'


LOST_AND_BACK = '"5 srun: error: Node failure on n2" "5 srun: error: n1: task 0: Killed"'


@pytest.mark.parametrize("said", [KILLED, HUNG, LOST_AND_BACK])
def test_a_node_that_fails_twice_in_a_short_time_is_left_out_also_after_a_requeue(tmp_path, said):
    fail = f"rank_said {said}; starts_again 137; chosen\n"
    done = chosen(tmp_path, f"choose_nodes\n{fail}{fail}", SPARES="1")
    assert lines(done) == ["2 --exclude=n3 n1", "2 --exclude=n2 n1"], done.stderr
    assert "failed twice in 30 minutes" in (tmp_path / "logs/train-7/bad_nodes").read_text()
    assert lines(chosen(tmp_path, "choose_nodes; chosen", SPARES="1")) == ["2 --exclude=n2 n1"]
    (tmp_path / "logs/train-7/bad_nodes").write_text("")  # as a user clears it
    assert lines(chosen(tmp_path, "choose_nodes; chosen", SPARES="1")) == ["2 --exclude=n3 n1"]


def test_ranks_that_are_killed_for_a_lost_node_do_not_count_against_their_own(tmp_path):
    done = chosen(
        tmp_path, f"choose_nodes; rank_said {KILLED}; echo n1 >{tmp_path}/down; starts_again 137 && chosen", SPARES="1"
    )
    assert lines(done) == ["2 --exclude=n1 --overlap n2"] and not (tmp_path / "logs/train-7/failures").exists()


def test_failures_long_apart_or_without_a_spare_exclude_none(tmp_path):
    fail = f"rank_said {KILLED}; starts_again 137; chosen\n"
    late = 'sed -i "s/^[0-9]*/1000/" "$failures"\n'
    assert lines(chosen(tmp_path, f"choose_nodes\n{fail}{late}{fail}", SPARES="1"))[-1] == "2 --exclude=n3 n1"
    assert lines(chosen(tmp_path, f"choose_nodes\n{fail}{fail}"))[-1] == "3  n1"
    assert not (tmp_path / "logs/train-7/bad_nodes").exists()


def config_of(folder: Path, batch: int) -> str:
    config = tiny_config(folder, folder / "run")
    config["train"]["batch_size"] = batch
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return f"--config {folder}/c.yaml"


def test_elastic_takes_the_largest_number_of_nodes_that_the_batch_divides_over(tmp_path):
    config = config_of(tmp_path, 8)
    then = (
        f"check_elastic {config}; choose_nodes; chosen; echo n2 >{tmp_path}/down; rank_said; starts_again 1 && chosen"
    )
    done = chosen(tmp_path, then, "n1,n2,n3,n4", ELASTIC="1")
    assert lines(done) == ["4  n1", "2 --exclude=n2,n4 --overlap n1"], done.stderr  # 8 do not divide over 3


def test_elastic_refuses_beforehand_what_does_not_divide(tmp_path):
    then = f"check_elastic {config_of(tmp_path, 3)} || exit; choose_nodes; chosen"
    done = chosen(tmp_path, then, "n1,n2,n3", ELASTIC="1", TASKS_PER_NODE="2")
    assert done.returncode == 2 and lines(done) == []
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "with fewer than 3 nodes train.batch_size 3 is not a multiple" in errors[0], done.stderr


@pytest.mark.parametrize(
    "wrong", [{"SPARES": "3"}, {"SPARES": "one"}, {"ELASTIC": "yes"}, {"FAILS_WITHIN_MINUTES": "-1"}]
)
def test_a_wrong_setting_is_one_line(tmp_path, wrong):
    done = chosen(tmp_path, "echo went on", **wrong)
    assert done.returncode == 2 and "went on" not in done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert next(iter(wrong)) in done.stderr
