"""The table of headline figures in README.md, from the result files; and the picture beside it.

python benchmarks/headline.py             # print the table
python benchmarks/headline.py --write     # put it into README.md, between its marks
python benchmarks/headline.py --picture   # results/predictions.jpg, a small form of results/figure4.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
MARKS = ("<!-- headline figures: python benchmarks/headline.py --write -->\n", "<!-- end of headline figures -->\n")
_WIDTH = 900  # of the picture


class Figure(NamedTuple):
    """A row of the table.

    Attributes:
        what, value: in words.
        command: that makes the figure.
        source: the JSON file in results/ that it was read from, which has machine and date.
        predicted: it was computed, not measured.
    """

    what: str
    value: str
    command: str
    source: str
    predicted: bool = False


def figures() -> Iterator[Figure]:
    """The rows, read from the result files."""
    rows = _read("demo")["rows"]
    ours = rows["layer_wise"]
    yield Figure("the demo: L-DIT on a drawn set, mIoU (with shuffled text); training",
                 f"{ours['miou']:.3f} ({ours['shuffled_miou']:.3f}); {ours['train_seconds']:.0f} s",
                 "python benchmarks/demo.py --record", "demo")  # fmt: skip
    tuned = [f"{100 * s['tuned']['mean']:.1f}" for s in _read("schemes")["schemes"].values()]
    yield Figure("default, E-DIT, L-DIT on the drawn set, mIoU in %, three seeds", ", ".join(tuned),
                 "python benchmarks/schemes.py", "schemes")  # fmt: skip
    kills = _read("kill_and_resume")
    yield Figure("runs killed with -9 that resumed to the same bits", f"{kills['identical']} of {kills['kills']}",
                 "python benchmarks/kill_and_resume.py --kills 100 --out benchmarks/results", "kill_and_resume")  # fmt: skip
    blocked = _read("checkpoint")["saves"]["blocked_seconds"]
    yield Figure("a save of ViT-B with BERT holds training up (DeepSpeed's own save)",
                 f"{blocked['background']:.2f} s ({blocked['deepspeed']:.1f} s)",
                 "python benchmarks/checkpoint.py", "checkpoint")  # fmt: skip
    steps = _read("loader_full")["steps"]
    yield Figure("a set of RefCOCO's size: shard, verify, read for one epoch",
                 ", ".join(f"{steps[s]['seconds']:.0f} s" for s in ("shard", "verify", "epoch")),
                 "python benchmarks/loader_full.py", "loader_full")  # fmt: skip
    loader = _read("loader")
    rate = loader["rates"]["augmented"]["samples_per_second"]
    yield Figure("one loader worker, all augmentations, samples a second (in the field's style)",
                 f"{rate['worker']:.0f} ({rate['field_style']:.0f})", "python benchmarks/loader.py", "loader")  # fmt: skip
    damages = _read("mutations")["total"]
    yield Figure("damages of a set that `data verify` found",
                 f"{damages['found_by_verify']:,} of {damages['damages']:,}",
                 "python benchmarks/mutations.py", "mutations")  # fmt: skip
    step = next(r for r in _read("train_step")["rows"]
                if (r["width"], r["size"], r["mode"]) == ("vit_b", 1024, "tuned"))  # fmt: skip
    yield Figure("three layers of ViT-B at 1024 px on a CPU, against plain attention: speed, memory kept",
                 f"{step['speedup']:.1f} times, {step['memory_ratio']:.2f}",
                 "python benchmarks/train_step.py", "train_step")  # fmt: skip
    faults = _read("faults")
    of_killed = faults["seconds_to_training"]["rank killed"]["median"]
    yield Figure(f"{faults['faults']} faults of a SLURM cluster in one run: the undisturbed run's digits; from a killed rank "
                 "to training",
                 f"{'yes' if faults['identical'] else 'no'}; {of_killed:.0f} s",
                 "python benchmarks/faults.py --faults 50 --out benchmarks/results", "faults")  # fmt: skip
    replay = _read("allocator")
    yield Figure("recorded GPU histories that the allocator's model replays to every address",
                 f"{replay['exact']} of {len(replay['rows'])}",
                 "python benchmarks/allocator.py --traces FOLDER", "allocator")  # fmt: skip
    yield from _predictions()


def _predictions() -> Iterator[Figure]:
    rows = [r for r in _read("table8")["rows"] if (r["method"], r["size"], r["form"], r["batch_per_gpu"], r["gpus"],
            r["checkpointing"]) == ("L-DIT", "vit_b", "ours", 32, 1, "block")]  # fmt: skip
    of = {(r["visual"], r["text"]): r["allocated_gib"] for r in rows if r["reading"] == "literal"}
    parts = (("frozen", "frozen"), ("frozen", "tuned"), ("tuned", "tuned"))
    yield Figure("L-DIT with ViT-B, batch 32 on one GPU: encoders frozen, text tuned, all tuned; allocated",
                 ", ".join(f"{of[p]:.1f}" for p in parts) + " GiB", "dit-ds memory table8", "table8", True)  # fmt: skip
    chosen = next(c for c in _read("tune")["cases"] if c["model"] == "vit_b")["chosen"]
    yield Figure("L-DIT with ViT-B on 8 H100: samples a second; memory a GPU needs",
                 f"{chosen['samples_per_second']:,.0f}; {chosen['needed_gib']:.1f} GiB",
                 "dit-ds tune --config configs/base.yaml", "tune", True)  # fmt: skip


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _conditions(name: str) -> tuple[str, str]:
    """Machine and date of a result file."""
    result = _read(name)
    result |= result.get("conditions", {})
    machine = result["machine"]
    if isinstance(machine, dict):
        machine = f"{machine['cores']} cores, {machine['cpu']}"
    return machine, result["date"].split(",")[0]


def table(up: str = "") -> str:
    """The table in Markdown.

    Args:
        up: what comes before `benchmarks/results` in links, as "../".
    """
    lines = ["| | figure | | command | machine, date |", "|---|---|---|---|---|"]
    for f in figures():
        machine, date = _conditions(f.source)
        kind = "predicted" if f.predicted else "measured"
        link = f"[{date}]({up}benchmarks/results/{f.source}.json)"
        lines.append(f"| {f.what} | {f.value} | {kind} | `{f.command}` | {machine}, {link} |")
    return "\n".join(lines) + "\n"


def written(readme: str) -> str:
    """README's text with the table of today's result files."""
    before, rest = readme.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}{table()}{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    parser.add_argument("--picture", action="store_true", help="write results/predictions.jpg")
    args = parser.parse_args()
    if args.picture:
        from PIL import Image

        figure = Image.open(RESULTS / "figure4.png").convert("RGB")
        small = figure.resize((_WIDTH, round(figure.height * _WIDTH / figure.width)), Image.Resampling.LANCZOS)
        small.save(RESULTS / "predictions.jpg", quality=88, optimize=True)
    if args.write:
        path = ROOT / "README.md"
        path.write_text(written(path.read_text()))
    if not (args.write or args.picture):
        print(table(), end="")


if __name__ == "__main__":
    main()
