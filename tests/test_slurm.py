"""The job scripts on a real cluster of two nodes: they train, evaluate and shard, and interrupted jobs come back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml
from conftest import metrics_of
from slurm_cluster import NODES, STEPS, Cluster, Site

from dit_ds.training.status import status

pytestmark = pytest.mark.slurm


def own_address() -> str:
    """The address that others reach this machine by; empty where it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        address = s.getsockname()[0]
    return "" if address.startswith("127.") else address


def digits(run_dir: Path) -> tuple[list, list]:
    """What a run computed: loss, gradient norm and learning rate of each step, and the last evaluation."""
    train = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in metrics_of(run_dir)]
    return train, metrics_of(run_dir, "eval")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, str]:
    """A two-node training that nothing happened to, with all that may come before it, and its job."""
    settings = {"STAGE_DIR": str(tmp_path_factory.mktemp("scratch"))}
    if address := own_address():
        settings |= {"DOCTOR": "1", "MASTER_ADDR": address}
    site = Site(cluster, tmp_path_factory.mktemp("undisturbed"), shards, **settings)
    job = site.train()
    assert site.completed(job)["Restarts"] == "0"
    return site, job


def test_a_training_on_two_nodes_finishes(undisturbed):
    site, job = undisturbed
    train, evaluation = digits(site.run_dir)
    assert [line[0] for line in train] == list(range(1, STEPS + 1)) and evaluation[-1]["n"] == 48
    assert json.loads((site.run_dir / "environment.json").read_text())["world_size"] == 2
    log = site.read(job)
    assert "ended with status 0" in log
    assert "ok    configuration" in log or not own_address()  # the doctor was there
    assert f"step {STEPS}: mIoU" in site.rank_log(job, 0) and f"step {STEPS}: mIoU" in log  # rank 0's lines in both
    assert (site.logs / f"train-{job}/train.rank1.log").exists()


def test_shards_are_staged_once_on_each_node(undisturbed, shards):
    """Both nodes are this machine here, so that one copies all there is and the other may find it there."""
    site, job = undisturbed
    scratch = Path(yaml.safe_load((site.run_dir / "config.yaml").read_text())["data"]["root"])
    names = sorted(f.name for f in (shards / "refcoco/unc").iterdir())
    assert scratch != shards and sorted(f.name for f in (scratch / "refcoco/unc").iterdir()) == names
    for name in names:
        assert (scratch / "refcoco/unc" / name).read_bytes() == (shards / "refcoco/unc" / name).read_bytes()
    assert site.read(job).count(f"copied to {scratch}") == len(NODES)


@pytest.mark.slow
def test_a_signalled_training_saves_comes_back_and_computes_the_same(undisturbed, site):
    """USR2, as before the time limit, then TERM, as for a preemption. Nothing but a signal makes it save."""
    job = site.train()
    for name, step in ("USR2", 8), ("TERM", 24):
        site.reach(job, step)
        site.cluster.run("scancel", f"--signal={name}", job)
        site.cluster.wait_for(lambda: site.cluster.restart(job), f"requeued job after {name}", site.log(job))
    assert site.completed(job)["Restarts"] == "2"
    assert f"first node {NODES[0]}" in site.read(job)
    # 75, if no rank was cut off by gloo while another had left already
    assert re.search(r"ended with status \d+: requeued \(2 of 20\)", site.read(job))
    resumed = re.findall(r"resumed from .* at step (\d+)", site.rank_log(job, 0))
    assert len(resumed) == 2 and int(resumed[0]) >= 8 and int(resumed[1]) >= 24
    assert digits(site.run_dir) == digits(undisturbed[0].run_dir)


@pytest.mark.slow
def test_a_training_survives_the_loss_of_a_node(undisturbed, site):
    job = site.train("--checkpoint.every_steps", "5")
    site.reach(job, 12)
    site.cluster.kill_node(NODES[1])
    site.cluster.wait_for(lambda: site.cluster.job(job)["JobState"] != "RUNNING", "end of the job", site.log(job))
    site.cluster.start_node(NODES[1])
    assert site.completed(job)["Restarts"] == "1"
    assert "resumed from" in site.rank_log(job, 0)
    assert digits(site.run_dir) == digits(undisturbed[0].run_dir)


def test_what_the_doctor_finds_ends_the_job_before_it_trains(cluster, shards, tmp_path):
    """It is right: other nodes would not find the first one by a name that means themselves."""
    site = Site(cluster, tmp_path, shards, DOCTOR="1")
    job = site.train()
    info = site.finished(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "1:0", "0")
    assert "loopback" in site.read(job) and not site.run_dir.exists()


