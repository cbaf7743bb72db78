"""Checkpoints on the nodes' own disks: the newest that is whole is resumed, wherever its parts lie. Two ranks are two nodes."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import warm_ranks
import yaml
from conftest import ROOT, _worlds, dit_ds, environment, metrics_of, refused, small_disk, tiny_config
from safetensors import safe_open
from warm_ranks import WarmProcess

from dit_ds.checkpointing.integrity import damages
from dit_ds.checkpointing.local import LocalSaver, other_runs
from dit_ds.checkpointing.local_resume import new_run_id
from dit_ds.checkpointing.nodes import copy_holders
from dit_ds.checkpointing.parts import live_part
from dit_ds.checkpointing.writer import LocalDiskFailed, Saver
from dit_ds.config.load import load_config, validate
from dit_ds.doctor.check import Context
from dit_ds.doctor.configured import local_disk
from dit_ds.engine import engine as ds
from dit_ds.engine.zero_state import TrainingState
from dit_ds.models.build import build_model
from dit_ds.planning.memory.profiled_step import fake_batch
from dit_ds.training.status import lines, status

STEPS = 24  # of two epochs


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory) -> Path:
    """A shared checkpoint every 8 steps; one on the nodes' disks as often as it can be written."""
    folder = tmp_path_factory.mktemp("local")
    values = tiny_config(shards, folder / "whole")
    values["train"] |= {"epochs": 2, "ema_decay": 0.9}
    values["eval"] = {"every_epochs": 0}
    values["checkpoint"] = {"every_steps": 8, "every_epochs": 10}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def start(
    config: Path,
    run: Path,
    disks: Path,
    *more: object,
    nodes: tuple[str, ...] = ("a", "b"),
    command: tuple[object, ...] = ("dit-ds",),
) -> list[WarmProcess]:
    """One rank on each node, whose disk is `disks/NODE`."""
    words = [*command, "train", "--config", config, "--run_dir", run, "--resume", "--checkpoint.local",
             f"{disks}/$SLURMD_NODENAME", "--checkpoint.local_every_minutes", "0.00001", *more]  # fmt: skip
    return [
        WarmProcess(list(map(str, words)), environment() | world | {"SLURMD_NODENAME": node}, ROOT, out)
        for world, node, out in zip(_worlds(len(nodes)), nodes, [warm_ranks.output_files() for _ in nodes], strict=True)
    ]


def finish(ranks: list[WarmProcess], status: int = 0) -> str:
    """Rank 0's log, once all have ended."""
    try:
        assert [p.wait(120) for p in ranks] == [status] * len(ranks), [p.stderr.read()[-2000:] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return ranks[0].stderr.read()


def local_steps(disks: Path, node: str = "*") -> list[int]:
    return sorted({int(p.name.split("_")[1]) for p in disks.glob(f"{node}/run_*/step_*")})


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """The undisturbed run, without a local disk."""
    dit_ds("train", "--config", config, ranks=2)
    return config.parent / "whole"


def kill_after(config: Path, folder: Path, *more: object, step: int = 11) -> Path:
    """A run whose ranks were killed behind this step: `run` and `disks` in the folder."""
    ranks = start(config, folder / "run", folder / "disks", *more)
    deadline = time.monotonic() + 120
    while True:
        done = (folder / "run/metrics.jsonl").exists() and metrics_of(folder / "run", "local_save")
        if done and done[-1]["step"] >= step and done[-1]["whole"]:
            break
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks), ranks[0].stderr.read()[-3000:]
        time.sleep(0.01)
    for p in ranks:
        p.kill()
    for p in ranks:
        p.wait(60)
    return folder


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> Path:
    """Killed before its second shared checkpoint: on a busy machine that is noticed too late now and then."""
    for _ in range(5):
        run = kill_after(config, tmp_path_factory.mktemp("killed"))
        if not (run / "run/checkpoints/step_00000016").exists():
            return run
    raise AssertionError("it came too far each time")


@pytest.fixture
def cut(killed, tmp_path) -> Path:
    """A copy of the killed run, to harm."""
    shutil.copytree(killed, tmp_path / "cut")
    return tmp_path / "cut"


def same_end(a: Path, b: Path) -> bool:
    """Losses, weights and optimizer states, to the bit."""

    def end(run):
        meta = json.loads((run / f"checkpoints/step_{STEPS:08d}/meta.json").read_text())
        return [(m["step"], m["loss"]) for m in metrics_of(run)], meta["digest"]

    return end(a) == end(b)


