"""SLURM jobs that wait for one another: written as `sbatch` lines, submitted, and not submitted twice."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dit_ds.config.installed_files import scripts_folder
from dit_ds.errors import UserError
from dit_ds.files import read_json, write_json

# of a job's variables, what sbatch must not hand on to the jobs that this one submits: SLURM's own, and the ranks' meeting point
_OF_THE_JOB = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|MASTER_(ADDR|PORT)$")
_TASK_ID = re.compile(r"\d+(_\d+)?")


class Task(NamedTuple):
    """A task of an array: what it does, as it is recorded, and arguments that it alone has."""

    key: str
    arguments: tuple[str, ...] = ()


@dataclass(eq=False)
class Job:
    """What one `sbatch` submits: a job, or an array of jobs.

    Attributes:
        name: in the queue.
        script: as train, of slurm/train.sbatch.
        key: what it does, as it is recorded; of an array each task has its own.
        tasks: an array's, by their numbers.
        arguments: of the script, for all tasks.
        options: of sbatch.
        after: what it waits for: a condition of `--dependency`, and a job that is submitted before it, or a number.
    """

    name: str
    script: str
    key: str = ""
    tasks: dict[int, Task] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    after: list[tuple[str, Job | str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = re.sub(r"[^A-Za-z0-9._+-]", "_", self.name)

    def keys(self) -> dict[str, str]:
        """What is recorded of it, and what of its number is that: `_3` for an array's task."""
        return {task.key: f"_{i}" for i, task in self.tasks.items()} or {self.key: ""}

    def before_dependency(self) -> list[str]:
        """The words of its line up to `--dependency`."""
        array = [f"--array={_ranges(self.tasks)}"] if self.tasks else []
        return ["sbatch", f"--job-name={self.name}", *self.options, *array]

    def dependency(self, number_of: Callable[[Job], str]) -> str:
        """`--dependency=...`, empty if it waits for nothing. A job that can no longer start is then removed."""
        conditions: dict[str, list[str]] = {}
        for condition, job in self.after:
            conditions.setdefault(condition, []).append(job if isinstance(job, str) else number_of(job))
        text = ",".join(":".join([c, *dict.fromkeys(numbers)]) for c, numbers in conditions.items())
        return f"--dependency={text}" if text else ""

    def after_dependency(self) -> list[str]:
        """The words of its line behind `--dependency`: each task's arguments follow `--task=NUMBER`, see slurm/common.sh."""
        own = [w for i, task in self.tasks.items() if task.arguments for w in (f"--task={i}", *task.arguments)]
        dies = ["--kill-on-invalid-dep=yes"] if self.after else []
        return [*dies, str(scripts_folder() / f"{self.script}.sbatch"), *own, *self.arguments]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in ascending order as sbatch's --array takes them: `0-3,7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def shell_line(job: Job) -> str:
    """The job's `sbatch` as a line to paste into a shell, after the lines of the jobs that it waits for.

    Their numbers, which are not known yet, the line itself asks SLURM for, by their names.

    Raises:
        UserError: a word of it has a line break.
    """
    dependency = job.dependency(_newest_of_name)
    if "$(" in dependency:
        dependency = f'"{dependency}"'
    words = [shlex.join(job.before_dependency()), dependency, shlex.join(job.after_dependency())]
    line = " ".join(filter(None, words))
    if "\n" in line:
        raise UserError(f"an argument of {job.name} has a line break in it: choose another name")
    return line


def _newest_of_name(job: Job) -> str:
    return f"$(squeue --me -h -t all -o %F -n {job.name} | sort -n | tail -n 1)"


class Record:
    """What was submitted for the runs in a folder: `submitted.json` there has each thing's job, as `100_3`.

    Args:
        folder: of the runs.
    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder / "submitted.json"
        self.jobs: dict[str, str] = read_json(self.path, "record of jobs") if self.path.exists() else {}
        texts = isinstance(self.jobs, dict) and all(isinstance(j, str) for j in self.jobs.values())
        if not texts or not all(_TASK_ID.fullmatch(j) for j in self.jobs.values()):
            raise UserError(f"{self.path} is no record of jobs: remove it, once none of these runs is in the queue")

    def drop_ended(self) -> None:
        """Forget the jobs that are neither queued nor running.

        Raises:
            UserError: SLURM does not answer.
        """
        if self.jobs:
            queued = set(_slurm("squeue", "-h", "-r", "-o", "%i").split())
            self.jobs = {key: job for key, job in self.jobs.items() if job in queued}

    def add(self, job: Job, number: str) -> None:
        """Record a job that was submitted."""
        self.jobs |= {key: number + suffix for key, suffix in job.keys().items()}
        write_json(self.path, self.jobs)


def submit(jobs: list[Job], record: Record) -> list[str]:
    """Submit the jobs in order, each recorded at once; return their numbers.

    Raises:
        UserError: there is no SLURM here, or it refuses one.
    """
    numbers: dict[Job, str] = {}
    for job in jobs:
        dependency = job.dependency(numbers.__getitem__)
        words = [*job.before_dependency(), *([dependency] if dependency else []), *job.after_dependency()]
        answer = _slurm("sbatch", "--parsable", *words[1:]).strip()  # the settings may have printed something before
        numbers[job] = answer.rpartition("\n")[2].partition(";")[0]
        record.add(job, numbers[job])
    return list(numbers.values())


def _slurm(*command: str) -> str:
    """What one of SLURM's commands prints; called with the cluster's settings, unless the shell has them already.

    Raises:
        UserError: there is no such command, or it fails.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"no SLURM here ({command[0]} is not found): submit on a cluster, or see --dry-run's lines")
    env = {k: v for k, v in os.environ.items() if not _OF_THE_JOB.match(k)}
    settings = os.environ.get("CLUSTER_ENV") or str(scripts_folder() / "cluster.env")
    if "SBATCH_OUTPUT" not in env:  # as `source slurm/cluster.env` leaves it
        command = ("bash", "-c", 'source "$0" && exec "$@"', settings, *command)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.strip()), f"status {done.returncode}")
        raise UserError(f"SLURM refuses: {said}: see {settings}")
    return done.stdout