def test_a_users_error_is_not_tried_again(site):
    job = site.train("--train.lerning_rate", "1")
    info = site.finished(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "2:0", "0")
    assert "unknown key" in site.read(job)


def test_evaluation_on_two_nodes_gives_the_trainings_digits(undisturbed, site):
    run_dir = undisturbed[0].run_dir
    job = site.submit("eval", run_dir, "--split", "val", "--json")
    site.completed(job, "eval")
    result = json.loads([line for line in site.rank_log(job, 0, "eval", "eval").splitlines() if line[:1] == "{"][-1])
    last = metrics_of(run_dir, "eval")[-1]
    assert result["n"] == last["n"] and result["oiou"] == last["oiou"] and result["miou"] == last["miou"]


def test_an_array_task_shards_one_dataset(site, refer_tree, shards):
    out = site.folder / "shards"
    args = [
        "--refer-root",
        refer_tree,
        "--images",
        refer_tree / "images/train2014",
        "--out",
        out,
        "--shards",
        "train=4",
    ]
    job = site.cluster.submit(site.settings, "--array=0", "--gpus-per-node=0", "slurm/shard.sbatch", *args)
    site.cluster.finished(job, site.log(job))
    log = "\n".join(f.read_text() for f in site.logs.glob("shard-*.log"))
    assert "ok" in log.splitlines(), log
    for file in (shards / "refcoco/unc").iterdir():
        assert (out / "refcoco/unc" / file.name).read_bytes() == file.read_bytes()


# What a job does with a status needs no training: here each rank is a small script in Python's place.


@pytest.fixture
def pretend(cluster: Cluster, shards: Path, tmp_path: Path):
    """A site whose ranks run the given shell lines instead."""

    def make(lines: str, **settings: str) -> Site:
        rank = tmp_path / "rank"
        rank.write_text(f"#!/bin/bash\n{lines}\n")
        rank.chmod(0o755)
        return Site(cluster, tmp_path, shards, PYTHON=rank, **settings)

    return make


def test_a_job_is_requeued_only_so_often(pretend):
    site = pretend("exit 75", MAX_REQUEUES="2")
    job = site.train()
    info = site.finished(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "75:0", "2")
    assert "was requeued 2 times (MAX_REQUEUES=2): not again" in site.read(job)


def test_a_job_may_have_any_name_and_its_log_is_found(pretend):
    """SLURM itself takes a slash in a log's name for a folder."""
    site = pretend('echo "dit-ds: error: said by rank $SLURM_PROCID" >&2; exit 2')
    job = site.cluster.submit(site.settings, "--nodes=1", "--job-name=a/b 100%t", "slurm/train.sbatch", "--config", "x")
    info = site.finished(job)
    assert (info["JobState"], info["ExitCode"]) == ("FAILED", "2:0")
    assert "dit-ds: error: said by rank 0" in site.read(job, "a_b_100_t").splitlines()
    assert "said by rank 0" in site.rank_log(job, 0, "a_b_100_t")


def test_a_diverged_run_is_not_tried_again(pretend):
    site = pretend("exit 1")
    info = site.finished(site.train())
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "1:0", "0")


@pytest.mark.parametrize(
    "status,other",
    [
        (2, "exec sleep 300"),  # still starting when the first rank refused
        (1, "trap '' TERM; sleep 20"),  # stuck in a collective: SLURM has to kill it
    ],
)
def test_the_ranks_that_are_ended_do_not_hide_the_error_of_the_first(pretend, status, other):
    site = pretend(f'if [ "$SLURM_PROCID" = 1 ]; then sleep 0.5; exit {status}; fi\n{other}')
    job = site.train()
    info = site.finished(job, timeout=60)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", f"{status}:0", "0"), site.read(job)


def test_one_killed_rank_ends_the_others_and_the_job_comes_back(pretend):
    site = pretend(
        '[ -z "$SLURM_RESTART_COUNT" ] || exit 0\nif [ "$SLURM_PROCID" = 1 ]; then kill -9 $$; fi\nsleep 0.1; exit 1',
        RESTARTS="0",
    )
    job = site.train()
    assert site.completed(job, timeout=60)["Restarts"] == "1"
    assert re.search(r"ended with status 1(37|43): requeued", site.read(job))


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 76"])
def test_a_rank_that_dies_or_hangs_starts_again_in_the_same_job(pretend, tmp_path, end):
    """Rank 1 ends so twice, each time with another port; the third time it is done."""
    count = f"{tmp_path}/ports"
    done = f'[ "$(cat {count} 2>/dev/null | wc -l)" -ge 3 ]'
    site = pretend(
        f'if [ "$SLURM_PROCID" = 0 ]; then until {done}; do sleep 0.1; done; exit 0; fi\n'
        f"echo $MASTER_PORT >>{count}\n{done} || {end}\nexit 0",
        RESTARTS="2",
    )
    job = site.train()
    assert site.completed(job, timeout=60)["Restarts"] == "0"
    assert len(set(Path(count).read_text().split())) == 3
    assert "started again in this job (2 of 2)" in site.read(job)


