"""Streams: the same batches as from local shards, from pipes and a web server; and mixtures of sets through the real loader."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading

import pytest
import torch
import yaml
from conftest import MINILM, dit_ds, metrics_of, refused, tiny_config

from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import EvalBatchSampler, TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.data.shards.storage import locate
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer


def batches_of(root, streamed, workers, rank=0, world=1, first=0, unit="ref", split="train"):
    """Micro-batches of epoch 2 as this rank's loader gives them, in order `shards`."""
    index = SplitIndex.load(locate(root, "refcoco", "unc"), split)
    tokenize = make_tokenize(load_tokenizer(MINILM), 20)
    how = Augmentation(0.4, 0.5, 0.5)
    data = ExpressionDataset(index, unit, 64, tokenize, how, 5, streamed=streamed)
    sampler = TrainBatchSampler(index.samples(unit, "shards"), 16, 4, rank, world, 5)
    sampler.start_at(2, first)
    return list(iterate(make_loader(data, sampler, workers, pin=False, timeout=60)))


def same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)


@pytest.fixture(scope="module")
def server(shards):
    """The shards behind a web server on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shards)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_address[1]}"
        s.shutdown()


@pytest.mark.parametrize("workers", [0, 1, 3, 8])
def test_a_stream_gives_the_batches_of_local_shards(shards, workers):
    reference = batches_of(shards, streamed=False, workers=0)
    same(batches_of(f"pipe:cat {shards}/{{}}", streamed=True, workers=workers), reference)
    # any rank of any world, from any batch on
    steps = 16 // 4
    second = [b for k in range(0, len(reference), steps) for b in reference[k + 1 : k + steps : 2]]
    same(batches_of(shards, streamed=True, workers=workers, rank=1, world=2, first=1), second[2:])


def test_a_stream_from_a_web_server_trains_and_evaluates_alike(shards, server, tmp_path):
    results = []
    for name, root in (("local", str(shards)), ("web", server)):
        config = tiny_config(root, tmp_path / name)
        config["data"] |= {"order": "shards", "workers": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        done = dit_ds("train", "--config", tmp_path / f"{name}.yaml", "--json", ranks=2)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        results[-1] = {k: v for k, v in results[-1].items() if k not in ("run", "train_seconds")}
    assert results[0] == results[1]
    losses = [[m["loss"] for m in metrics_of(tmp_path / n)] for n in ("local", "web")]
    assert losses[0] == losses[1]
    assert "give the shards with --data-root" in refused(dit_ds("eval", tmp_path / "web", check=None))
    evaluated = dit_ds("eval", tmp_path / "web", "--split", "testA", "--data-root", server, "--json")
    moved = dit_ds("eval", tmp_path / "web", "--split", "testA", "--data-root", shards, "--json")
    assert json.loads(evaluated.stdout) == json.loads(moved.stdout)


def test_evaluation_from_a_stream_reads_each_expression_once(shards):
    index = SplitIndex.load(locate(f"pipe:cat {shards}", "refcoco", "unc"), "val")
    tokenize = make_tokenize(load_tokenizer(MINILM), 20)
    data = ExpressionDataset(index, "sentence", 64, tokenize, streamed=True)
    seen = []
    for rank in range(3):
        for batch in iterate(make_loader(data, EvalBatchSampler(len(data), 7, rank, 3), 2, pin=False)):
            seen += [int(s) for s, w in zip(batch["sample"], batch["weight"]) if w]
    assert sorted(seen) == list(range(len(data)))


def test_what_a_stream_cannot_read_is_one_line(shards, tmp_path, refusal):
    config = tiny_config(shards, tmp_path / "run")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    for more, says in [
        (["--data.root", "pipe:cat /nowhere/{}"], "cannot read pipe:cat /nowhere/refcoco/unc/manifest.json"),
        (["--data.root", "https://example.org/x", "--data.reader", "map"], "set data.reader auto"),
        (["--data.reader", "stream", "--data.order", "global"], "set data.order auto"),
        (["--data.order", "shards", "--data.unit", "image"], "set data.unit ref"),
        (["--data.mixture", "{refcoco: 1}"], "does not read DATASET/SPLIT_BY"),
        (["--data.mixture", "{refcoco/unc: 0}"], "data.mixture.refcoco/unc = 0: input should be greater than 0"),
        (["--data.mixture", "{refcoco/unc: 1.5}", "--data.unit", "image"], "takes whole weights"),
    ]:
        assert says in refusal("train", "--config", path, *more), more


def test_a_shard_that_breaks_off_is_named(shards, tmp_path):
    folder = tmp_path / "refcoco/unc"
    shutil.copytree(shards / "refcoco/unc", folder)
    shard = sorted(folder.glob("train-*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{shard.name}: \d+\.(jpg|json) is damaged"):
        batches_of(f"pipe:cat {tmp_path}/{{}}", streamed=True, workers=2)
    shard.unlink()
    with pytest.raises(UserError, match=f"cannot read pipe:cat {shard}.*see that it can be reached"):
        batches_of(f"pipe:cat {tmp_path}/{{}}", streamed=True, workers=2)
