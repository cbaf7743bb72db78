"""slurm/stage.py: after a restart shards are taken as they lie on the node's disk, and copied again where they differ."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def stage():
    spec = importlib.util.spec_from_file_location("stage", ROOT / "slurm/stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stage


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def source(shards, tmp_path) -> Path:
    return shutil.copytree(shards / "refcoco/unc", tmp_path / "source")


def test_what_is_there_is_not_copied_again(stage, source, tmp_path):
    count = len(list(source.iterdir()))
    assert stage(source, tmp_path / "node") == (count, count)
    inodes = {f.name: f.stat().st_ino for f in (tmp_path / "node").iterdir()}
    assert stage(source, tmp_path / "node") == (0, count)
    assert {f.name: f.stat().st_ino for f in (tmp_path / "node").iterdir()} == inodes
    assert contents(tmp_path / "node") == contents(source)


@pytest.mark.parametrize("harm", ["cut short", "same size, other time", "gone", "replaced at the source"])
def test_what_differs_is(stage, source, tmp_path, harm):
    node = tmp_path / "node"
    stage(source, node)
    name = sorted(f.name for f in source.glob("*.tar"))[0]
    data = (source / name).read_bytes()
    if harm == "cut short":
        (node / name).write_bytes(data[:-512])
        os.utime(node / name, ns=(0, (source / name).stat().st_mtime_ns))
    elif harm == "gone":
        (node / name).unlink()
    else:
        changed = node / name if harm.startswith("same") else source / name
        changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(changed, (0, 1_000_000_000))
    assert stage(source, node)[0] == 1
    assert contents(node) == contents(source)


def test_a_copy_that_ends_early_leaves_no_manifest(stage, source, tmp_path, monkeypatch):
    """Without it nothing takes the folder for a set; the next call copies what is missing."""
    copy, copied = shutil.copy2, []

    def full_disk(file: Path, to: Path) -> None:
        if len(copied) == 1:
            raise OSError(28, "No space left on device")
        copied.append(copy(file, to))

    monkeypatch.setattr(shutil, "copy2", full_disk)
    with pytest.raises(OSError, match="No space"):
        stage(source, tmp_path / "node")
    assert len(contents(tmp_path / "node")) == 1 and not (tmp_path / "node/manifest.json").exists()
    monkeypatch.setattr(shutil, "copy2", copy)
    count = len(list(source.iterdir()))
    assert stage(source, tmp_path / "node") == (count - 1, count)
