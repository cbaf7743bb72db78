"""dit-ds doctor: what it finds when all is well, and that each thing that is wrong is named with its remedy, in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, dit_ds, environment, small_disk, tiny_config
from warm_ranks import WarmProcess, output_files

from dit_ds.config.load import validate
from dit_ds.distributed import free_port
from dit_ds.doctor import collective, configured, node
from dit_ds.doctor.check import Check, Context, run_checks
from dit_ds.doctor.rendezvous import Rendezvous, ranks_text
from dit_ds.doctor.report import compare, merge
from dit_ds.errors import UserError


@pytest.fixture
def config(shards, tmp_path) -> dict:
    return tiny_config(shards, tmp_path / "run")


@pytest.fixture
def meeting_place(monkeypatch) -> int:
    """MASTER_ADDR and a free MASTER_PORT, which is returned."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def start(rank: int, world_size: int, port: int, address: str = "127.0.0.1", wait: int = 3) -> WarmProcess:
    """One rank of a doctor that waits so many seconds for the others."""
    world = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    env = environment() | {k: str(v) for k, v in world.items()}
    return WarmProcess(["dit-ds", "doctor", "--json", "--timeout", str(wait)], env, ROOT, output_files())


def finish(process: WarmProcess) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, out, err


def named(result: dict, name: str) -> dict:
    (check,) = [c for c in result["checks"] if c["name"] == name]
    return check


def assert_schema(result: dict) -> None:
    assert set(result) == {"ok", "world_size", "checks"}
    for check in result["checks"]:
        assert {"name", "status", "found", "remedy"} <= set(check) <= {"name", "status", "found", "remedy", "ranks"}
        assert check["status"] in ("ok", "warn", "fail") and check["found"]
        assert bool(check["remedy"]) == (check["status"] != "ok"), check
    assert result["ok"] == all(c["status"] != "fail" for c in result["checks"])


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_all_is_well(config_file, ranks):
    result = json.loads(dit_ds("doctor", "--json", "--config", config_file, ranks=ranks, real=True).stdout)
    assert_schema(result)
    assert result["ok"] and result["world_size"] == ranks
    expected = {"launch", "versions", "gpu", "attention", "fused adam", "bf16", "deepspeed", "jit lock", "cores", "memory", "shared memory", "temporary", "configuration", "shards", "text encoder",
                "sam checkpoint", "run folder", "bandwidth", "node speed", "zero step", "rendezvous", "master address"}  # fmt: skip
    names = {c["name"] for c in result["checks"]}
    assert expected <= names and names - expected <= {"host name", "slow node"}
    assert named(result, "rendezvous")["found"].startswith(f"{ranks} of {ranks} ranks met")
    assert ("GB/s by" in named(result, "bandwidth")["found"]) == (ranks == 2)


def test_what_is_wrong_with_a_configuration_is_named_and_nothing_else_stops(config_file, tmp_path):
    wrong = ["--data.root", tmp_path / "nowhere", "--model.checkpoint", tmp_path / "no.pth",
             "--model.attention", "sdpa_flash" if not _cuda() else "chunked", "--train.batch_size", "6"]  # fmt: skip
    (tmp_path / "extensions/async_io").mkdir(parents=True)
    lock = tmp_path / "extensions/async_io/lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    done = subprocess.run(
        [sys.executable, "-m", "dit_ds.cli", "doctor", "--config", config_file, *map(str, wrong)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    failed = {line[6:21].strip(): line for line in done.stdout.splitlines() if line.startswith("fail")}
    assert f"rm {lock}" in failed.pop("jit lock")
    assert "nowhere" in failed["shards"] and "dit-ds data shard" in failed.pop("shards")
    assert "no.pth" in failed.pop("sam checkpoint")
    assert "micro-batches that divide" in failed.pop("configuration")
    if not _cuda():
        assert "set model.attention auto" in failed.pop("attention")
    assert not failed
    assert "ok    fused adam" in done.stdout and done.stdout.splitlines()[-1].startswith("NOT ok")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.fast
def test_a_request_that_is_wrong_is_one_line():
    done = dit_ds("doctor", "--config", "nowhere.yaml", check=2)
    assert "nowhere.yaml" in done.stderr and len(done.stderr.splitlines()) == 1


# --- meeting


def test_a_rank_that_never_comes_is_named_in_time(meeting_place):
    began = time.monotonic()
    status, out, _ = finish(start(0, 3, meeting_place))
    assert time.monotonic() - began < 60
    result = json.loads(out)
    assert_schema(result)
    assert status == 1 and "ranks 1-2 did not come within 3 s" in named(result, "rendezvous")["found"]
    assert named(result, "fused adam")["status"] == "ok"  # the rest is reported


def test_a_rank_that_cannot_reach_rank_0_ends_with_the_reason(meeting_place):
    status, out, err = finish(start(1, 2, meeting_place))
    assert status == 1 and not out and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "rendezvous" in line]
    assert f"127.0.0.1:{meeting_place}" in line and "nothing listens" in line and "->" in line


