"""Train on a SLURM cluster of three nodes through many faults of it, and compare with the run that was never disturbed.

python benchmarks/faults.py --faults 50 --seed 0 --json

The cluster is that of the tests: real daemons, on this machine, as root. Two nodes train and one is spare; checkpoints
go to the nodes' own disks (small file systems in memory) and to a shared folder. One fault after another, each once
training goes on after the one before: a rank is killed or stopped, a node's slurmd or all of the node is killed, a
node's disk is full, its checkpoints are deleted and a rank is killed, the shared folder is away for a while.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import common  # noqa: E402
import kill_and_resume  # noqa: E402
import slurm_cluster  # noqa: E402
from conftest import fill  # noqa: E402

EPOCHS_A_FAULT = 3  # of twelve steps: SLURM takes up to 30 s, hundreds of steps, to notice a killed slurmd
LIMIT = 300  # seconds for one fault to be overcome
AWAY = 20  # seconds without the shared folder
DISK = "96m"  # of a node, for three checkpoints of a rank and of its neighbour
# how often of ten; the first is done to a rank of the training, and so on
KINDS = {
    "rank killed": 4,
    "rank stopped": 1,
    "slurmd killed": 1,
    "disk full": 1,
    "checkpoint deleted": 2,
    "folder away": 1,
}


class Training:
    """The run, the job that trains it, and what can be done to them."""

    def __init__(self, site: slurm_cluster.Site, epochs: int, seed: int):
        self.site, self.cluster, self.draw = site, site.cluster, random.Random(seed)
        self.shared = site.folder / "shared"
        self.run_dir = site.run_dir = self.shared / "run"
        self.shared.mkdir()
        self.words = ["--run_dir", self.run_dir, "--train.epochs", epochs, "--eval.every_epochs", max(epochs // 5, 1),
                      "--train.max_steps", "null", "--model.word_dropout", 0.1, "--train.ema_decay", 0.9,
                      "--checkpoint.every_steps", 30, "--checkpoint.local", f"{site.folder}/disks/$SLURMD_NODENAME",
                      "--checkpoint.local_every_minutes", 0.02, "--checkpoint.on_full_disk", "go_on",
                      "--log.samples", True, "--log.stall_seconds", 10]  # fmt: skip
        self.down: set[str] = set()  # nodes whose slurmd was killed
        self.job = ""

    def submit(self) -> None:
        self.job = self.site.train(*map(str, self.words), nodes=3)

    def starts(self) -> list[dict[str, Any]]:
        """The starts of the training so far."""
        return [x for x in _lines(self.run_dir / "events.jsonl") if x["event"] == "start"]

    def step(self) -> int:
        """The last step that the run's metrics tell of."""
        return max((x["step"] for x in _lines(self.run_dir / "metrics.jsonl") if x["kind"] == "train"), default=0)

    def over(self) -> bool:
        """Whether the job has ended. One that was requeued is started at once, which SLURM would do in two minutes."""
        state = self.cluster.job(self.job)["JobState"]
        if state == "PENDING":
            self.repair()
            self.cluster.restart(self.job)
        return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")

    def wait(self, condition: Callable[[], bool], what: str) -> bool:
        """Whether it came true before the job's end."""
        end = time.monotonic() + LIMIT
        while not condition():
            if self.over():
                return False
            if time.monotonic() > end:
                raise RuntimeError(f"no {what} within {LIMIT} s:\n{self.site.read(self.job)[-3000:]}")
            time.sleep(0.2)
        return True

    def ranks(self) -> dict[int, tuple[int, str]]:
        """Process and node of each rank that runs."""
        found = {}
        for pid in slurm_cluster.processes_with(f"SLURM_CONF={self.cluster.folder}/"):
            env = dict(x.split("=", 1) for x in slurm_cluster.environ_of(pid).split("\0") if "=" in x)
            command = slurm_cluster.command_of(pid).split("\0")
            a_rank = "SLURM_STEP_ID" in env and "dit_ds.cli" in command and "train" in command  # not its srun
            if a_rank and env.get("SLURM_JOB_ID") == self.job:
                found[int(env["SLURM_PROCID"])] = pid, env["SLURMD_NODENAME"]
        return found

    def a_rank(self) -> tuple[int, str]:
        ranks = self.ranks()
        return ranks[self.draw.choice(sorted(ranks))]

    def disk(self) -> Path:
        """That of a node on which a rank runs."""
        return self.site.folder / "disks" / self.a_rank()[1]

    def repair(self) -> None:
        """Start the killed nodes again."""
        for node in sorted(self.down):
            self.cluster.start_node(node)
        self.down.clear()

    def fault(self, kind: str) -> bool:
        """Do it; whether it ends the ranks."""
        match kind:
            case "rank killed":
                os.kill(self.a_rank()[0], signal.SIGKILL)
            case "rank stopped":
                os.kill(self.a_rank()[0], signal.SIGSTOP)
            case "slurmd killed":  # not that of the batch host, which is the first node
                node = next(n for _, n in self.ranks().values() if n != slurm_cluster.THREE_NODES[0])
                self.down.add(node)
                kill = self.draw.choice([self.cluster.kill_slurmd, self.cluster.kill_node])
                kill(node)
            case "disk full":
                with full(self.disk()):
                    time.sleep(5)
            case "checkpoint deleted":
                disks = [self.disk()] if self.draw.random() < 0.5 else list((self.site.folder / "disks").iterdir())
                for folder in [sorted(d.glob("run_*/step_*"))[-1:] for d in disks]:
                    for path in folder:
                        shutil.rmtree(path, ignore_errors=True)
                os.kill(self.a_rank()[0], signal.SIGKILL)
            case "folder away":
                away = self.shared.with_name("away")
                self.shared.rename(away)
                time.sleep(AWAY)
                if self.shared.exists():
                    raise RuntimeError(f"{self.shared} was made anew while it was away: {list(self.shared.rglob('*'))}")
                away.rename(self.shared)
        return kind not in ("disk full", "folder away")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none while it is away."""
    try:
        return [json.loads(x) for x in path.read_text().splitlines(True) if x.endswith("\n")]
    except FileNotFoundError:
        return []


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """A disk without any room."""
    filler = fill(folder)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def disks(folder: Path) -> Iterator[None]:
    """A small file system for each node."""
    paths = [folder / "disks" / node for node in slurm_cluster.THREE_NODES]
    for path in paths:
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        for path in paths:
            subprocess.run(["umount", "-l", str(path)], check=True)


def kinds_of(number: int, draw: random.Random) -> list[str]:
    """As many faults, of each kind its share and at least one, in random order."""
    tenth = [kind for kind, n in KINDS.items() for _ in range(n)]
    kinds = list(KINDS) + [tenth[i % len(tenth)] for i in range(number)]
    kinds = kinds[:number]
    draw.shuffle(kinds)
    return kinds


def through_faults(training: Training, number: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Faults, one after another, from the first steps to the end of the run. Returns what each was and took."""
    done: list[dict[str, Any]] = []
    training.submit()
    for kind in kinds_of(number, training.draw):
        before = len(training.starts())
        first = training.starts()[-1]["step"] if before else 0
        target = max(first, training.step() if before else 0) + training.draw.randint(3, 25)
        if not training.wait(lambda target=target: training.step() >= target and len(training.ranks()) == 2, "step"):
            break
        at, step, before = time.time(), training.step(), len(training.starts())
        ends_ranks = training.fault(kind)
        entry: dict[str, Any] = {"kind": kind, "step": step}
        if ends_ranks:
            again = lambda: len(training.starts()) > before and training.step() > training.starts()[-1]["step"]  # noqa: E731, B023
            if not training.wait(again, "training after a fault"):
                raise RuntimeError(f"the job ended after '{kind}':\n{training.site.read(training.job)[-3000:]}")
            entry |= {"seconds": round(time.time() - at, 1), "resumed_at": training.starts()[-1]["step"]}
            training.repair()
        done.append(entry)
        report(f"fault {len(done)}: {kind} at step {step}"
               + (f", training again after {entry['seconds']} s from step {entry['resumed_at']}" if ends_ranks else ""))  # fmt: skip
    return done


