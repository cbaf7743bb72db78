"""`dit-ds experiments submit`: the runs of the paper's tables as SLURM jobs, from the shards to the table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_ds.config.installed_files import require_scripts
from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.paper import experiments, jobs
from dit_ds.paper.jobs import Job, Record, Task
from dit_ds.paper.planned_run import Evaluation, Run

# what slurm/shard.sbatch shards, by its array's numbers
SHARD_SETS = ("refcoco/unc", "refcoco/google", "refcoco+/unc", "refcocog/umd", "refcocog/google", "grefcoco/unc")
_log = logging.getLogger("dit_ds")


@dataclass(frozen=True)
class Request:
    """What is asked for beside the runs.

    Attributes:
        runs: the folder of the runs' folders.
        nodes: of each training.
        refer_root, images: as of `dit-ds data shard`, for shards that are missing.
        dry_run: print the jobs' lines instead of submitting them.
    """

    runs: Path
    nodes: int = 1
    refer_root: str = "refer"
    images: str = "coco/train2014"
    dry_run: bool = False


@dataclass(frozen=True)
class Report:
    """A table to write at the end: its file, and what `dit-ds compare` is given beside the runs and `--out`."""

    out: Path
    runs: list[Run]
    arguments: tuple[str, ...]


# --- the paper's runs ---------------------------------------------------------------------------------------------


def submit_tables(
    numbers: list[int], request: Request, *, seeds: int, overrides: list[str], configs: str | Path | None
) -> dict[str, Any]:
    """Train and evaluate the rows of tables, each distinct run once with each seed, and compare them with the paper.

    Args:
        seeds: how many, from each configuration's own on.
        overrides: of every configuration.
        configs: folder of the paper's configurations; by default the package's.
    Returns:
        As of `submit_runs`.
    Raises:
        UserError: as of `submit_runs`, no such table, or Table 8.
    """
    if 8 in numbers:
        raise UserError("Table 8 is about memory, and trains nothing: sbatch --gpus-per-node=8 slurm/table8.sbatch")
    if any(word.partition("=")[0] == "--run_dir" for word in overrides):
        raise UserError("--run_dir is each run's own: name the folder of all with --runs")
    runs: dict[Path, Run] = {}
    reports = []
    elsewhere = () if configs is None else ("--configs", str(configs))
    for number in dict.fromkeys(numbers):
        of_table: dict[Path, Run] = {}
        for row in experiments.experiments(number, configs):
            for run in _runs_of_row(row, request, seeds, overrides):
                known = of_table[run.folder] = runs.setdefault(run.folder, run)
                known.evaluations += [e for e in run.evaluations if e not in known.evaluations]
        out = request.runs / f"table{number}.md"
        reports.append(Report(out, list(of_table.values()), ("--table", str(number), *elsewhere)))
    name = "table" + "-".join(map(str, dict.fromkeys(numbers)))
    return submit_runs(name, list(runs.values()), reports, request)


def _runs_of_row(row: experiments.Experiment, request: Request, seeds: int, overrides: list[str]) -> Iterator[Run]:
    """The runs of a row of a table, one for each seed; of a model that is not trained there is one."""
    first = load_config(row.path, overrides).seed
    splits = dict.fromkeys(c.split for c in row.row.values if c.dataset == row.dataset and c.is_score)
    for seed in range(first, first + (seeds if row.row.trained else 1)):
        own = "" if seed == row.config.seed else f"_seed{seed}"
        folder = request.runs / (Path(row.config.run_dir).name + own)
        words = [*overrides, "--run_dir", str(folder)] + (["--seed", str(seed)] if own else [])
        yield Run(
            folder,
            load_config(row.path, words),
            ("--config", str(row.path), *words),
            [Evaluation(split, row.row.prompt) for split in splits],
            row.row.trained,
        )


# --- from runs to jobs --------------------------------------------------------------------------------------------


def submit_runs(name: str, runs: list[Run], reports: list[Report], request: Request) -> dict[str, Any]:
    """Submit what is left to do of the runs: shards, trainings, evaluations, and at the end the tables.

    What is finished is left out, and so is what an earlier submission put into the queue.

    Args:
        name: with which the jobs' names begin.
    Returns:
        `jobs`, each with `name`, `line`, `tasks` and, unless it is a dry run, `number`; `finished` and `queued`, what was
        left out; `tables`, the files that the last jobs write.
    Raises:
        UserError: no job scripts here; something that the runs read is missing (with `dry_run` a warning); a run's
            folder has another run; no SLURM, or it refuses.
    """
    require_scripts()
    if str(request.runs).startswith("-"):
        raise UserError(f"--runs {request.runs} reads as an option: choose another name")
    for run in runs:
        run.require_same()
    record = Record(request.runs)
    try:
        record.drop_ended()
    except UserError as e:
        if not request.dry_run:
            raise
        _log.warning(f"warning: jobs that wait or run already can't be left out: {e}")
        record.jobs = {}
    plan = _Plan(name, request, record.jobs)
    plan.add(runs, reports)
    found: list[dict[str, Any]] = [
        {"name": job.name, "line": jobs.shell_line(job), "tasks": list(job.keys())} for job in plan.jobs
    ]
    for problem in plan.problems(runs):
        if not request.dry_run:
            raise UserError(problem)
        _log.warning(f"warning: {problem}")
    numbers: list[str] = []
    if not request.dry_run:
        _write_untrained(runs)
        numbers = jobs.submit(plan.jobs, record)
    for job, number in zip(found, numbers):
        job["number"] = number
    return {"jobs": found, "finished": plan.finished, "queued": plan.queued, "tables": [str(r.out) for r in reports]}


class _Plan:
    """The jobs of a submission, in an order in which each waits for earlier ones only.

    Args:
        queued: what waits or runs already, with its job's number.
    """

    def __init__(self, name: str, request: Request, queued: dict[str, str]):
        self.name, self.request, self.in_queue = name, request, queued
        self.jobs: list[Job] = []
        self.finished: list[str] = []
        self.queued: list[str] = []
        self.to_shard: list[str] = []

    def add(self, runs: list[Run], reports: list[Report]) -> None:
        """All of it."""
        shards = self._shards(runs)
        training = self._trainings(runs, shards)
        last = self._evaluations(runs, training, shards)
        self.jobs += [job for report in reports if (job := self._report(report, last))]

    def _left(self, key: str, finished: bool) -> bool:
        """Whether something is to be submitted; notes why not."""
        if key in self.in_queue:
            self.queued.append(key)
        elif finished:
            self.finished.append(key)
        return not (finished or key in self.in_queue)

    def _shards(self, runs: list[Run]) -> list[tuple[str, Job | str]]:
        """Jobs for the sets that are missing; what is to wait for them waits so."""
        missing = dict.fromkeys((root, name) for run in runs for root, name in run.missing_sets())
        waits: list[tuple[str, Job | str]] = []
        for root in dict.fromkeys(root for root, _ in missing):
            tasks = {}
            for name in (name for of, name in missing if of == root):
                key = f"shard {root}/{name}"
                if not self._left(key, False):
                    waits.append(("afterok", self.in_queue[key]))
                elif name in SHARD_SETS:
                    tasks[SHARD_SETS.index(name)] = Task(key)
                    self.to_shard.append(f"{root}/{name}")
                else:
                    raise UserError(f"{root}/{name} holds no shards: write them with 'dit-ds data shard'")
            if tasks:
                arguments = ("--refer-root", self.request.refer_root, "--images", self.request.images, "--out", root)
                job = Job(f"{self.name}-shard", "shard", tasks=dict(sorted(tasks.items())),
                          arguments=arguments, options=("--gpus-per-node=0",))  # fmt: skip
                self.jobs.append(job)
                waits.append(("afterok", job))
        return waits

    def _trainings(self, runs: list[Run], shards: list[tuple[str, Job | str]]) -> dict[str, tuple[Job | str, int]]:
        """The array of trainings. Returns, of each run that trains or will, its job and its number in it."""
        job = Job(f"{self.name}-train", "train", options=(f"--nodes={self.request.nodes}",), after=shards)
        where: dict[str, tuple[Job | str, int]] = {}
        for run in runs:
            key = f"train {run.folder.name}"
            if not run.trained:
                continue
            if self._left(key, run.finished()):
                job.tasks[number := len(job.tasks)] = Task(key, run.arguments)
                where[run.folder.name] = job, number
            elif key in self.in_queue:
                array, _, task = self.in_queue[key].partition("_")
                where[run.folder.name] = array, int(task or 0)
        self.jobs += [job] if job.tasks else []
        return where

    def _evaluations(
        self, runs: list[Run], training: dict[str, tuple[Job | str, int]], shards: list[tuple[str, Job | str]]
    ) -> list[tuple[str, Job | str]]:
        """An array for each split and prompt, and for each array of trainings: a task has the number of its training.

        Returns:
            What is to wait for all of it waits so.
        """
        arrays: dict[tuple[Evaluation, Job | str | None], Job] = {}
        waits: list[tuple[str, Job | str]] = [("afterany", job) for job, _ in training.values()]
        for run in runs:
            trains_in, number = training.get(run.folder.name, (None, None))
            for e in run.evaluations:
                key = f"evaluate {run.folder.name} {e.split} {e.prompt}"
                if self._left(key, trains_in is None and run.evaluated(e)):
                    if (e, trains_in) not in arrays:
                        arrays[e, trains_in] = self._evaluation_job(e, trains_in, shards)
                    tasks = arrays[e, trains_in].tasks
                    tasks[len(tasks) if number is None else number] = Task(key, run.eval_arguments(e))
                elif key in self.in_queue:
                    waits.append(("afterany", self.in_queue[key]))
        self.jobs += arrays.values()
        return waits + [("afterany", job) for job in arrays.values()]

    def _evaluation_job(self, e: Evaluation, trains_in: Job | str | None, shards: list[tuple[str, Job | str]]) -> Job:
        after = shards if trains_in is None else [("aftercorr", trains_in)]
        name = f"{self.name}-eval-{e.split}" + ("" if e.prompt == "text" else f"-{e.prompt}")
        name += "" if isinstance(trains_in, Job) else f"-{trains_in or 'trained'}"  # a name of its own
        return Job(name, "eval", options=("--nodes=1",), after=list(after))

    def _report(self, report: Report, last: list[tuple[str, Job | str]]) -> Job | None:
        """The table, once all is over that can be; also of the runs that are there if others failed."""
        key = f"table {report.out.name}"
        if not self.jobs and not self._left(key, not last and report.out.exists()):
            return None
        arguments = (*(str(run.folder) for run in report.runs), *report.arguments, "--skip-missing")
        return Job(f"{report.out.stem}-compare", "compare", key,
                   arguments=(*arguments, "--out", str(report.out)), options=("--nodes=1", "--gpus-per-node=0"),
                   after=list(last))  # fmt: skip

    def problems(self, runs: list[Run]) -> Iterator[str]:
        """What the jobs will not find."""
        for what, path in ("--refer-root", self.request.refer_root), ("--images", self.request.images):
            if self.to_shard and not Path(path).is_dir():
                yield (f"no shards in {', '.join(self.to_shard)}, and no {path} to make them from: name it with {what}, "
                       "or run 'dit-ds data shard'")  # fmt: skip
        start = [run.config.model.checkpoint for run in runs if not (run.trained and run.finished())]
        for weights in dict.fromkeys(start):
            if weights is not None and not Path(weights).exists():
                yield f"model.checkpoint {weights} is not there: download it, or name another with --model.checkpoint"


def _write_untrained(runs: list[Run]) -> None:
    for run in runs:
        if not run.trained and (path := run.untrained_yaml()).parent == run.folder:
            path.parent.mkdir(parents=True, exist_ok=True)
            run.config.save(path)


def lines(result: dict[str, Any]) -> list[str]:
    """The result of `submit_runs` as text: what was submitted, what was left out, what comes next."""
    out = [f"job {j['number']}: {j['name']}, {len(j['tasks'])} to do" for j in result["jobs"]]
    for what in ("finished", "queued"):
        out += [f"left out, {what} already: {len(result[what])}"] if result[what] else []
    tables = ", ".join(result["tables"])
    if result["jobs"] or result["queued"]:
        return [
            *out,
            f"the last job writes {tables}; 'squeue --me' shows the jobs; the same command submits what failed",
        ]
    return [*out, f"nothing is left to submit: see {tables}"]