def test_two_ranks_without_a_launcher_meet_and_leave_the_port_free(meeting_place):
    both = [start(r, 2, meeting_place, wait=40) for r in range(2)]
    (status, out, _), (other, nothing, _) = (finish(p) for p in both)
    assert status == other == 0 and json.loads(out)["ok"] and not nothing
    Rendezvous(0, 1, 5).close()  # where the training will meet next


def test_a_port_that_is_taken_fails_with_another_one(meeting_place):
    with socket.socket() as s:
        s.bind(("127.0.0.1", meeting_place))
        s.listen()
        status, out, _ = finish(start(0, 2, meeting_place))
    check = named(json.loads(out), "rendezvous")
    assert status == 1 and check["status"] == "fail" and f"MASTER_PORT {meeting_place}" in check["found"]
    assert check["remedy"].startswith("export MASTER_PORT=") and str(meeting_place) not in check["remedy"]


@pytest.mark.fast
def test_a_master_that_does_not_resolve(meeting_place):
    status, out, _ = finish(start(0, 2, meeting_place, "no-such-host.invalid"))
    check = named(json.loads(out), "master address")
    assert status == 1 and check["status"] == "fail" and "no-such-host.invalid does not resolve" in check["found"]


def test_a_stranger_on_the_port_is_not_taken_for_rank_0(meeting_place):
    with socket.socket() as s:
        s.bind(("127.0.0.1", meeting_place))
        s.listen()
        with pytest.raises(UserError, match="not as the store of rank 0"):
            Rendezvous(1, 2, 1)


def test_a_rank_that_came_and_died_is_named(meeting_place):
    first = Rendezvous(0, 2, 2)
    Rendezvous(1, 2, 2)
    found, late = first.collect("own", "fine", 0.5)
    assert found == {0: "fine"}
    assert [(c.status, "rank 1 came, but" in c.found) for c in late] == [("fail", True)]