def faults(folder: Path, number: int, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
    """The undisturbed run, then the other one."""
    kill_and_resume.prepare(folder, epochs=1, word_dropout=0.0)  # the shards
    settings = {"SPARES": "1", "RESTARTS": "1000", "MAX_REQUEUES": "1000", "CACHE_DIR": str(folder / "cache")}
    epochs = max(2, int(number * EPOCHS_A_FAULT))
    results = {}
    for cluster in slurm_cluster.start_cluster(folder, slurm_cluster.THREE_NODES):
        for name in ("undisturbed", "disturbed"):
            (folder / name).mkdir()
            site = slurm_cluster.Site(cluster, folder / name, folder / "shards", **settings)
            training = Training(site, epochs, seed)
            with disks(site.folder):
                start = time.monotonic()
                done = through_faults(training, number if name == "disturbed" else 0, report)
                info = site.completed(training.job, timeout=3600)
                training.repair()
            of_run = kill_and_resume.Run(site.config, training.run_dir)
            results[name] = of_run.result()
            report(f"{name}: {len(results[name]['losses'])} steps in {time.monotonic() - start:.0f} s")
        lost, doubled = of_run.samples()
        starts = len(training.starts())
    requeues = int(info["Restarts"])
    of_kind = {k: [x["seconds"] for x in done if x["kind"] == k and "seconds" in x] for k in KINDS}
    return {
        "faults": len(done), "seed": seed, "steps": len(results["disturbed"]["losses"]),
        "restarts": starts - 1 - requeues, "requeues": requeues,
        "identical": results["disturbed"] == results["undisturbed"], "samples_lost": lost, "samples_doubled": doubled,
        "seconds_to_training_median": statistics.median(of_kind["rank killed"]) if of_kind["rank killed"] else None,
        "seconds_to_training": {k: {"median": statistics.median(s), "most": max(s)} for k, s in of_kind.items() if s},
        "of_kind": {k: sum(x["kind"] == k for x in done) for k in KINDS}, "each": done,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of their kinds, moments and places (default 0)")
    parser.add_argument("--json", action="store_true", help="print only one JSON object on stdout")
    parser.add_argument("--out", type=Path, help="also write the result there, as benchmarks/results")
    args = parser.parse_args()
    if args.faults < 1:
        parser.error("--faults takes a number from 1 on")

    def report(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster is stopped, the disks are unmounted
    with tempfile.TemporaryDirectory(prefix="faults_") as scratch:
        result = faults(Path(scratch), args.faults, args.seed, report) | common.conditions("cpu")
    if args.out:
        (args.out / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    good = result["identical"] and result["faults"] == args.faults
    return 0 if good and not result["samples_lost"] and not result["samples_doubled"] else 1


if __name__ == "__main__":
    sys.exit(main())
