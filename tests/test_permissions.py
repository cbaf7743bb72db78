"""Files follow the umask, and one that may not be read is never called damaged."""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import dit_ds, tiny_config

from dit_ds.checkpointing.integrity import damages
from dit_ds.checkpointing.reader import Reader, newest_whole, read_meta
from dit_ds.checkpointing.weights import save_tensors
from dit_ds.errors import UserError

NOBODY = 65534


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of one step, made under umask 022, and its exported file."""
    folder = tmp_path_factory.mktemp("permissions")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny_config(shards, folder / "run")))
    dit_ds("train", "--config", folder / "c.yaml", "--train.max_steps", "1", "--eval.every_epochs", "0")
    dit_ds("export", folder / "run", "--out", folder / "model.safetensors")
    return folder


@pytest.fixture
def public(trained) -> Iterator[Path]:
    """A copy of the folder where other users may go, as they may not into pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="dit_ds_"))
    folder.chmod(0o755)
    shutil.copytree(trained, folder / "shared")
    (folder / "shared").chmod(0o755)
    yield folder / "shared"
    shutil.rmtree(folder)


def as_another_user(call: Callable[[], object]) -> str:
    """What a call says, made by a user who is not root: "done", or its error's type and text."""
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            call()
            said = "done"
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        os.write(start, said.encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end, "rb") as f:
        if not select.select([f], [], [], 60)[0]:
            os.kill(child, signal.SIGKILL)
        said = f.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_tensors_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask


def test_all_that_a_run_writes_follows_the_umask(trained):
    before = os.umask(0)
    os.umask(before)
    files = [p for p in trained.rglob("*") if p.is_file()]
    assert {"frozen.safetensors", "model.safetensors", "metrics.jsonl", "meta.json"} <= {p.name for p in files}
    assert {str(p): oct(p.stat().st_mode) for p in files if stat.S_IMODE(p.stat().st_mode) != 0o666 & ~before} == {}


def test_another_user_reads_a_shared_run(public):
    (checkpoint,) = (public / "run/checkpoints").glob("step_*")
    assert as_another_user(lambda: [damages(checkpoint), Reader(checkpoint).whole("master")]) == "done"


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "frozen.safetensors", "meta.json", "manifest.json", "."])
def test_what_may_not_be_read_is_not_damaged(public, name):
    (checkpoint,) = (public / "run/checkpoints").glob("step_*")
    (checkpoint / name).resolve().chmod(0)
    said = as_another_user(lambda: damages(checkpoint))
    assert said.startswith(("UserError: cannot read", "PermissionError")), said
    assert "ermission denied" in said and "damaged" not in said, said


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "frozen.safetensors", "manifest.json", "step_00000001"])
def test_a_resume_does_not_pass_over_what_may_not_be_read(trained, world, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != name)
    with pytest.raises(UserError, match="^cannot read .*permission denied"):
        newest_whole(trained / "run", world)


def test_an_exported_file_that_may_not_be_read(public):
    (public / "model.safetensors").chmod(0)
    said = as_another_user(lambda: read_meta(public / "model.safetensors"))
    assert said.startswith("UserError: cannot read") and "permission denied" in said and "damaged" not in said


def test_what_the_system_denies_is_one_line(monkeypatch, refusal):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/run")

    monkeypatch.setattr("dit_ds.cli.predict._eval", denied)
    monkeypatch.setattr("dit_ds.cli.weights._export", denied)
    assert "/secret/run (permission denied)" in refusal("export", "/secret/run", "--out", "x")
