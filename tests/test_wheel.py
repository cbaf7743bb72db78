"""The package as it is installed: built from the tree's files, put into a fresh environment, and run from an empty folder.

The environment sees the packages that dit-ds needs in the one that runs the tests; nothing is downloaded, and the clone can't
be imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.timeout(600)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def call(
    *command: object, cwd: Path, timeout: float = 300, check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DIT_DS_SLURM", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def build(source: Path, kind: str, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    done = call(sys.executable, "-c", BUILD, f"build_{kind}", out, cwd=source)
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree's files, as a clone has them."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """Built from a source distribution, as an index's users do who take that."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = build(tree, "sdist", folder)
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build(source, "wheel", folder / "wheel")


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """Of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")  # which then sees the others, but for the clone's own
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def dit_ds(bin_folder, tmp_path_factory):
    """Runs the installed `dit-ds` in one empty folder."""
    folder = tmp_path_factory.mktemp("work")

    def run(*args: object, **options) -> subprocess.CompletedProcess:
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return call(bin_folder / "dit-ds", *args, cwd=options.pop("cwd", folder), **offline, **options)

    run.folder = folder
    return run


def test_the_wheel_has_the_folders_of_the_tree_and_no_more(tree, wheel, tmp_path):
    """From a source distribution as from the tree itself, also where a former build is left."""
    (tree / "build/lib/dit_ds/installed/configs").mkdir(parents=True)
    (tree / "build/lib/dit_ds/installed/configs/gone.yaml").write_text("seed: 1")
    direct = build(tree, "wheel", tmp_path)
    names = [{n for n in zipfile.ZipFile(w).namelist() if "egg-info" not in n} for w in (wheel, direct)]
    assert names[0] == names[1]
    installed = {n.removeprefix("dit_ds/installed/") for n in names[0] if n.startswith("dit_ds/installed/")}
    wanted = {str(f.relative_to(tree)) for at in ("configs", "slurm") for f in (tree / at).rglob("*") if f.is_file()}
    assert installed == wanted
    assert {"dit_ds/paper/published.yaml", "dit_ds/pages/templates/app.html"} <= names[0]
    assert not any(n.startswith(("tests/", "benchmarks/", "configs/", "slurm/")) for n in names[0])


def test_the_wheel_says_its_licence_and_pythons(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert {f"{Path(metadata).parent}/licenses/{n}" for n in ("LICENSE", "NOTICE")} <= set(archive.namelist())
    assert "License-Expression: Apache-2.0\n" in text and "Author: dit-ds contributors\n" in text
    for minor in (11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}\n" in text


def test_the_clone_is_not_what_runs(bin_folder, dit_ds):
    code = "import dit_ds; from dit_ds.config import installed_files as f; print(dit_ds.__file__, f.installed_folder('configs'))"
    done = call(bin_folder / "python", "-c", code, cwd=dit_ds.folder)
    assert all(Path(p).is_relative_to(bin_folder.parent) for p in done.stdout.split())
    assert "COMMAND" in dit_ds("--help").stdout


def test_a_model_is_trained_and_compared_by_names_alone(dit_ds):
    dit_ds("data", "sample", "--out", "refer", "--images", "40")
    dit_ds("data", "shard", "--refer-root", "refer", "--images", "refer/images/train2014", "--out", "shards")
    small = ("--data.root", "shards", "--data.image_size", "64", "--text.layers", "1", "--train.batch_size", "8",
             "--deepspeed.override.train_micro_batch_size_per_gpu", "4", "--train.max_steps", "2")  # fmt: skip
    done = dit_ds("train", "--config", "sample", "--deepspeed.config", "zero1", *small, "--run_dir", "runs/a", "--json")
    assert json.loads(done.stdout)["step"] == 2
    assert json.loads(dit_ds("eval", "runs/a", "--json").stdout)["n"] > 0
    assert "runs/a" in dit_ds("compare", "runs/a", "--table", "1").stdout
    dit_ds("init", "x")
    done = dit_ds("train", "--config", "x/configs/sample.yaml", *small, "--run_dir", "runs/b", "--json")
    assert json.loads(done.stdout)["step"] == 2
    assert dit_ds("init", "x", check=False).returncode == 2


def test_the_papers_rows_and_plans_need_no_clone(dit_ds, bin_folder):
    listed = json.loads(dit_ds("experiments", "--json").stdout)["experiments"]
    assert "table9_cascade" in {r["config"] for r in listed}
    code = "from dit_ds.paper.table8 import rows; print(len(rows('paper')), len(rows('all')))"
    rows_of_paper, rows = map(int, call(bin_folder / "python", "-c", code, cwd=dit_ds.folder).stdout.split())
    assert 0 < rows_of_paper < rows
    assert "--trials" in dit_ds("tune", "--help").stdout  # a search takes minutes
    refused = dit_ds("tune", "--config", "base", "--gpus", "7", check=False)  # after it has read all that it needs
    assert refused.returncode == 2 and "use 1, 2, 4, 8, 16, 32, 64 ranks" in refused.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_job_scripts_find_each_other_from_any_folder(dit_ds, bin_folder, tmp_path):
    """As a job does, whose script SLURM copied away, in a folder without slurm/; srun and scontrol are stand-ins."""
    dit_ds("init", tmp_path / "mine")
    spool, work = tmp_path / "spool", tmp_path / "work"
    for folder in (spool, work, tmp_path / "bin"):
        folder.mkdir()
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nprintf "%s\\n" "$*" >>"$NOTED"\n')
    (tmp_path / "bin/scontrol").write_text("#!/bin/bash\necho JobState=RUNNING\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    shutil.copy(tmp_path / "mine/slurm/train.sbatch", spool / "slurm_script")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "4",
           "SLURM_JOB_NODELIST": "n1", "MASTER_ADDR": "n1", "STAGE_DIR": "", "NOTED": str(tmp_path / "noted"),
           "PATH": f"{tmp_path}/bin:{bin_folder}:{os.environ['PATH']}"}  # fmt: skip
    line = f"source {tmp_path}/mine/slurm/cluster.env && exec bash {spool}/slurm_script --config base --run_dir runs/x"
    done = call("bash", "-c", line, cwd=work, **job)
    noted = (tmp_path / "noted").read_text().splitlines()
    assert "doctor --config base" in noted[0] and "train --resume --config base --run_dir runs/x" in noted[-1], (
        done.stdout
    )
    assert (work / "runs/slurm").is_dir()
    refused = call("bash", spool / "slurm_script", cwd=work, check=False, **job)
    assert refused.returncode == 2 and "no slurm/ here: source its cluster.env" in refused.stderr
