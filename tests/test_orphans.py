"""A command that is killed with SIGKILL leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment, tiny_config


def processes_of(session: int) -> dict[int, str]:
    """Processes of a session that live, by pid."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found[int(stat.parent.name)] = command
    return found


def arguments(name: str, shards: Path, refer_tree: Path, tmp_path: Path) -> list[object]:
    if name == "train":
        config = tiny_config(shards, tmp_path / "run")
        config["data"] |= {"workers": 2}
        config["train"] |= {"epochs": 1000}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        return ["train", "--config", tmp_path / "c.yaml"]
    return {
        "sample": ["data", "sample", tmp_path / "s", "--images", "20000", "--processes", "2"],
        "plan": ["memory", "plan", "--config", "configs/base.yaml", "--gpus", "8", "--text.random_init", "true"],
        "tune": ["tune", "--config", "configs/base.yaml", "--gpus", "8", "--text.random_init", "true"],
    }[name]


@pytest.mark.parametrize("name", ["sample", "train", "plan", pytest.param("tune", marks=pytest.mark.slow)])
def test_a_killed_command_leaves_no_process(name, shards, refer_tree, tmp_path):
    words = [str(a) for a in arguments(name, shards, refer_tree, tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "dit_ds.cli", *words], cwd=ROOT, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        end = time.monotonic() + 90
        while len(processes_of(process.pid)) < (4 if name in ("plan", "tune") else 3):  # the server's and the tracker's
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(0.5)
        process.kill()
        process.wait()
        end = time.monotonic() + 5
        while left := processes_of(process.pid):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.stderr.close()


def test_ctrl_c_waits_for_the_command_that_it_ends_too(tmp_path):
    """A launcher that is killed instead would leave its ranks, which then save nothing and train on."""
    (saves := tmp_path / "saves").write_text(
        f"#!/bin/bash\ntrap 'sleep 1; touch {tmp_path}/saved; exit 75' INT\ntouch {tmp_path}/started\n"
        "for i in {1..300}; do sleep 0.1; done\n"
    )
    saves.chmod(0o755)
    code = f"import sys; from dit_ds.cli import demo; sys.executable = '{saves}'; demo._run(['dit-ds', 'train'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=60) != 0 and (tmp_path / "saved").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