def newest_whole_step(cut: Path) -> int:
    """The newest step of which both parts lie on each disk, as both have the other's copy."""
    found = [{p.name for p in step.glob("*.json")} for step in sorted(cut.glob("disks/a/run_*/step_*"))]
    steps = local_steps(cut / "disks", "a")
    return max(s for s, names in zip(steps, found, strict=True) if len(names) == 2)


def harm_nothing(cut: Path) -> None:
    """Both disks are there."""


def lose_a_node(cut: Path) -> None:
    shutil.rmtree(cut / "disks/b")


def damage_own_parts(cut: Path) -> None:
    """Each node's own part, of all steps: only the copies are left."""
    for path in (cut / "disks").glob("*/run_*/step_*/rank_0000?.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("harm", [harm_nothing, lose_a_node, damage_own_parts])
def test_a_killed_run_goes_on_from_its_nodes_disks(config, whole, cut, harm):
    step = newest_whole_step(cut)
    harm(cut)
    log = finish(start(config, cut / "run", cut / "disks"))
    assert f"the newest checkpoint, of step {step}, is on the nodes' disks" in log and f"at step {step} (" in log
    assert ("its file is not what was written" in log) == (harm is damage_own_parts)
    assert same_end(cut / "run", whole)
    assert not list((cut / "disks").glob("*/run_*")), "a run that is done leaves nothing on the nodes' disks"
    assert damages(cut / f"run/checkpoints/step_{STEPS:08d}") == []


def test_copies_are_tried_again_after_an_error_of_the_network(config, whole, tmp_path):
    worker = (ROOT / "tests/local_saves_worker.py", 1)
    log = finish(start(config, tmp_path / "run", tmp_path / "disks", command=worker))
    assert (
        log.count("copies to other nodes failed") == 1
        and "copies on other nodes are tried again at a later save" in log
    )
    saves = metrics_of(tmp_path / "run", "local_save")
    assert [x["copy_failures"] for x in saves] == [0] + [1] * (len(saves) - 1) and len(saves) > 2, saves
    assert all(x["whole"] for x in saves) and "as before" in log
    assert same_end(tmp_path / "run", whole)


def test_a_resume_without_local_disks_says_what_it_does_not_look_at(config, cut):
    step = newest_whole_step(cut)
    done = dit_ds("train", "--config", config, "--run_dir", cut / "run", "--resume", ranks=2)
    said = [x for x in done.stderr.splitlines() if "where nothing is looked for without --checkpoint.local" in x]
    assert len(said) == 1 and f"{cut.parent}" not in said[0] and "$SLURMD_NODENAME" in said[0], done.stderr
    assert step >= int(re.search(r"of step (\d+)", said[0])[1]) >= 11 and "at step 8 (" in done.stderr
    done = dit_ds("train", "--config", config, "--run_dir", cut / "run", "--resume", ranks=2)
    assert "where nothing is looked for" not in done.stderr, "the run's folder has a later one now"


@pytest.mark.parametrize("stage, more", [
    (0, {}), (1, {}), (2, {}), (3, {}), ("2_offload", {}), (2, {"optimizer": "muon", "gradient_clipping": 0}),
])  # fmt: skip
@pytest.mark.parametrize("change", ["step", "evaluation"])
def test_what_is_saved_is_of_the_step_it_was_begun_at(shards, world, tmp_path, monkeypatch, stage, more, change):
    """Its copy is made while training goes on: here by training, as the writer comes too late for any of it."""
    values = tiny_config(shards, tmp_path / "run")
    values["train"] |= {"ema_decay": 0.9} | more
    values["deepspeed"]["config"] = str(ROOT / f"configs/deepspeed/zero{stage}.json")
    config = validate(values)
    engine = ds.initialize(build_model(config), config, world)
    state = TrainingState(engine, config.train.ema_decay)
    (tmp_path / "run").mkdir()
    local = LocalSaver(config, world, state, tmp_path / "disk", new_run_id())
    train_step(engine, state, config)
    may_write, write = threading.Event(), LocalSaver._write_own
    monkeypatch.setattr(LocalSaver, "_write_own", lambda *args: may_write.wait(60) and write(*args))
    now = {(kind, f.name): x.clone() for kind, f, x in live_part(state)}
    local.begin({"step": 1})
    if change == "step":
        train_step(engine, state, config)
        changed = [not torch.equal(x, now[kind, f.name]) for kind, f, x in live_part(state)]
        assert sum(changed) > 0.9 * len(changed)  # some gradients are zero
    else:
        with ds.averaged(state):
            may_write.set()
            local.wait_for_own()
    may_write.set()
    assert local.finish().whole
    with safe_open(next((tmp_path / "disk").glob("*/*/*.safetensors")), "pt") as saved:
        assert {f"{kind}/{name}" for kind, name in now} == set(saved.keys())
        assert [k for k, x in now.items() if not torch.equal(saved.get_tensor("/".join(k)), x)] == []


def train_step(engine, state, config) -> None:
    """An update, and the weights' average."""
    inputs, mask, weight = fake_batch(4, 64, config.data.tokens)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine.module.loss(engine(**inputs), mask, weight))
        ds.step(engine)
    state.update_average()


