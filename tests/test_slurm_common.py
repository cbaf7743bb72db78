"""What the job scripts' functions make of SLURM's variables and of a site's file; no cluster is needed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, environment
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "64",
       "SLURM_JOB_NODELIST": "n1", "MASTER_ADDR": "n1"}  # fmt: skip
SITE = 'LOG_DIR="{logs}"\nPYTHON=python\nCONTAINER=()\nSRUN_OPTIONS=()\n\nTASKS_PER_NODE={tasks}\nCPU_BIND=\nMAX_REQUEUES=20\n'


def sourced(folder: Path, then: str, tasks: str = "", ends: str = "\n", **job: str) -> subprocess.CompletedProcess:
    """What bash does `then` after it has read common.sh, as in a job."""
    site = folder / "site.env"
    site.write_bytes(SITE.format(logs=folder / "logs", tasks=tasks).replace("\n", ends).encode())
    env = {k: v for k, v in environment().items() if not k.startswith("SLURM")} | JOB | {"CLUSTER_ENV": str(site)} | job
    command = ["bash", "-c", f"source slurm/common.sh\n{then}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=30)


FORMS = {
    "4": 4, "a100:4": 4, "gpu:4": 4, "gpu:a100:4": 4, "a100:4(S:0-1)": 4, "gpu:a100:4(IDX:0-3)": 4, "h100:2,v100:2": 4,
    "gpu:h100:2(S:0),gpu:v100:2(S:1)": 4, "gpu:a100:2(IDX:0,2),gpu:v100:1(IDX:1)": 3, "gpu": 1, "a100": 1, "gpu:a100": 1,
    "gpu:4,nvme:1": 4, "nvme:1,gpu:h100:8": 8, "gres:gpu:4": 4, "08": 8, "nvidia_h100_80gb_hbm3:8": 8, "1g.10gb:7": 7,
    "h100:4, v100:2": 6, "0": 1, "gpu:0": 1, "": 1, "(null)": 1,
}  # fmt: skip


def test_gpus_are_counted_in_all_of_slurms_forms(tmp_path):
    loop = "\n".join(f"echo $(gpu_count '{form}')" for form in FORMS)
    done = sourced(tmp_path, loop)
    counted = [int(line or 1) for line in done.stdout.splitlines()[-len(FORMS) :]]
    assert dict(zip(FORMS, counted)) == FORMS and done.stderr == ""


@pytest.mark.parametrize(
    ("job", "tasks", "cores"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:2,v100:2", "SLURM_GPUS_ON_NODE": "8"}, 4, 16),
        ({"SLURM_GPUS_PER_NODE": "a100:4(S:0-1)"}, 4, 16),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, 8),
        ({"SLURM_GPUS_PER_NODE": "", "SLURM_GPUS_ON_NODE": ""}, 1, 64),
        ({}, 1, 64),
    ],
)
def test_a_job_starts_a_task_for_each_gpu(tmp_path, job, tasks, cores):
    done = sourced(tmp_path, 'echo "$TASKS_PER_NODE $cpus_per_task"', **job)
    assert done.stdout.splitlines()[-1] == f"{tasks} {cores}", done.stderr


GROUP = st.tuples(st.sampled_from(["", "gpu:", "gpu:a100:", "v100:"]), st.integers(1, 16), st.sampled_from(["", "(S:0-1)", "(IDX:0,3)"]))  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=st.lists(GROUP, min_size=1, max_size=3))
@example(groups=[("h100:", 2, ""), ("v100:", 2, "")])
def test_counts_add_up(groups, tmp_path):
    if len({name.startswith("gpu") for name, *_ in groups}) > 1:
        return  # SLURM writes gpu: before all of them or none
    text = ",".join(f"{name}{n}{where}" for name, n, where in groups)
    assert sourced(tmp_path, f"gpu_count '{text}'").stdout.splitlines()[-1] == str(sum(n for _, n, _ in groups))


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "11"}


@pytest.mark.parametrize(
    ("given", "job", "own"),
    [
        (["--task=1", "a", "--task=11", "two words", "*", "$HOME", "--x=--task=1", "--task=12", "b"], ARRAY,
         ["two words", "*", "$HOME", "--x=--task=1"]),
        (["--refer-root", "r"], ARRAY, ["--refer-root", "r"]),  # an array whose tasks have the same arguments
        (["--config", "c"], {}, ["--config", "c"]),
        (["--task=1", "a"], ARRAY, None),
        ([], ARRAY, []),
    ],
)  # fmt: skip
def test_a_task_of_an_array_takes_its_own_arguments(tmp_path, given, job, own):
    done = sourced(
        tmp_path, f'set -- {shlex.join(given)}\nsource slurm/common.sh\nprintf \'[%s]\' "$this_job" "$@"', **job
    )
    if own is None:
        assert done.returncode == 2 and "no --task=11, which --array asks for" in done.stderr
    else:
        assert done.stdout.splitlines()[-1] == "".join(f"[{w}]" for w in ["7_11" if job else "7", *own])


def test_windows_line_ends_of_a_site_are_passed_over(tmp_path):
    done = sourced(tmp_path, 'echo "[$LOG_DIR] [$PYTHON] $TASKS_PER_NODE"', tasks="2", ends="\r\n")
    assert done.stdout.splitlines()[-1] == f"[{tmp_path / 'logs'}] [python] 2"
    assert done.stderr.count("\n") == 1 and "has Windows line ends" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if "\r" in p.name] == []


@pytest.mark.parametrize("name", ["a/b", "../../up", "two words", "100%t", "x;touch $HOME", "é*?", "-n", "back\\slash"])
def test_a_jobs_name_is_one_folder_of_the_logs(tmp_path, name):
    done = sourced(tmp_path, 'echo "$rank_logs"', SLURM_JOB_NAME=name)
    logs = Path(done.stdout.splitlines()[-1])
    assert logs.is_dir() and logs.parent == tmp_path / "logs" and logs.name.endswith("-7")
    assert not set("%\\ */") & set(logs.name)


@pytest.mark.parametrize("tasks", ["many", "0", "-1", "2.5"])
def test_a_wrong_number_of_tasks_is_one_line(tmp_path, tasks):
    done = sourced(tmp_path, "echo went on", tasks=tasks)
    assert done.returncode == 2 and "went on" not in done.stdout
    assert done.stderr.count("\n") == 1 and "is not a number from 1 on" in done.stderr


def test_a_missing_site_is_one_line(tmp_path):
    done = sourced(tmp_path, "echo went on", CLUSTER_ENV=str(tmp_path / "none.env"))
    assert done.returncode == 2 and "cannot read" in done.stderr and "went on" not in done.stdout
