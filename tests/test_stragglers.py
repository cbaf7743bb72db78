"""Slow ranks and nodes: named where they are, by `dit-ds stragglers`, the log and doctor; and none where none is."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, dit_ds, tiny_config, warm
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dit_ds.config.load import validate
from dit_ds.doctor import speed
from dit_ds.doctor.check import Context
from dit_ds.errors import UserError
from dit_ds.training import stragglers, throughput
from dit_ds.training.stragglers import StragglerWatch, lines, slow_ranks
from dit_ds.training.throughput import FlopsPerSample, ThroughputMeter

QUIET = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def write_run(folder, records: list) -> None:
    (folder / "config.yaml").write_text("{}")
    (folder / stragglers.NAME).write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))


def record(step: int, own: dict, step_seconds: float = 1.0) -> dict:
    return {"step": step, "step_seconds": step_seconds, "own_seconds": own}


@QUIET
@given(n=st.integers(2, 9), data=st.data())
def test_the_slow_rank_is_named_and_no_other(n, data):
    base = data.draw(st.lists(st.floats(0.9, 1.1), min_size=n, max_size=n))
    times = {(f"n{i // 2}", i): t for i, t in enumerate(base)}
    assert slow_ranks(times, 3.0) == set()
    who = data.draw(st.sampled_from(list(times)))
    assert slow_ranks(times | {who: data.draw(st.floats(1.6, 1e4))}, 3.0) == {who}


@example(share=1.34)
@given(share=st.floats(1.34, 4))
@QUIET
def test_what_does_not_hold_training_up_is_not_named(share):
    times = {("a", 0): 0.001, ("a", 1): 0.001, ("b", 2): 0.001 * share}
    assert slow_ranks(times, 1.0) == set() and slow_ranks(times, 0.001) == {("b", 2)}


def test_the_report_names_host_share_and_line(tmp_path, capsys):
    even, uneven = {"n1": {"0": 0.2, "1": 0.21}, "n2": {"2": 0.2}}, {"n1": {"0": 0.2, "1": 0.21}, "n2": {"2": 0.5}}
    damaged = ["{", '{"own_seconds": 3}', '{"step_seconds": 1, "own_seconds": {"n1": {"x": 1, "1": 2}}}', "[]"]
    write_run(tmp_path, [record(i, uneven if i % 4 else even) for i in range(8)] + damaged)
    result = stragglers.stragglers(tmp_path)
    assert result["intervals"] == 8 and result["why"] is None and result["hosts"] == ["n2"]
    worst, *others = result["ranks"]
    assert (worst["host"], worst["rank"], worst["own_seconds"], worst["slow_share"]) == ("n2", 2, 0.5, 0.75)
    assert worst["ratio"] == pytest.approx(0.5 / 0.21) and worst["verdict"] == "straggler"
    assert [r["verdict"] for r in others] == ["ok", "ok"]
    assert result["exclude"] == "sbatch --exclude=n2" and lines(result)[-1] == "leave out: sbatch --exclude=n2 ..."
    assert json.loads(dit_ds("stragglers", tmp_path, "--json", real=True).stdout) == result
    write_run(tmp_path, [record(i, even) for i in range(3)])
    assert lines(stragglers.stragglers(tmp_path))[-1] == "no straggler"


def test_a_run_without_records_says_so_in_one_line(tmp_path, refusal):
    with pytest.raises(UserError, match="no run in"):
        stragglers.stragglers(tmp_path)
    assert "no run in" in refusal("stragglers", str(tmp_path))
    (tmp_path / "config.yaml").write_text("{}")
    (line,) = lines(stragglers.stragglers(tmp_path))
    assert "one rank" in line and stragglers.stragglers(tmp_path)["ranks"] == []
    write_run(tmp_path, [record(1, {"n1": {"0": 1.0}})])  # one rank has no others
    assert len(lines(stragglers.stragglers(tmp_path))) == 1


def test_the_log_names_one_that_persists_and_only_at_times(monkeypatch, caplog):
    watch, clock = StragglerWatch(), [0.0]
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: clock[0])
    even, uneven = ({("n1", 0): 1.0, ("n2", 1): 1.0, ("n3", 2): t} for t in (1.0, 2.0))
    with caplog.at_level(logging.WARNING, logger="dit_ds"):
        for i in range(40):  # each third: not persistent
            assert watch.add(uneven if i % 3 == 0 else even, 3.0) == []
        named = [watch.add(uneven, 3.0) for _ in range(20)]
        assert [x for x in named if x] == [["n3"]]
        clock[0] += 1801
        assert watch.add(uneven, 3.0) == ["n3"]
    assert len(caplog.messages) == 2
    assert "rank 2 on n3 (2 s a step)" in caplog.messages[0] and "sbatch --exclude=n3" in caplog.messages[0]


SLOW = """
import os, socket, sys, time
from dit_ds.cli.entry import main
from dit_ds.training import run_log, train
rank, name = int(os.environ["RANK"]), socket.gethostname
socket.gethostname = lambda: f"node{rank}"  # each rank on a host of its own
inputs, batches = train.model_inputs, train.iterate
def slow_inputs(*args):  # in the forward pass
    time.sleep(0.5)
    return inputs(*args)
def slow_batches(loader):
    for batch in batches(loader):
        time.sleep(0.5)
        yield batch