@pytest.mark.parametrize(
    "harm", [pytest.param("both lost", marks=pytest.mark.slow), "both damaged", "older than the shared one"]
)
def test_else_the_shared_one_is_taken(config, whole, cut, harm):
    if harm == "both lost":
        shutil.rmtree(cut / "disks")
    elif harm == "both damaged":
        for path in (cut / "disks").glob("*/run_*/step_*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    else:
        for path in (cut / "disks").glob("*/run_*/step_*"):
            if int(path.name.split("_")[1]) > 8:
                shutil.rmtree(path)
    log = finish(start(config, cut / "run", cut / "disks"))
    assert "resumed from" in log and "at step 8 (" in log
    assert same_end(cut / "run", whole)


def test_parts_of_two_starts_are_not_mixed(config, cut):
    """A part that another start of the training wrote at the same step."""
    for node, part in (("a", "rank_00000"), ("b", "rank_00001")):
        for path in cut.glob(f"disks/{node}/run_*/step_*"):
            for file in path.glob("*.copy.*"):
                file.unlink()
            record = path / f"{part}.json"
            if node == "b" and record.exists():  # the kill may have come before it was written
                record.write_text(json.dumps(json.loads(record.read_text()) | {"attempt": "0" * 8}))
    assert "at step 8 (" in finish(start(config, cut / "run", cut / "disks"))


def test_a_run_that_starts_anew_takes_nothing_of_the_former_one(config, whole, cut):
    shutil.rmtree(cut / "run")
    log = finish(start(config, cut / "run", cut / "disks"))
    assert "resumed" not in log and same_end(cut / "run", whole)
    assert local_steps(cut / "disks"), "another run's are not removed"


def test_one_rank_goes_on_with_what_two_nodes_wrote(config, cut):
    step = newest_whole_step(cut)
    log = finish(start(config, cut / "run", cut / "disks", nodes=("b",)))
    assert f"at step {step} (" in log and "one node, so without copies" in log
    assert metrics_of(cut / "run")[-1]["step"] == STEPS


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_other_stages_and_in_status(config, tmp_path, stage):
    more = ("--deepspeed.override.zero_optimization.stage", stage)
    whole = tmp_path / "whole"
    dit_ds("train", "--config", config, "--run_dir", whole, *more, ranks=2)
    cut = kill_after(config, tmp_path / "cut", *more)
    last = metrics_of(cut / "run", "local_save")[-1]
    assert status(cut / "run")["local_checkpoint"] == last["step"] and last["bytes"] > 0 and last["failures"] == 0
    assert any(x.startswith("on disks") and f"step {last['step']}" in x for x in lines(status(cut / "run")))
    shutil.rmtree(cut / "disks/a")
    step = max(local_steps(cut / "disks"))
    assert f"at step {step} (" in finish(start(config, cut / "run", cut / "disks", *more)) or step > last["step"]
    assert same_end(cut / "run", whole)


def test_a_full_local_disk_does_not_end_the_run(config, whole, tmp_path):
    """One node's disk is too small for one part: its copy on the other keeps each checkpoint whole."""
    (tmp_path / "disks/a").mkdir(parents=True)
    with small_disk(tmp_path / "disks/b", "100k"):
        log = finish(start(config, tmp_path / "run", tmp_path / "disks"))
    assert log.count("no space left while writing") == 1
    saves = metrics_of(tmp_path / "run", "local_save")
    assert all(x["whole"] for x in saves)
    assert same_end(tmp_path / "run", whole)


def test_disks_that_cannot_be_written_do_not_end_the_run_and_are_tried_again(config, whole, tmp_path):
    disks = tmp_path / "disks"
    disks.write_text("not a folder")
    ranks = start(config, tmp_path / "run", disks)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() or not metrics_of(tmp_path / "run", "local_save"):
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks), ranks[0].stderr.read()[-3000:]
        time.sleep(0.01)
    disks.unlink()
    log = finish(ranks)
    assert log.count("not saved to") == 1 and "cannot write" in log and "as before" in log
    saves = metrics_of(tmp_path / "run", "local_save")
    assert not saves[0]["whole"] and saves[-1]["whole"] and saves[-1]["failures"] >= 1
    assert same_end(tmp_path / "run", whole)
    steps = [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert steps == ["step_00000016", "step_00000024"]  # checkpoint.keep


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_a_part_that_is_gone_from_the_local_disk_costs_no_checkpoint(shards, world, tmp_path, monkeypatch, harm):
    """It is to be copied into the run's folder: damaged, the checkpoint is refused and can be saved anew; removed before it
    is opened, it is written from memory."""
    config = validate(tiny_config(shards, tmp_path / "run"))
    engine = ds.initialize(build_model(config), config, world)
    state = TrainingState(engine)
    state.make_states()
    (tmp_path / "run").mkdir()
    local = LocalSaver(config, world, state, tmp_path / "disk", new_run_id())
    saver = Saver(config, world, state, None, local)
    meta = {"step": 1, "frozen": "0" * 64, "progress": {"best_step": 0}, "engine": ds.counters(engine)}
    wait = LocalSaver.wait_for_own

    def harmed(self):
        part = wait(self)
        if harm == "removed":
            part.path.unlink()
        else:
            part.path.write_bytes(part.path.read_bytes()[:-8] + b"damaged.")
        return part

    monkeypatch.setattr(LocalSaver, "wait_for_own", harmed)
    saver.begin(meta)
    if harm == "damaged":
        with pytest.raises(LocalDiskFailed, match="is not what was written"):
            saver.commit()
        assert local.finish().whole and saver.copy_is_free
        saver.begin(meta, near=False)
    saver.commit()
    assert damages(tmp_path / "run/checkpoints/step_00000001") == []


@pytest.mark.slow
def test_batchnorm_goes_on_from_the_nodes_disks(config, tmp_path):
    """LAVT has running statistics."""
    more = ("--model.name", "lavt", "--model.size", "swin_t_tiny", "--data.resize", "stretch", "--train.ema_decay", "0")
    whole = tmp_path / "whole"
    dit_ds("train", "--config", config, "--run_dir", whole, *more, ranks=2)
    cut = kill_after(config, tmp_path / "cut", *more)
    for path in (cut / "disks").glob("a/run_*/step_*/rank_00000.safetensors"):
        path.unlink()  # the statistics are in the record of rank 0's part, and of its copy
    log = finish(start(config, cut / "run", cut / "disks", *more))
    assert "is on the nodes' disks" in log and same_end(cut / "run", whole)
    assert (cut / f"run/checkpoints/step_{STEPS:08d}/statistics.safetensors").exists()


def test_settings_that_cannot_be_met_are_one_line(config, tmp_path, monkeypatch):
    run = ["train", "--config", config, "--run_dir", tmp_path / "run"]
    line = refused(dit_ds(*run, "--checkpoint.local", "/scratch/$NOT_SET_HERE/x", check=None))
    assert "$NOT_SET_HERE, which is not set" in line
    line = refused(dit_ds(*run, "--checkpoint.local", tmp_path, "--checkpoint.asynchronous", "false", check=None))
    assert "checkpoint.asynchronous" in line


def test_doctor_looks_at_the_local_disk(config, tmp_path):
    def checks(folder: object) -> list:
        values = load_config(config)
        values.checkpoint.local = None if folder is None else str(folder)
        return list(local_disk(Context(config=values)))

    assert checks(None) == []
    good = checks(tmp_path / "new")[0]
    assert good.status == "ok" and "can be written" in good.found and not (tmp_path / "new").exists()
    for name in ("run_" + "a" * 32, "run_" + "b" * 32):
        (tmp_path / f"disk/{name}/step_00000001_0").mkdir(parents=True)
    (tmp_path / f"disk/{name}/step_00000001_0/rank_00000.safetensors").write_bytes(bytes(2**20))
    assert other_runs(tmp_path / "disk", "a" * 32) == (1, 2**20)
    assert "2 other runs' run_* take 0.00" in checks(tmp_path / "disk")[0].found
    with small_disk(tmp_path / "small", "1100k") as small:
        assert checks(small)[0].status == "fail" and "GiB free" in checks(small)[0].found


def test_copies_go_to_another_node():
    assert copy_holders({"a": [0, 1]}) == {}
    assert copy_holders({"a": [0, 1], "b": [2, 3], "c": [4]}) == {0: 2, 1: 3, 2: 4, 3: 4, 4: 0}
