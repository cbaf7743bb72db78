"""Run folders, checkpoints, exported files and shards from strangers: data, never a command, never outside their folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import dit_ds, refused, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds.checkpointing.integrity import damages
from dit_ds.checkpointing.reader import Reader
from dit_ds.data.shards.manifest import load_manifest, write_manifest
from dit_ds.data.shards.storage import file_of, locate, read_file
from dit_ds.errors import UserError
from dit_ds.files import is_url, sha256_of
from dit_ds.training.run_lock import lock_run


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A folder with a run of one step, its configuration, and its exported file."""
    folder = tmp_path_factory.mktemp("strangers")
    config = tiny_config(shards, folder / "run")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", folder / "c.yaml", "--train.max_steps", "1", "--eval.every_epochs", "0")
    return folder


def forged(trained: Path, folder: Path, root: str) -> Path:
    """A copy of the run, whole by its manifest, whose checkpoint says that its shards are at `root`."""
    run = folder / "run"
    shutil.copytree(trained / "run", run)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["config"]["data"]["root"] = root
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["meta.json"] = {
        "bytes": (checkpoint / "meta.json").stat().st_size,
        "sha256": sha256_of(checkpoint / "meta.json"),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = root
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


ROOTS = ("pipe:touch {mark}; cat {shards}/{{}}", "PIPE:touch {mark};cat {shards}/{{}}", "s3://$(touch {mark})/x",
         "http://127.0.0.1:9/`touch {mark}`")  # fmt: skip


@pytest.mark.parametrize("root", ROOTS)
def test_no_command_or_url_of_a_checkpoint_is_followed(trained, shards, tmp_path, refusal, root):
    mark = tmp_path / "mark"
    run = forged(trained, tmp_path, root.format(mark=mark, shards=shards))
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    exported = tmp_path / "model.safetensors"
    dit_ds("export", run, "--out", exported)
    out = tmp_path / "picture.png"
    for path in (run, checkpoint, exported):
        for command in (["eval", path], ["sheet", path, "--out", out], ["grid", path, "--out", out]):
            line = refusal(*command)
            assert "give the shards with --data-root" in line and "touch" in line
    assert not mark.exists() and not out.exists()
    assert json.loads(dit_ds("eval", run, "--data-root", shards, "--json").stdout)["n"] > 0


def test_a_root_that_the_user_gives_is_followed(trained, shards, tmp_path):
    mark = tmp_path / "mark"
    here = dit_ds("eval", trained / "run", "--json").stdout
    piped = dit_ds("eval", trained / "run", "--json", "--data-root", f"pipe:touch {mark}; cat {shards}/{{}}").stdout
    assert mark.exists() and piped == here


NAMES = st.one_of(
    st.sampled_from(
        ["", ".", "..", "../x", "/etc/passwd", "a/b", "x\0", "$(touch x)", "a b", "a;b", "a'b", "`a`", "{}"]
    ),
    st.text(max_size=8),
)


@settings(max_examples=300, deadline=None)
@given(NAMES)
def test_names_stay_in_their_folder_and_are_no_part_of_a_command(name):
    for make in (locate, file_of):
        try:
            path = make(Path("/data/set"), name)
        except UserError as e:
            assert len(str(e).splitlines()) == 1
        else:
            assert isinstance(path, Path) and path.parent == Path("/data/set") and path.name == name
        for root in ("pipe:cat /data/set/{}", "pipe:cat /data/set", "s3://bucket", "https://host/set"):
            try:
                url = str(make(root, name))
            except UserError:
                continue
            assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+,=@-")
            assert name in url and name not in ("", ".", "..")


def test_a_folder_called_like_a_command_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("PIPE:touch mark;cat")
    assert is_url(folder)  # as webdataset takes it: nothing local is called so
    (tmp_path / "data:x").mkdir()
    (tmp_path / "data:x/file").write_bytes(b"here")
    assert read_file(Path("data:x"), "file") == b"here"


@pytest.mark.parametrize("name", ["../../x.tar", "/etc/hostname", "a/b.tar", "..", ""])
def test_a_manifest_that_leads_out_of_its_folder(shards, tmp_path, name):
    folder = tmp_path / "refcoco/unc"
    shutil.copytree(shards / "refcoco/unc", folder)
    whole = load_manifest(folder)
    for forge in ("shard", "split"):
        manifest = json.loads(json.dumps(whole))
        if forge == "shard":
            manifest["splits"]["train"]["shards"][0]["name"] = name
        else:
            manifest["splits"][name] = manifest["splits"].pop("val")
        write_manifest(folder / "manifest.json", manifest)
        with pytest.raises(UserError, match="not a name within its folder"):
            load_manifest(folder)


@pytest.mark.parametrize("name", ["rank_/../../../secret", "/etc/hostname", "../meta.json", ""])
def test_a_checkpoint_that_leads_out_of_its_folder(trained, tmp_path, name):
    run = forged(trained, tmp_path, "data_shards")
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "not a name within its folder" in damages(checkpoint)[0]
    with pytest.raises(UserError, match="not a name within its folder"):
        Reader(checkpoint)


@pytest.mark.parametrize("way", ["a link", "a pipe"])
def test_a_resumed_run_writes_to_its_own_files(trained, tmp_path, world, way):
    """A run's folder that came with a link would have its lines appended to the file that the link names."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    for n, name in enumerate(
        ["log.txt", "metrics.jsonl", "metrics.jsonl.superseded", "run.lock", "config.yaml", "samples/rank_00000.jsonl"]
    ):
        run = tmp_path / str(n)
        (run / "samples").mkdir(parents=True)
        (run / "checkpoints").symlink_to(trained / "run/checkpoints")  # a folder may be elsewhere
        lock_run(run, world).close()
        if way == "a link":
            (run / name).symlink_to(victim)
        else:
            os.mkfifo(run / name)
        with pytest.raises(UserError, match=f"{re.escape(str(run / name))} is a link, a pipe or a device"):
            lock_run(run, world)
    if way == "a link":  # the command takes the lock before it writes
        shutil.copytree(trained / "run", tmp_path / "run")
        (tmp_path / "run/log.txt").unlink()
        (tmp_path / "run/log.txt").symlink_to(victim)
        resume = [
            "train",
            "--config",
            trained / "c.yaml",
            "--run_dir",
            tmp_path / "run",
            "--train.max_steps",
            "2",
            "--resume",
        ]
        assert "log.txt is a link" in refused(dit_ds(*resume, check=None))
    assert victim.read_text() == "as it was"


@pytest.mark.parametrize("name", ["meta.json", "manifest.json", "rank_00000.safetensors", "frozen.safetensors"])
def test_a_pipe_or_a_device_in_a_checkpoint_is_not_read(trained, tmp_path, refusal, name):
    """Reading it might never end."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert f"{checkpoint / name} is a pipe or a device" in refusal("eval", run)
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("/dev/zero")
    assert f"{checkpoint / name} is a pipe or a device" in refusal(
        "export", run, "--out", tmp_path / "model.safetensors"
    )