if rank == 1:
    if os.environ["SLOW"] == "forward":
        train.model_inputs = slow_inputs
    else:
        train.iterate = slow_batches
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("stage", "slow"), [(2, "forward"), pytest.param(3, "data", marks=pytest.mark.slow)])
def test_a_slow_rank_of_a_training_is_named(shards, tmp_path, monkeypatch, stage, slow):
    config = tiny_config(shards, tmp_path / "run")
    config["train"] |= {"batch_size": 6}
    config["deepspeed"]["config"] = str(ROOT / f"configs/deepspeed/zero{stage}.json")
    config["deepspeed"]["override"] |= {"train_micro_batch_size_per_gpu": 2}
    config["eval"] = {"every_epochs": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("SLOW", slow)
    done = warm([str(tmp_path / "slow.py"), "train", "--config", str(tmp_path / "c.yaml")], ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    result = stragglers.stragglers(tmp_path / "run")
    assert result["hosts"] == ["node1"] and result["intervals"] >= 6, result
    assert result["ranks"][0]["rank"] == 1 and result["ranks"][0]["own_seconds"] > 0.5
    said = [x for x in (tmp_path / "run/log.txt").read_text().splitlines() if "--exclude" in x]
    assert len(said) == 1 and "sbatch --exclude=node1" in said[0], said


def test_own_time_is_without_a_forward_pass_that_waits_for_others(world, monkeypatch):
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    own = []
    for forward_waits in (False, True):
        meter = ThroughputMeter(world, FlopsPerSample(1), forward_waits)
        for _ in range(2):
            meter.data_requested()
            wait(0.01)
            meter.data_received()
            wait(0.1)
            meter.forward_done(torch.tensor(1.0), 1)
            wait(0.2)  # the backward pass, in which ranks wait
            meter.step_done()
        line = meter.close()
        own += line["own_seconds"]
        assert line["step_seconds_mean"] == pytest.approx(0.31)
    assert own == pytest.approx([0.11, 0.01])


NODE = {"product": 10.0, "memory": 100.0, "disk_write": 500.0, "disk_read": 900.0, "link": 20.0}


@QUIET
@given(n=st.integers(2, 8), measure=st.sampled_from(list(speed.MEASURES)), data=st.data())
def test_doctor_names_the_slow_node_and_no_other(n, measure, data):
    near = st.fixed_dictionaries({m: st.floats(0.85 * v, v) for m, v in NODE.items()})
    nodes = {f"n{i}": data.draw(near) for i in range(n)}
    assert [c.status for c in speed.compare_nodes(nodes, "torch.bfloat16")] == ["ok"]
    bad = data.draw(st.sampled_from(list(nodes)))
    nodes[bad][measure] = NODE[measure] * data.draw(st.floats(0.01, 0.5))
    _, *warnings = speed.compare_nodes(nodes, "torch.bfloat16")
    if measure == "link" and n == 2:  # a link of two is both nodes'
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.status == "warn" and warning.found.startswith(f"{bad}: {speed.MEASURES[measure][0]}")
    assert f"sbatch --exclude={bad}" in warning.remedy and ("where the other node" in warning.found) == (n == 2)


@pytest.mark.parametrize("n", range(2, 10))
def test_each_node_meets_each_other_once(n):
    rounds = speed.pairings(n)
    met = [frozenset(p) for r in rounds for p in r]
    assert len(set(met)) == len(met) == n * (n - 1) // 2
    assert all(len({x for p in r for x in p}) == 2 * len(r) for r in rounds)


def test_the_disk_is_measured_and_left_as_it_was(tmp_path, shards):
    found = speed._disk(tmp_path, 0)
    assert found["disk_write"] > 0 and found["disk_read"] > 0 and list(tmp_path.iterdir()) == []
    assert speed._disk(tmp_path / "gone", 0) == {}
    config = validate(tiny_config(shards, tmp_path / "not/yet"))
    assert speed._disk_folder(Context(config=config)) == tmp_path


MEASURE = """
import json, os, socket, time
import torch.distributed as dist
from dit_ds.distributed import connect
from dit_ds.doctor.check import Context
from dit_ds.doctor import speed
rank = int(os.environ["RANK"])
c = Context(rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
c.facts["host"] = f"node{rank}"
connect()
start = time.perf_counter()
checks = [[x.name, x.status, x.found] for x in speed.node_speed(c)]
with open(os.path.join(os.environ["FOLDER"], f"{rank}.json"), "w") as f:
    json.dump([rank, time.perf_counter() - start, checks], f)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_nodes_are_measured_for_real(tmp_path, monkeypatch, ranks):
    (tmp_path / "measure.py").write_text(MEASURE)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    done = warm([str(tmp_path / "measure.py")], ranks=ranks, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(x.read_text()) for x in tmp_path.glob("*.json")]
    assert len(found) == ranks and all(checks == found[0][2] for _, _, checks in found)  # the same on every rank
    name, status, text = found[0][2][0]
    assert (name, status) == ("node speed", "ok") and text.startswith(f"{ranks} nodes: matrix product ")
    for measured, unit in speed.MEASURES.values():
        assert measured in text and unit in text
    assert max(seconds for _, seconds, _ in found) < 10  # about 2 on two free cores
