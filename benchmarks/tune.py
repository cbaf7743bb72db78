"""What `dit-ds tune` answers for ViT-B on 8 GPUs and ViT-H on 2 x 8, how long it takes, and how far its memory rule is off.

Predictions: no GPU is used. Writes tune.json, .md and .png; `--json` prints the JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import common  # noqa: E402
from dit_ds.config.load import load_config  # noqa: E402
from dit_ds.engine.deepspeed_json import read_deepspeed_json  # noqa: E402
from dit_ds.files import GIB  # noqa: E402
from dit_ds.planning.memory.plan import needed  # noqa: E402
from dit_ds.planning.tune import command, report  # noqa: E402
from dit_ds.planning.tune.candidates import candidates  # noqa: E402
from dit_ds.planning.tune.memory_model import ProfilerPool  # noqa: E402

CASES = [("vit_b", 1, 8), ("vit_h", 2, 8)]


def answered(size: str, nodes: int, gpus: int, out: Path) -> dict:
    """The command's answer, without the candidates but for their number."""
    start = time.monotonic()
    request = command.TuneRequest(
        config_path=str(ROOT / "configs/base.yaml"),
        overrides=("--model.size", size),
        nodes=nodes,
        gpus=gpus,
        gpu="H100",
        out=str(out),
    )
    written, result = command.tune(request)
    seconds = round(time.monotonic() - start, 1)
    return {
        "model": size,
        "seconds": seconds,
        "load_after": round(os.getloadavg()[0], 1),
        "count": len(result.candidates),
        "chosen": written["chosen"],
        "own": written["own"],
        "pareto": written["pareto"],
        "text": report.lines(result, written, explain=True)[:-2],
    }


def rule_errors(count: int, seed: int) -> list[dict]:
    """Candidates of ViT-B on 8 GPUs drawn at random: the rule against a profile of each."""
    config = load_config(ROOT / "configs/base.yaml")
    ds = read_deepspeed_json(config)
    among = candidates(config, ds, 8, "H100")
    drawn = random.Random(seed).sample(among, count)
    with ProfilerPool() as pool:
        memory_model, _ = pool.survey(among, config, ds, 8)
        exact = pool.profiles(drawn, config, ds, 8)
    rows = []
    for c, profiled in zip(drawn, exact):
        rule = memory_model.predict(c).peak
        rows.append(
            {
                "candidate": c.name,
                "rule_gib": rule / GIB,
                "exact_gib": profiled.peak / GIB,
                "error_of_peak": rule / profiled.peak - 1,
                "error_of_needed": needed(rule, 8) / needed(profiled.peak, 8) - 1,
            }
        )
    return rows


ROWS = {
    "candidate": lambda r: r["candidate"],
    "rule, GiB": lambda r: f"{r['rule_gib']:.2f}",
    "profile, GiB": lambda r: f"{r['exact_gib']:.2f}",
    "error of the peak": lambda r: f"{r['error_of_peak']:+.1%}",
    "error of what a GPU must have": lambda r: f"{r['error_of_needed']:+.1%}",
}


def described(result: dict) -> str:
    """The Markdown."""
    text = f"# Tune\n\n{result['machine']}, {result['date']}. Predictions, not measurements; no GPU was used.\n"
    for case in result["cases"]:
        text += f"\n## {case['model']}: {case['count']} candidates in {case['seconds']:.0f} s\n\n"
        text += f"{result['note']}\n\n```\n" + "\n".join(case["text"]) + "\n```\n"
    if result["rule"]:
        text += "\n## The memory rule against exact profiles\n\n" + common.table(result["rule"], ROWS)
    return text + "\n![memory against speed, ViT-B](tune.png)\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--check", type=int, default=14, help="candidates whose memory is profiled, too (default 14)")
    parser.add_argument("--seed", type=int, default=1, help="of their choice (default 1)")
    parser.add_argument("--note", default="", help="a sentence for the report, as what else the machine did meanwhile")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    result = common.conditions("cpu") | {"benchmark": "tune", "note": args.note, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for size, nodes, gpus in CASES:
            result["cases"].append(answered(size, nodes, gpus, Path(folder) / size))
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "vit_b/pareto.png", args.out / "tune.png")
    result["rule"] = rule_errors(args.check, args.seed) if args.check else []
    common.write(args.out, "tune", result, described(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