def test_loopback_addresses_fail_on_several_nodes_only(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    statuses = {}
    for nodes in ("1", "2"):
        monkeypatch.setenv("SLURM_NNODES", nodes)
        (check,) = [c for c in node.names(Context(0, 2)) if c.name == "master address"]
        statuses[nodes] = check.status
    assert statuses == {"1": "ok", "2": "fail"}


def test_a_batch_shell_is_not_a_step(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert [c.status for c in node.launch(Context(0, 4))] == ["fail"]
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert [c.status for c in node.launch(Context(0, 4))] == ["ok"]


# --- checks


def test_a_check_that_raises_or_hangs_stops_no_other():
    never = threading.Event()

    def breaks(c):
        yield Check("half", "ok", "done")
        raise KeyError("here")

    def hangs(c):
        never.wait(20)
        yield Check("hangs", "ok", "")

    def works(c):
        yield Check("works", "ok", "")

    found = run_checks([breaks, works, hangs, works], Context(), 0.5)
    never.set()
    assert [(c.name, c.status) for c in found] == [
        ("half", "ok"), ("breaks", "fail"), ("works", "ok"), ("hangs", "fail"), ("works", "fail"),
    ]  # fmt: skip
    assert "KeyError" in found[1].found and "did not finish" in found[3].found and "not run" in found[4].found


def test_a_young_lock_may_belong_to_a_build(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [c.status for c in node.jit_locks(Context())] == ["ok"]
    (tmp_path / "py311_cu128/op").mkdir(parents=True)
    (tmp_path / "py311_cu128/op/lock").touch()
    (check,) = node.jit_locks(Context())
    assert check.status == "warn" and "py311_cu128/op/lock" in check.found
    assert "no process of yours builds there" in check.found


def test_an_old_lock_whose_build_runs_is_not_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder, elsewhere = tmp_path / "op", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - 3600,) * 2)
    (tmp_path / "nvcc").symlink_to("/bin/sleep")
    for where, status in ((elsewhere, "fail"), (folder, "warn")):
        with subprocess.Popen([str(tmp_path / "nvcc"), "20"], cwd=where) as process:
            try:
                time.sleep(0.2)
                assert [c.status for c in node.jit_locks(Context())] == [status]
            finally:
                process.kill()


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(node, "usable_cores", lambda: 8)
    for name in ("SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for threads, warned in (("2", False), ("3", True), (None, False)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads or "")
        found = {c.name: c for c in node.launch(Context(0, 4))}
        assert ("threads" in found) == warned
        assert not warned or "3 for 2 cores a rank" in found["threads"].found


def test_more_loader_processes_than_cores(config, monkeypatch):
    monkeypatch.setattr(node, "usable_cores", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for workers, status in ((1, "ok"), (4, "warn")):
        config["data"]["workers"] = workers
        (check,) = node.cores(Context(config=validate(config)))
        assert check.status == status
    assert "--cpus-per-task=5" in check.remedy


def test_a_full_disk_is_one_line(config, tmp_path):
    with small_disk(tmp_path / "small", "2m") as small:
        config["run_dir"] = str(small / "run")
        c = Context(config=validate(config))
        (check,) = run_checks([configured.run_folder], c, 60)
        assert check.status == "fail" and "for 4 checkpoints" in check.found  # it can be written, and is too small
        (small / "full").write_bytes(bytes(2 << 20))
        (check,) = run_checks([configured.run_folder], c, 60)
        assert check.status == "fail" and "no space left" in check.found and "another folder" in check.remedy
        assert os.listdir(small) == ["full"]


def test_a_damaged_shard_and_a_damaged_checkpoint(config, shards, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
    config["data"]["root"] = str(copy)
    config["model"]["checkpoint"] = str(tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half of a download")
    c = Context(config=validate(config))
    assert [f.status for f in run_checks([configured.shards], c, 60)] == ["ok"]
    tars, whole = sorted(copy.rglob("train-*.tar")), {}
    for tar in tars:
        whole[tar] = tar.read_bytes()
        tar.write_bytes(whole[tar].replace(b"\xff\xd8\xff", b"\0\0\0"))  # where each JPEG begins
    (check,) = run_checks([configured.shards], c, 60)
    assert check.status == "fail" and ".jpg is damaged" in check.found
    tar = tars[0]
    for other in tars:
        other.write_bytes(whole[other])
    tar.write_bytes(whole[tar][:-512])
    checks = run_checks([configured.shards, configured.sam_checkpoint], c, 60)
    assert [f.status for f in checks] == ["fail", "fail"]
    assert tar.name in checks[0].found and "half.pth" in checks[1].found


def test_a_text_encoder_that_is_not_on_the_machine(config, monkeypatch):
    config["text"]["name"] = "nobody/no-such-encoder"
    c = Context(config=validate(config))
    for offline, status in ((True, "fail"), (False, "warn")):
        c.facts["offline"] = offline
        monkeypatch.setattr(configured, "addresses", lambda host: ["192.0.2.1"])
        (check,) = run_checks([configured.text_encoder], c, 60)
        assert check.status == status and "nobody/no-such-encoder" in check.found


# --- between ranks


def test_differences_between_ranks():
    same = {"host": "a", "device": "cuda", "versions": {"python": "3.11", "torch": "2.13", "deepspeed": "0.19.8"}}
    facts = {r: same | {"gpu": f"uuid-{r}"} for r in range(3)}
    assert not list(compare(facts))
    facts[2] = facts[2] | {"versions": same["versions"] | {"torch": "2.12"}, "gpu": "uuid-0"}
    found = {c.name: c for c in compare(facts)}
    assert found["same versions"].found == "torch 2.13 on ranks 0-1; 2.12 on rank 2"
    assert "ranks 0, 2 share GPU uuid-0 on a" in found["gpu"].found
    facts[1] = facts[1] | {"device": "cpu"}
    assert "same devices" in {c.name for c in compare(facts)}


def test_lines_that_differ_in_numbers_only_are_merged():
    ranks = {r: [Check("memory", "ok", f"{10 + r} GiB free"), Check("x", "ok", "y")] for r in range(3)}
    ranks[1].append(Check("z", "fail", "broken", "mend it"))
    result = merge(ranks, 3)
    assert [c["found"] for c in result["checks"]] == ["10 to 12 GiB free", "y", "broken"]
    assert [c.get("ranks") for c in result["checks"]] == [None, None, [1]] and not result["ok"]
    assert ranks_text([5, 0, 1, 2]) == "ranks 0-2, 5" and ranks_text([3]) == "rank 3"


def test_a_slow_link_is_named_beside_its_like():
    hosts = ["a"] * 3 + ["b"] * 3
    even = list(collective.slowest_links([1.0, 0.1, 1.1, 1.0, 0.1, 1.0], hosts))
    assert [c.status for c in even] == ["ok"]  # those across nodes are slower than those inside, as they are
    slow = list(collective.slowest_links([1.0, 0.1, 1.1, 1.0, 0.1, 9.0], hosts))
    assert [c.status for c in slow] == ["warn"] and "rank 5 on b" in slow[0].found
