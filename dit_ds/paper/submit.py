"""`dit-ds experiments submit`: the runs of the paper's tables as SLURM jobs, from the shards to the table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import read_json
from dit_ds.paper import experiments, jobs
from dit_ds.paper.jobs import Job, Record, Task

# what slurm/shard.sbatch shards, by its array's numbers
SHARD_SETS = ("refcoco/unc", "refcoco/google", "refcoco+/unc", "refcocog/umd", "refcocog/google", "grefcoco/unc")
_log = logging.getLogger("dit_ds")


class Evaluation(NamedTuple):
    """A split, and the kind of prompt."""

    split: str
    prompt: str


@dataclass
class Run:
    """A run to train, to evaluate, or both.

    Attributes:
        folder: its `run_dir`.
        config: as it will train, with that folder.
        arguments: of `dit-ds train`.
        evaluations: what to evaluate after the training.
        trained: False for a model that is evaluated as it was released.
    """

    folder: Path
    config: RunConfig
    arguments: tuple[str, ...]
    evaluations: list[Evaluation] = field(default_factory=list)
    trained: bool = True


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
    numbers: list[int], request: Request, *, seeds: int, overrides: list[str], configs: str | Path
) -> dict[str, Any]:
    """Train and evaluate the rows of tables, each distinct run once with each seed, and compare them with the paper.

    Args:
        seeds: how many, from each configuration's own on.
        overrides: of every configuration.
        configs: folder of the paper's configurations.
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
    elsewhere = () if str(configs) == experiments.FOLDER else ("--configs", str(configs))
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
        UserError: not in dit-ds's folder; something that the runs read is missing (with `dry_run` a warning); a run's
            folder has another run; no SLURM, or it refuses.
    """
    if not Path("slurm/common.sh").exists():
        raise UserError("no slurm/ here: submit from dit-ds's folder")
    if str(request.runs).startswith("-"):
        raise UserError(f"--runs {request.runs} reads as an option: choose another name")
    for run in runs:
        _require_same_run(run)
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
        missing = dict.fromkeys((root, name) for run in runs for root, name in _missing_sets(run))
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
                job = Job(f"{self.name}-shard", "slurm/shard.sbatch", tasks=dict(sorted(tasks.items())),
                          arguments=arguments, options=("--gpus-per-node=0",))  # fmt: skip
                self.jobs.append(job)
                waits.append(("afterok", job))
        return waits

    def _trainings(self, runs: list[Run], shards: list[tuple[str, Job | str]]) -> dict[str, tuple[Job | str, int]]:
        """The array of trainings. Returns, of each run that trains or will, its job and its number in it."""
        job = Job(f"{self.name}-train", "slurm/train.sbatch", options=(f"--nodes={self.request.nodes}",), after=shards)
        where: dict[str, tuple[Job | str, int]] = {}
        for run in runs:
            key = f"train {run.folder.name}"
            if not run.trained:
                continue
            if self._left(key, _finished(run)):
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
                if self._left(key, trains_in is None and _evaluated(run, e)):
                    if (e, trains_in) not in arrays:
                        arrays[e, trains_in] = self._evaluation_job(e, trains_in, shards)
                    tasks = arrays[e, trains_in].tasks
                    tasks[len(tasks) if number is None else number] = Task(key, _eval(run, e))
                elif key in self.in_queue:
                    waits.append(("afterany", self.in_queue[key]))
        self.jobs += arrays.values()
        return waits + [("afterany", job) for job in arrays.values()]

    def _evaluation_job(self, e: Evaluation, trains_in: Job | str | None, shards: list[tuple[str, Job | str]]) -> Job:
        after = shards if trains_in is None else [("aftercorr", trains_in)]
        name = f"{self.name}-eval-{e.split}" + ("" if e.prompt == "text" else f"-{e.prompt}")
        name += "" if isinstance(trains_in, Job) else f"-{trains_in or 'trained'}"  # a name of its own
        return Job(name, "slurm/eval.sbatch", options=("--nodes=1",), after=list(after))

    def _report(self, report: Report, last: list[tuple[str, Job | str]]) -> Job | None:
        """The table, once all is over that can be; also of the runs that are there if others failed."""
        key = f"table {report.out.name}"
        if not self.jobs and not self._left(key, not last and report.out.exists()):
            return None
        arguments = (*(str(run.folder) for run in report.runs), *report.arguments, "--skip-missing")
        return Job(f"{report.out.stem}-compare", "slurm/compare.sbatch", key,
                   arguments=(*arguments, "--out", str(report.out)), options=("--nodes=1", "--gpus-per-node=0"),
                   after=list(last))  # fmt: skip

    def problems(self, runs: list[Run]) -> Iterator[str]:
        """What the jobs will not find."""
        for what, path in ("--refer-root", self.request.refer_root), ("--images", self.request.images):
            if self.to_shard and not Path(path).is_dir():
                yield (f"no shards in {', '.join(self.to_shard)}, and no {path} to make them from: name it with {what}, "
                       "or run 'dit-ds data shard'")  # fmt: skip
        start = [run.config.model.checkpoint for run in runs if not (run.trained and _finished(run))]
        for weights in dict.fromkeys(start):
            if weights is not None and not Path(weights).exists():
                yield f"model.checkpoint {weights} is not there: download it, or name another with --model.checkpoint"


def _missing_sets(run: Run) -> Iterator[tuple[str, str]]:
    """Root and name of the sets of shards that a run reads, and that are not there."""
    data = run.config.data
    names = dict.fromkeys(data.train_sets if run.trained else ())
    if run.evaluations or run.config.eval.every_epochs:
        names[data.val_set] = None
    for name in names:
        if not data.streamed and not Path(data.root, name, "manifest.json").exists():
            yield data.root, name


def _eval(run: Run, e: Evaluation) -> tuple[str, ...]:
    """The arguments of `dit-ds eval`."""
    prompt = () if e.prompt == run.config.data.default_prompt else ("--prompt", e.prompt)
    if not run.trained:
        return (str(_untrained(run)), "--split", e.split, *prompt)
    # training may have read its shards from a node's own disk; without evaluation it notes no set to compare with
    root = ("--data-root", run.config.data.root) if run.config.eval.every_epochs else ()
    return (str(run.folder), "--split", e.split, *prompt, *root)


# --- what is there already ----------------------------------------------------------------------------------------


def _require_same_run(run: Run) -> None:
    """See that a run's folder, if it is there, is of the same configuration.

    Raises:
        UserError: names a key in which they differ.
    """
    path = run.folder / "config.yaml"
    if path.exists() and (changed := experiments.differences(run.config, load_config(path))):
        raise UserError(
            f"{run.folder} is a run with another {', '.join(changed[:3])}: choose another --runs, or remove that folder"
        )


def _finished(run: Run) -> bool:
    """Whether a run's training has come to its end; nothing is to be trained of a model that is not."""
    steps = sorted(run.folder.glob("checkpoints/step_*/manifest.json"))
    if not steps or not run.trained:
        return not run.trained
    meta, most = steps[-1].with_name("meta.json"), run.config.train.max_steps
    over = most is not None and _count(meta, "progress", "step") >= most
    return over or _count(meta, "progress", "epoch") >= run.config.train.epochs


def _evaluated(run: Run, e: Evaluation) -> bool:
    """Whether the checkpoint that `dit-ds eval` takes, the best or else the newest, was evaluated."""
    step = 0
    if run.trained:
        best = run.folder / "best.json"
        newest = max(int(p.parent.name[5:]) for p in run.folder.glob("checkpoints/step_*/manifest.json"))
        step = _count(best, "step") if best.exists() else newest
    return (run.folder / "evaluations" / f"{e.split}-{e.prompt}-step_{step:08d}.json").exists()


def _count(path: Path, *keys: str) -> int:
    """A number in a file of JSON objects.

    Raises:
        UserError: it is not there.
    """
    value = read_json(path, "state of the run")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int):
        raise UserError(f"{path} has no {'.'.join(keys)}: it is damaged, remove it")
    return value


def _untrained(run: Run) -> Path:
    """The YAML to evaluate a model that is not trained by: the paper's own, or one in the run's folder."""
    path = Path(run.arguments[1])  # after --config
    return path if load_config(path) == run.config else run.folder / "config.yaml"


def _write_untrained(runs: list[Run]) -> None:
    for run in runs:
        if not run.trained and (path := _untrained(run)).parent == run.folder:
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
