"""How the schemes compare: default, E-DIT and L-DIT from one pretrained SAM, tuned whole and with its ViT frozen.

On the embedded sample set. First a small SAM learns what SAM learned, to answer points and boxes; it knows no words. From
its weights each scheme is tuned with the same budget, settings and seeds; the text encoder is frozen in all. What is
finished in --folder is not made again.

    python benchmarks/schemes.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import RESULTS, conditions, table, write
from safetensors.torch import load_file, save_file

from dit_ds.paper.tables import TABLES, Column

ROOT = Path(__file__).parent.parent
SCHEMES = {"default": "default", "end_to_end": "E-DIT", "layer_wise": "L-DIT"}
PAPER = {  # mIoU in % on RefCOCO val, by configuration
    name: row.values[Column("refcoco", "val", "miou")] for row in TABLES[1].rows for name in row.configs.values()
}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class Study:
    """The trainings of one comparison, in one folder.

    Args:
        steps, pretraining: optimizer steps of each tuning, and of the SAM they start from.
        lr: of the tunings.
    """

    def __init__(self, folder: Path, steps: int, pretraining: int, lr: float):
        self.folder, self.steps, self.pretraining, self.lr = folder.resolve(), steps, pretraining, lr
        self.sam = self.folder / f"sam-{pretraining}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """The sample set, and the SAM that all start from."""
        refer, shards = self.folder / "refer", self.folder / "shards"
        if not (shards / "refcoco/unc/manifest.json").exists():
            self._command("sample", "data", "sample", refer)
            images = refer / "images/train2014"
            self._command("shard", "data", "shard", "--refer-root", refer, "--images", images, "--out", shards)
        prompts = ["--model.scheme", "default", "--data.prompts", "[point,box]"]
        self._train("sam", *prompts, "--train.max_steps", self.pretraining)
        whole = self.folder / "sam-whole.safetensors"
        self._command("export", "export", self.folder / "sam", "--out", whole)
        sams = ("image_encoder.", "prompt_encoder.", "mask_decoder.")  # the words' way in differs by the seed
        save_file({n: x for n, x in load_file(whole).items() if n.startswith(sams)}, self.sam)

    def tune(self, scheme: str, frozen: bool, seed: int, *overrides: object, label: str = "") -> dict:
        """One training's figures on val; with further overrides it has a label."""
        name = f"{scheme}-{label or ('frozen' if frozen else 'tuned')}-{seed}"
        return self._train(
            name, "--model.scheme", scheme, "--model.freeze_image_encoder", str(frozen).lower(), "--seed", seed,
            "--model.checkpoint", self.sam, "--train.max_steps", self.steps, "--train.lr", self.lr, *overrides,
        )  # fmt: skip

    def _train(self, name: str, *overrides: object) -> dict:
        """One process, evaluated at the end; what it printed is kept, and marks it as done."""
        done, run_dir = self.folder / f"{name}.json", self.folder / name
        asked = [str(x) for x in overrides]
        if done.exists() and (before := json.loads(done.read_text()))["overrides"] == asked:
            return before["figures"]
        shutil.rmtree(run_dir, ignore_errors=True)
        figures = self._command(
            name, "train", "--config", "configs/sample.yaml", "--data.root", self.folder / "shards",
            "--run_dir", run_dir, "--train.epochs", 1000, "--eval.every_epochs", 1000,
            "--checkpoint.every_epochs", 1000, "--log.tensorboard", "false",
            "--deepspeed.override.train_micro_batch_size_per_gpu", 32, *asked,
        )  # fmt: skip
        done.write_text(json.dumps({"overrides": asked, "figures": figures}))
        return figures

    def _command(self, name: str, *args: object) -> dict:
        command = [sys.executable, "-m", "dit_ds.cli", *map(str, args), "--json"]
        with open(self.folder / f"{name}.log", "w") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=ENVIRONMENT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: see {self.folder}/{name}.log")
        return json.loads(done.stdout.splitlines()[-1])


def summary(values: list[float]) -> dict[str, object]:
    """Mean, standard deviation over the seeds (n - 1), and each."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": spread, "of_seeds": values}


def compare(study: Study, seeds: list[int], processes: int) -> dict[str, dict[str, dict]]:
    """`{scheme: {tuned: {mean, spread, of_seeds, oiou}, frozen: ..}}`; so many trainings side by side."""
    jobs = [(s, frozen, seed) for seed in seeds for frozen in (True, False) for s in SCHEMES]
    with ThreadPoolExecutor(processes) as pool:
        found = dict(zip(jobs, pool.map(lambda job: study.tune(*job), jobs)))
    rows: dict[str, dict[str, dict]] = {}
    for scheme in SCHEMES:
        for frozen, kind in ((False, "tuned"), (True, "frozen")):
            of = [found[scheme, frozen, seed] for seed in seeds]
            figures = summary([x["miou"] for x in of]) | {"oiou": statistics.fmean(x["oiou"] for x in of)}
            rows.setdefault(scheme, {})[kind] = figures
    return rows


def gains(rows: dict[str, dict[str, dict]], kind: str) -> dict[str, dict]:
    """By how much each scheme's mIoU exceeds the one before it, seed by seed."""
    names = list(SCHEMES)
    return {
        f"{b} - {a}": summary([y - x for x, y in zip(rows[a][kind]["of_seeds"], rows[b][kind]["of_seeds"])])
        for a, b in zip(names, names[1:])
    }


def markdown(result: dict) -> str:
    """The table, the paper's figures beside it."""
    lines = []
    for scheme, label in SCHEMES.items():
        cells = {"scheme": label}
        for kind in ("tuned", "frozen"):
            of = result["schemes"][scheme][kind]
            cells[kind] = f"{100 * of['mean']:.1f} ± {100 * of['spread']:.1f}"
            cells[f"{kind}, paper"] = f"{PAPER[f'table1_{scheme}' + '_frozen' * (kind == 'frozen')]:.1f}"
        lines.append(cells)
    columns = {c: (lambda row, c=c: row[c]) for c in lines[0]}
    steps, seeds = result["settings"]["steps"], len(result["settings"]["seeds"])
    return (
        f"# Schemes on the sample set\n\nmIoU in % on val ({result['n']} expressions), mean ± standard deviation over "
        f"{seeds} seeds; {steps} steps of 32 from a small SAM that learned points and boxes; the text encoder is "
        "frozen, the ViT tuned or frozen. Beside it the paper's Table 1 (RefCOCO val, ViT-B). "
        f"{result['machine']}, {result['date']}, `{result['command']}`.\n\n{table(lines, columns)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="demo/schemes", help="where everything goes (default demo/schemes)")
    parser.add_argument("--steps", type=int, default=400, help="of each tuning (default 400)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of the SAM before (default 1000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the tunings (default 1e-3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings side by side (default: cores)")
    parser.add_argument("--out", default=RESULTS, help=f"default {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    study = Study(Path(args.folder), args.steps, args.pretraining, args.lr)
    study.prepare()
    rows = compare(study, args.seeds, args.processes)
    result = conditions("cpu") | {
        "command": "python benchmarks/schemes.py --json",
        "settings": {"steps": args.steps, "pretraining": args.pretraining, "lr": args.lr, "seeds": args.seeds},
        "n": json.loads((study.folder / "sam.json").read_text())["figures"]["n"],
        "schemes": rows,
        "gains": {kind: gains(rows, kind) for kind in ("tuned", "frozen")},
    }
    text = markdown(result)
    write(Path(args.out), "schemes", result, text)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
