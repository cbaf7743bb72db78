"""A training with spare nodes on a real cluster of three: a lost node is replaced, or done without, in the same job."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import metrics_of
from slurm_cluster import THREE_NODES, Cluster, Site, start_cluster

from dit_ds.training.status import status

pytestmark = pytest.mark.slurm
LOST = THREE_NODES[1]
# ranks that are out of SLURM's reach go on training: so long that SLURM sees meanwhile that their node is lost
STEPS = 300


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from start_cluster(tmp_path_factory.mktemp("slurm"), THREE_NODES)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """The digits of a training on two of three nodes that nothing happened to."""
    site = Site(cluster, tmp_path_factory.mktemp("undisturbed"), shards, SPARES="1")
    job = site.train("--train.max_steps", str(STEPS), "--checkpoint.every_steps", "5", nodes=3)
    assert site.completed(job, timeout=240)["Restarts"] == "0"
    assert f"training on {THREE_NODES[0]} {LOST}, not on {THREE_NODES[2]}" in site.read(job)
    return digits(site)


@pytest.fixture
def node_back(cluster: Cluster) -> Iterator[None]:
    """Starts the lost nodes for the next test."""
    yield
    for node in THREE_NODES:
        if cluster.daemons[node].poll() is not None:
            cluster.start_node(node)
    cluster.wait_idle()


def digits(site: Site) -> list:
    train = [(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in metrics_of(site.run_dir)]
    return [train, metrics_of(site.run_dir, "eval")]


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["kill_slurmd", "kill_node"])
def test_a_spare_takes_a_lost_nodes_place_and_computes_the_same(
    undisturbed, cluster, shards, tmp_path, node_back, kill
):
    site = Site(cluster, tmp_path, shards, SPARES="1")
    job = site.train("--train.max_steps", str(STEPS), "--checkpoint.every_steps", "5", nodes=3)
    site.reach(job, 12)
    getattr(cluster, kill)(LOST)
    lost = time.time()
    info = site.completed(job, timeout=240)
    log = site.read(job)
    assert info["Restarts"] == "0" and "started again in this job (1 of 3)" in log, log
    assert f"training on {THREE_NODES[0]} {THREE_NODES[2]}, not on {LOST}" in log
    bad = (site.logs / f"train-{job}/bad_nodes").read_text().splitlines()
    assert len(bad) == 1 and bad[0].startswith(f"{LOST} ") and bad[0].endswith("does not answer")
    starts = status(site.run_dir)["starts"]
    print(f"{kill}: training again {starts[1]['time'] - lost:.1f} s after")
    assert len(starts) == 2 and starts[1]["time"] - lost < 60, starts
    assert digits(site) == undisturbed and len(undisturbed[0]) == STEPS


@pytest.mark.slow
def test_without_a_spare_an_elastic_training_goes_on_with_fewer_nodes(
    undisturbed, cluster, shards, tmp_path, node_back
):
    site = Site(cluster, tmp_path, shards, ELASTIC="1")
    words = ["--train.max_steps", str(STEPS), "--checkpoint.every_steps", "5", "--log.samples", "true"]
    job = site.train(*words)
    site.reach(job, 12)
    cluster.kill_slurmd(LOST)
    info = site.completed(job, timeout=240)
    log = site.read(job)
    assert info["Restarts"] == "0" and f"training on {THREE_NODES[0]}, not on {LOST}" in log, log
    assert [x["world_size"] for x in status(site.run_dir)["starts"]] == [2, 1]
    train, want = metrics_of(site.run_dir), undisturbed[0]
    assert [x["step"] for x in train] == [step for step, *_ in want]
    assert [x["loss"] for x in train] == pytest.approx([loss for _, loss, *_ in want], rel=1e-3)
    # of each epoch every sample once, whichever rank took it
    taken = Counter()
    for file in (site.run_dir / "samples").glob("rank_*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            taken.update((line["epoch"], sample) for sample in line["samples"])
    assert set(taken.values()) == {1} and len({s for _, s in taken}) > 8


@pytest.mark.slow
def test_the_loss_of_the_first_node_is_the_queues(pretend, cluster, tmp_path):
    site = pretend(START.format(tmp_path) + 'touch "$READY"; exec sleep 120', SPARES="1")
    with open(site.settings, "a") as f:
        f.write(f"export READY={tmp_path}/ready\n")
    job = site.train(nodes=3)
    cluster.wait_for((tmp_path / "ready").exists, "rank", site.log(job))
    time.sleep(1)
    cluster.kill_node(THREE_NODES[0])
    cluster.wait_for(lambda: cluster.job(job)["JobState"] != "RUNNING", "end of the job", site.log(job), timeout=90)
    cluster.start_node(THREE_NODES[0])
    cluster.wait_for(lambda: cluster.restart(job), "requeued job", site.log(job), timeout=90)
    assert site.completed(job)["Restarts"] == "1"


# What the scripts do with a lost node needs no training: here each rank is a small script in Python's place.


@pytest.fixture
def pretend(cluster: Cluster, shards: Path, tmp_path: Path, node_back):
    def make(lines: str, **settings: str) -> Site:
        rank = tmp_path / "rank"
        rank.write_text(f"#!/bin/bash\ncase $1 in slurm/node_counts.py) echo 1; exit ;; esac\n{lines}\n")
        rank.chmod(0o755)
        return Site(cluster, tmp_path, shards, PYTHON=rank, **settings)

    return make


def starts_of(tmp_path: Path) -> list[str]:
    return [" ".join(sorted(f.read_text().split())) for f in sorted(tmp_path.glob("start.*"))]


# each start leaves its nodes; a rank ends once it is on other nodes than the first were, or after a requeue
START = """
echo $SLURMD_NODENAME:$MASTER_ADDR >>{0}/start.$SLURM_RESTART_COUNT$SLURM_STEP_ID
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
"""


@pytest.mark.parametrize(
    ("settings", "nodes", "after"),
    [
        pytest.param(
            {"SPARES": "1"}, 3, [f"{THREE_NODES[0]}:{THREE_NODES[0]}", f"{THREE_NODES[2]}:{THREE_NODES[0]}"], id="spare"
        ),
        pytest.param({"ELASTIC": "1"}, 2, [f"{THREE_NODES[0]}:{THREE_NODES[0]}"], id="elastic", marks=pytest.mark.slow),
        pytest.param({}, 2, None, id="neither"),
    ],
)
def test_what_a_lost_node_means(pretend, cluster, tmp_path, settings, nodes, after):
    here = f"{tmp_path}/first"
    both = f'until [ "$(cat {tmp_path}/start.* | wc -l)" -ge 2 ]; do sleep 0.1; done; touch "$READY" {here}'
    site = pretend(
        f"[ -e {here} ] && later=1\n{START.format(tmp_path)}[ -z $later ] || exit 0\n{both}; exec sleep 120", **settings
    )
    with open(site.settings, "a") as f:
        f.write(f"export READY={tmp_path}/ready\n")
    job = site.train(nodes=nodes)
    cluster.wait_for((tmp_path / "ready").exists, "rank", site.log(job))
    time.sleep(1)
    cluster.kill_slurmd(LOST)
    if after is None:
        cluster.wait_for(lambda: cluster.restart(job), "requeued job", site.log(job), timeout=90)
        assert site.completed(job)["Restarts"] == "1"
        return
    info = site.completed(job, timeout=90)
    assert info["Restarts"] == "0", site.read(job)
    assert starts_of(tmp_path)[-1].split() == after, site.read(job)