@pytest.mark.slow
def test_a_killed_rank_is_training_again_in_the_same_job_and_computes_the_same(undisturbed, site):
    job = site.train("--checkpoint.every_steps", "5")
    site.reach(job, 12)
    ranks = site.cluster.run("pgrep", "-f", f"dit_ds.cli train .*{site.config}").split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert site.completed(job)["Restarts"] == "0"
    assert "started again in this job (1 of 3)" in site.read(job)
    starts = status(site.run_dir)["starts"]
    assert len(starts) == 2 and starts[1]["time"] - starts[0]["time"] < 120
    assert digits(site.run_dir) == digits(undisturbed[0].run_dir)


def test_the_batch_shell_outlives_a_signal_to_everything(pretend):
    """As some sites' preemption sends it; the shell must live to requeue the job."""
    site = pretend(
        '[ -z "$SLURM_RESTART_COUNT" ] || exit 0\ntrap "exit 75" USR2\ntouch "$READY$SLURM_PROCID"; sleep 300 & wait'
    )
    job = site.train_until_ready()
    site.cluster.run("scancel", "--full", "--signal=USR2", job)
    assert site.completed(job, timeout=60)["Restarts"] == "1"


def test_a_cancelled_job_stays_cancelled(pretend):
    site = pretend('trap "exit 75" TERM\ntouch "$READY$SLURM_PROCID"; sleep 300 & wait')
    job = site.train_until_ready()
    site.cluster.run("scancel", job)
    info = site.finished(job, timeout=60)
    assert (info["JobState"], info["Restarts"]) == ("CANCELLED", "0")
    site.cluster.wait_idle()
    assert "as SLURM was ending the job (scancel" in site.read(job)
    assert site.cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_tuning_compares_what_finished_records_what_failed_and_repeats_neither(pretend, tmp_path):
    """The search is real, its trials are not: the first fails, the third is the fastest."""
    site = pretend(f"""
case "$*" in *"dit_ds.cli tune"*) exec {sys.executable} "$@" ;; esac
while [ $# -gt 0 ]; do [ "$1" != --run_dir ] || run=$2; shift; done  # the last one counts
trial=$(ls -d "$run"/../*/ | wc -l)
[ "$trial" != 1 ] || {{ echo 'dit-ds: error: does not fit'; exit 1; }}
[ "$SLURM_PROCID" = 1 ] || for s in 1 ${{trial}}0 ${{trial}}0; do
    echo '{{"kind": "train", "samples_per_second": '$s', "peak_memory_gib": 3.5}}' >> "$run/metrics.jsonl"
done""")
    out = tmp_path / "tune"
    args = ("tune", "--config", site.config, "--out", out, "--trials", "3",
            "--launch", f"bash slurm/on_ranks.sh {tmp_path / 'rank'}")  # fmt: skip
    for _ in range(2):  # submitted again, nothing is tried again
        job = site.submit(*args)
        site.completed(job, "tune", timeout=600)
        answer = json.loads((out / "candidates.json").read_text())
        assert (answer["nodes"], answer["gpus"]) == (2, 1)
        tried = [c["trial"] for c in answer["candidates"] if c["trial"]]
        assert [t.get("samples_per_second") for t in tried] == [30, 20, None]
        assert tried[2]["error"] == "does not fit" and answer["chosen"]["trial"] == tried[0]
        metrics = out / "trials" / answer["chosen"]["name"] / "metrics.jsonl"
        assert len(metrics.read_text().splitlines()) == 3
    assert "sbatch --nodes=2 --gpus-per-node=1 slurm/train.sbatch" in site.read(job, "tune")


def test_an_interrupted_trial_puts_the_job_back_into_the_queue(pretend, tmp_path):
    site = pretend(f"""
case "$*" in *"dit_ds.cli tune"*) exec bash slurm/on_ranks.sh {tmp_path / "rank"} --run_dir x ;; esac
[ -n "$SLURM_RESTART_COUNT" ] || exit 75""")
    job = site.submit("tune", "--config", site.config)
    assert site.completed(job, "tune", timeout=60)["Restarts"] == "1"
    assert "ended with status 75: requeued" in site.read(job, "tune")
