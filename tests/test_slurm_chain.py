"""Chained jobs (CHAIN in slurm/cluster.env) on a real cluster: each reads how the one before it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import NODES, Cluster, Site

pytestmark = pytest.mark.slurm


@pytest.fixture
def chain(cluster: Cluster, shards: Path, tmp_path: Path):
    """A site of chained jobs whose ranks note each start and run the given shell lines instead of training."""

    def make(lines: str, length: int = 5) -> Site:
        rank = tmp_path / "rank"
        rank.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/starts\nn=$(wc -l <{tmp_path}/starts)\n{lines}\n')
        rank.chmod(0o755)
        return Site(cluster, tmp_path, shards, PYTHON=rank, CHAIN=str(length))

    return make


def starts(site: Site) -> list[str]:
    return (site.folder / "starts").read_text().splitlines()


def logs(site: Site, timeout: float = 90) -> list[str]:
    """Of all jobs, in their order, once none is left."""
    site.cluster.wait_for(lambda: not site.cluster.run("squeue", "-h"), "empty queue", site.folder / "none", timeout)
    files = sorted((f for f in site.logs.glob("*.log") if not f.is_symlink()), key=lambda f: int(f.stem))
    return [f.read_text() for f in files]


def test_a_chain_goes_on_until_the_run_is_done(chain):
    site = chain("[ $n -ge 3 ] && exit 0; exit 75")
    job = site.submit("train", "--config", site.config, "--train.note", "two words", nodes=1)
    said = logs(site)
    assert len(said) == 4 and len(starts(site)) == 3  # the fourth was in the queue when the third finished
    assert len(set(starts(site))) == 1 and "two words" in starts(site)[0]
    assert f"ended with status 75: job {int(job) + 1} comes next" in said[0]
    assert f"job {job} was interrupted: this one goes on" in said[1]
    assert "finished the run: the chain ends" in said[3]
    assert all("restart 0, 1 x 1 tasks" in text for text in said)


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_ends_the_chain(chain, status):
    site = chain(f'echo "dit-ds: error: no such thing" >&2; exit {status}')
    site.submit("train", "--config", site.config, nodes=1)
    said = logs(site)
    assert len(said) == 2 and len(starts(site)) == 1
    assert f"ended with status {status}, which is not tried again: the chain ends" in said[1]


def test_a_cancelled_job_ends_the_chain(chain):
    site = chain('trap "exit 75" TERM; touch "$READY$SLURM_PROCID"; sleep 300 & wait')
    job = site.train_until_ready()
    site.cluster.run("scancel", job)
    said = logs(site)
    assert len(said) == 2 and f"job {job} was cancelled: the chain ends" in said[1]


def test_a_chain_has_an_end(chain):
    site = chain("exit 75", length=1)
    site.submit("train", "--config", site.config, nodes=1)
    said = logs(site)
    assert len(said) == 2 and len(starts(site)) == 2
    assert "was the last of CHAIN=1: submit the same command to go on" in said[1]


def test_the_next_job_goes_on_where_a_node_failed(chain):
    site = chain('[ $n -ge 2 ] && exit 0; touch "$READY"; sleep 300')
    with open(site.settings, "a") as f:
        f.write(f"export READY={site.folder}/ready\n")
    job = site.submit("train", "--config", site.config, nodes=1)
    site.cluster.wait_for((site.folder / "ready").exists, "rank", site.log(job))
    assert site.cluster.job(job)["NodeList"] == NODES[0]
    site.cluster.kill_node(NODES[0])
    try:
        site.cluster.wait_for(lambda: len(starts(site)) == 2, "second start", site.log(job))
        assert site.cluster.job(job)["JobState"] == "NODE_FAIL"
        assert len(logs(site)) >= 2
    finally:
        site.cluster.start_node(NODES[0])
        site.cluster.wait_idle()
