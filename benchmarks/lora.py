"""LoRA against full tuning and a frozen ViT: L-DIT from one pretrained SAM, with the same steps and seeds.

On the embedded sample set, from the small SAM of benchmarks/schemes.py, which learned points and boxes and knows no words.
The text encoder is frozen in all. What is finished in --folder is not made again; it may be the folder of schemes.py.

    python benchmarks/lora.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import RESULTS, conditions, table, write
from schemes import Study, summary

KINDS = {  # the layers that are updated; None: not by LoRA
    "all tuned": None,
    "LoRA of qkv, proj": "[qkv,proj]",
    "LoRA of qkv, proj, mlp": "[qkv,proj,mlp]",
    "ViT frozen": None,
}


def tune(study: Study, kind: str, lr: float, seed: int, rank: int) -> dict:
    """One training's figures on val."""
    targets = KINDS[kind]
    if targets is not None:
        lora = f"{{rank: {rank}, alpha: {rank}, targets: {targets}}}"
        label = f"lora{targets.count(',') + 1}-{rank}-{lr:g}"
        return study.tune("layer_wise", False, seed, "--model.lora", lora, "--train.lr", lr, label=label)
    frozen = kind == "ViT frozen"
    if lr == study.lr:
        return study.tune("layer_wise", frozen, seed)
    return study.tune("layer_wise", frozen, seed, "--train.lr", lr, label=f"{'frozen' if frozen else 'tuned'}-{lr:g}")


def compare(study: Study, lrs: list[float], seeds: list[int], processes: int, rank: int) -> list[dict]:
    """Figures of each kind at each learning rate over the seeds; so many trainings side by side."""
    jobs = [(kind, lr, seed) for seed in seeds for lr in lrs for kind in KINDS]
    with ThreadPoolExecutor(processes) as pool:
        found = dict(zip(jobs, pool.map(lambda job: tune(study, *job, rank), jobs)))
    return [
        {"kind": kind, "lr": lr, "oiou": statistics.fmean(found[kind, lr, seed]["oiou"] for seed in seeds)}
        | summary([found[kind, lr, seed]["miou"] for seed in seeds])
        for kind in KINDS
        for lr in lrs
    ]


def markdown(result: dict) -> str:
    """The table: each kind's mIoU by learning rate, and the distance between the best of each kind."""
    settings, rows = result["settings"], result["rows"]
    several = len(settings["seeds"]) > 1
    best = {kind: max(r["mean"] for r in rows if r["kind"] == kind) for kind in KINDS}

    def miou(kind: str, lr: float) -> str:
        row = next(r for r in rows if (r["kind"], r["lr"]) == (kind, lr))
        return f"{100 * row['mean']:.1f}" + (f" ± {100 * row['spread']:.1f}" if several else "")

    columns = {"": lambda kind: kind}
    columns |= {f"lr {lr:g}": (lambda kind, lr=lr: miou(kind, lr)) for lr in settings["lrs"]}
    columns["best, to full tuning's best"] = lambda kind: f"{100 * (best[kind] - best['all tuned']):+.1f}"
    over = f"mean ± standard deviation over {len(settings['seeds'])} seeds" if several else "one seed"
    return (
        f"# LoRA on the sample set\n\nmIoU in % on val ({result['n']} expressions), {over}; L-DIT, {settings['steps']} "
        f"steps of 32 from a small SAM that learned points and boxes in {settings['pretraining']}; the text encoder is "
        f"frozen. Rank and alpha {settings['rank']}. {result['machine']}, {result['date']}, `{result['command']}`.\n\n"
        f"{table(list(KINDS), columns)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="demo/schemes", help="where everything goes (default demo/schemes)")
    parser.add_argument("--steps", type=int, default=400, help="of each tuning (default 400)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of the SAM before (default 1000)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3], help="of the tunings (default 1e-3 3e-3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=1, help="trainings side by side (default 1)")
    parser.add_argument("--out", default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    study = Study(Path(args.folder), args.steps, args.pretraining, args.lrs[0])
    study.prepare()
    result = conditions("cpu") | {
        "command": "python benchmarks/lora.py --json",
        "settings": {
            "steps": args.steps, "pretraining": args.pretraining, "lrs": args.lrs, "rank": args.rank, "seeds": args.seeds,
        },
        "n": json.loads((study.folder / "sam.json").read_text())["figures"]["n"],
        "rows": compare(study, args.lrs, args.seeds, args.processes, args.rank),
    }  # fmt: skip
    text = markdown(result)
    write(Path(args.out), "lora", result, text)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
