"""Faults of the loader: workers that die or stall, damaged samples within and beyond a run's budget."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import MINILM, ROOT, dit_ds, environment, metrics_of, refused, tiny_config, wait_for_step

from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.workers import worker_failures
from dit_ds.data.shards.storage import locate
from dit_ds.errors import RankFailed
from dit_ds.models.text_encoder import load_tokenizer


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "killed by signal|exited unexpectedly"),
        (signal.SIGSTOP, "no batch from 2 loader workers for 3 s"),
    ],
)
def test_a_worker_that_dies_or_stalls_is_reported(shards, streamed, number, says):
    index = SplitIndex.load(locate(shards, "refcoco", "unc"), "train")
    data = ExpressionDataset(index, "ref", 64, make_tokenize(load_tokenizer(MINILM), 20), streamed=streamed)
    sampler = TrainBatchSampler(index.samples("ref", "shards"), 4, 4, 0, 1, 0)
    before = set(multiprocessing.active_children())
    batches = iterate(make_loader(data, sampler, 2, pin=False, timeout=3))
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    start = time.monotonic()
    # torch raises it wherever the main thread is
    with pytest.raises(RankFailed, match=f"({says}).*--resume"), worker_failures():
        for worker in workers:
            os.kill(worker.pid, number)
        list(batches)
    assert time.monotonic() - start < 20
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    # PyTorch's handler is there for the next iterator: it ends a read from a worker that dies within a message
    assert callable(signal.getsignal(signal.SIGCHLD))


def test_a_dead_worker_ends_training_with_one_line(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config["data"]["workers"] = 1
    config["train"]["epochs"] = 1000
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_ds.cli", "train", "--config", str(tmp_path / "c.yaml")],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 3, [process])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"dit_ds" in Path(f"/proc/{c}/cmdline").read_bytes()]
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    line = next((x for x in err.splitlines() if "dit-ds: error: " in x), err)
    assert "killed by signal" in line or "exited unexpectedly" in line
    assert "lower data.workers" in line


@pytest.fixture
def damaged(shards, tmp_path):
    """The set with three damaged images: a flipped byte in two JPEGs, one in a JSON member. And their keys."""
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    index = SplitIndex.load(root / "refcoco/unc", "train")
    keys = []
    for image, column in ((0, 2), (7, 2), (12, 5)):
        shard, image_id, at, length = (int(index.images[image, c]) for c in (0, 1, column, column + 1))
        data = bytearray(index.shards[shard].read_bytes())
        data[at + length // 2] ^= 4
        index.shards[shard].write_bytes(data)
        keys.append(f"{image_id:012d}")
    return root, keys


def test_damaged_samples_are_skipped_within_the_budget(damaged, tmp_path):
    root, keys = damaged
    config = tiny_config(root, tmp_path / "run")
    config["data"] |= {"workers": 1, "max_bad_samples": 3}
    config["train"]["epochs"] = 2  # named and counted once, in whichever epoch
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    results = []
    for ranks in (1, 2):
        done = dit_ds("train", "--config", path, "--json", "--run_dir", tmp_path / f"run{ranks}", ranks=ranks)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        log = (tmp_path / f"run{ranks}/log.txt").read_text()
        for key in keys:
            assert log.count(f"{key}.j") == 1
        assert "skipped, 3 of 3" in log
    assert results[0]["bad_samples"] == results[1]["bad_samples"] == 3
    losses = [[m["loss"] for m in metrics_of(tmp_path / f"run{r}")] for r in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # one more than it may skip: all ranks say so
    line = refused(
        dit_ds("train", "--config", path, "--run_dir", tmp_path / "run3", "--data.max_bad_samples", "2", check=None)
    )
    assert "more than data.max_bad_samples (2) samples are damaged" in line
    # none may be skipped
    line = refused(
        dit_ds("train", "--config", path, "--run_dir", tmp_path / "run4", "--data.max_bad_samples", "0", check=None)
    )
    assert "is damaged: remove that shard and shard again" in line


@pytest.mark.slow
def test_the_count_of_skipped_samples_survives_a_stop(damaged, tmp_path):
    root, _ = damaged
    config = tiny_config(root, tmp_path / "run")
    config["data"]["max_bad_samples"] = 3
    config["checkpoint"] = {"every_steps": 1}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", path, "--train.max_steps", "11")
    done = dit_ds("train", "--config", path, "--train.epochs", "2", "--resume", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["bad_samples"] == 3
    assert (tmp_path / "run/log.txt").read_text().count("skipped, ") == 3
