"""The job scripts with containers and caches, by a stand-in `srun` that notes what it is given; no cluster is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from test_slurm_common import JOB

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
SRUN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["NOTED"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in 'show job') echo JobId=7 JobState=RUNNING ;; 'show hostnames') echo "$3" ;; esac
"""


def steps(tmp_path: Path, script: str, *arguments: str, **settings: str) -> list[list[str]]:
    """What srun is given by a job script under these settings; its own `-n`s and the command."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    values = {"LOG_DIR": f"{tmp_path}/logs", "PYTHON": "python3"} | settings
    site = tmp_path / "site.env"
    site.write_text("source slurm/cluster.env\n" + "".join(f"{k}={v}\n" for k, v in values.items()))
    env = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SBATCH"))} | JOB
    env |= {"CLUSTER_ENV": str(site), "NOTED": str(tmp_path / "noted"), "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", f"slurm/{script}.sbatch", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]


@pytest.mark.parametrize("script", ["train", "eval"])
def test_every_command_runs_in_the_container(tmp_path, script):
    inside = ["apptainer", "exec", "--nv", "--bind", "/a b,/scratch", "x.sif"]
    container = "(apptainer exec --nv --bind '/a b,/scratch' x.sif)"
    arguments = ["runs/x", "--split", "val"] if script == "eval" else ["--config", "a.yaml", "--run_dir", "runs/a b"]
    noted = steps(
        tmp_path, script, *arguments, CONTAINER=container, STAGE_DIR="/scratch/x", SRUN_OPTIONS="(--mpi=none)"
    )
    assert len(noted) == {"train": 3, "eval": 2}[script]  # doctor, the shards' copy, the training; doctor, eval
    for words in noted:
        at = words.index("apptainer")
        assert words[at : at + len(inside)] == inside and words[at + len(inside)] == "python3"
        assert words[0] == "--mpi=none" and all(w.startswith("--") for w in words[:at])
    assert noted[-1][-2:] == (["--data.root", "/scratch/x"] if script == "train" else ["--split", "val"])
    assert script == "eval" or "runs/a b" in noted[-1]


def test_the_containers_options_of_srun_come_before_the_command(tmp_path):
    options = '(--container-image="$PWD/x.sqsh" --container-mounts="$PWD,/scratch" --container-workdir="$PWD")'
    noted = steps(tmp_path, "train", "--config", "a.yaml", SRUN_OPTIONS=options)
    assert len(noted) == 2
    for words in noted:
        given = [
            f"--container-image={ROOT}/x.sqsh",
            f"--container-mounts={ROOT},/scratch",
            f"--container-workdir={ROOT}",
        ]
        assert words[:3] == given
        assert words.index("python3") > 3 and words[words.index("python3") + 1 :][:2] == ["-m", "dit_ds.cli"]


@pytest.mark.skipif(shutil.which("apptainer") is None, reason="no apptainer here")
def test_apptainer_takes_the_commands_options(tmp_path):
    done = subprocess.run(["apptainer", "exec", "--nv", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--bind" in done.stdout


def test_the_image_holds_what_it_installs():
    """What the Dockerfile copies is here, and it installs as `make setup` does."""
    text = (ROOT / "slurm/Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    assert {"Makefile", "requirements.lock", "pyproject.toml", "dit_ds"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert "\nARG BASE\nFROM ${BASE}\n" in text and "make setup VENV=" in text


def test_caches_are_on_the_nodes_own_disk_and_survive_a_restart(tmp_path):
    """The second start finds what the first compiled; a site's own variable wins."""
    site = tmp_path / "site.env"
    site.write_text(
        f"source slurm/cluster.env\nLOG_DIR={tmp_path}/logs\nPYTHON={sys.executable}\nCACHE_DIR={tmp_path}/cache\n"
    )
    env = {k: v for k, v in environment().items() if not k.startswith("SLURM")} | JOB
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env |= {"CLUSTER_ENV": str(site), "TORCHINDUCTOR_CACHE_DIR": "/mine"}
    module = tmp_path / "code/compiled.py"
    module.parent.mkdir()
    module.write_text("x = 1\n")
    show = 'echo "$TRITON_CACHE_DIR $TORCH_EXTENSIONS_DIR $TORCHINDUCTOR_CACHE_DIR"'
    code = f"import sys; sys.path.insert(0, '{module.parent}'); import compiled; print(compiled.__cached__)"
    command = f'source slurm/common.sh >/dev/null; {show}; "$PYTHON" -c "{code}"'
    times = []
    for _ in range(2):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        folders, compiled = done.stdout.split("\n")[:2]
        assert folders == f"{tmp_path}/cache/triton {tmp_path}/cache/torch_extensions /mine", done.stderr
        assert compiled.startswith(f"{tmp_path}/cache/python/") and not (module.parent / "__pycache__").exists()
        times.append(Path(compiled).stat().st_mtime_ns)
    assert times[0] == times[1]
