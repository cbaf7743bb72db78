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


def tune(study: Study, kind: str, seed: int, rank: int, lr: float) -> dict:
    """One training's figures on val."""
    targets = KINDS[kind]
    if targets is None:
        return study.tune("layer_wise", kind == "ViT frozen", seed)
    lora = f"{{rank: {rank}, alpha: {rank}, targets: {targets}}}"
    label = f"lora{targets.count(',') + 1}-{rank}-{lr:g}"
    return study.tune("layer_wise", False, seed, "--model.lora", lora, "--train.lr", lr, label=label)


def compare(study: Study, seeds: list[int], processes: int, rank: int, lr: float) -> dict[str, dict]:
    """Figures of each kind over the seeds, and how far below full tuning it is; so many trainings side by side."""
    jobs = [(kind, seed) for seed in seeds for kind in KINDS]
    with ThreadPoolExecutor(processes) as pool:
        found = dict(zip(jobs, pool.map(lambda job: tune(study, *job, rank, lr), jobs)))
    miou = {kind: [found[kind, seed]["miou"] for seed in seeds] for kind in KINDS}
    return {
        kind: summary(of)
        | {
            "oiou": statistics.fmean(found[kind, seed]["oiou"] for seed in seeds),
            "below_tuned": statistics.fmean(a - b for a, b in zip(miou["all tuned"], of)),
        }
        for kind, of in miou.items()
    }


def markdown(result: dict) -> str:
    """The table."""
    settings = result["settings"]
    columns = {
        "": lambda row: row[0],
        "mIoU": lambda row: f"{100 * row[1]['mean']:.1f} ± {100 * row[1]['spread']:.1f}",
        "below full tuning": lambda row: f"{100 * row[1]['below_tuned']:.1f}",
        "oIoU": lambda row: f"{100 * row[1]['oiou']:.1f}",
    }
    return (
        f"# LoRA on the sample set\n\nmIoU in % on val ({result['n']} expressions), mean ± standard deviation over "
        f"{len(settings['seeds'])} seeds; L-DIT, {settings['steps']} steps of 32 from a small SAM that learned points and "
        f"boxes in {settings['pretraining']}; the text encoder is frozen. Rank {settings['rank']}, alpha the same; "
        f"learning rate {settings['lr']:g}, LoRA's {settings['lora_lr']:g}. {result['machine']}, {result['date']}, "
        f"`{result['command']}`.\n\n{table(list(result['kinds'].items()), columns)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="demo/schemes", help="where everything goes (default demo/schemes)")
    parser.add_argument("--steps", type=int, default=400, help="of each tuning (default 400)")
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of the SAM before (default 1000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the tunings (default 1e-3)")
    parser.add_argument("--lora-lr", type=float, default=3e-3, help="of those with LoRA (default 3e-3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=1, help="trainings side by side (default 1)")
    parser.add_argument("--out", default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    study = Study(Path(args.folder), args.steps, args.pretraining, args.lr)
    study.prepare()
    result = conditions("cpu") | {
        "command": "python benchmarks/lora.py --json",
        "settings": {
            "steps": args.steps, "pretraining": args.pretraining, "lr": args.lr, "lora_lr": args.lora_lr,
            "rank": args.rank, "seeds": args.seeds,
        },
        "n": json.loads((study.folder / "sam.json").read_text())["figures"]["n"],
        "kinds": compare(study, args.seeds, args.processes, args.rank, args.lora_lr),
    }  # fmt: skip
    text = markdown(result)
    write(Path(args.out), "lora", result, text)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
