"""A set of full RefCOCO size through `dit-ds data shard`, `dit-ds data verify` and one epoch of loading by two workers.

20,000 images of about 171 kB (a few hundred distinct photos, the others hard links to them), about 50,000 refs, 142,000
expressions and 176,000 annotations. Memory is the sum over all processes of a command of their proportional share (PSS,
so that shared pages count once), sampled four times a second. Needs 3.5 GB in the temporary folder while it runs.

    python benchmarks/loader_full.py --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import torch
from loader import AUGMENTATION, BATCH, dataset
from photos import DATASET, write_photos

from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.sampler import TrainBatchSampler

CLI = [sys.executable, "-m", "dit_ds.cli", "data"]


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *itertools.chain.from_iterable(map(family, children))]


def weight(pid: int) -> int:
    """Memory of a process and its descendants in bytes, shared pages counted once."""
    total = 0
    for member in family(pid):
        try:
            total += common.memory_of(member)["share"]
        except (FileNotFoundError, ProcessLookupError, KeyError, IndexError):
            pass  # it ended meanwhile
    return total


def run(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of a command, and the JSON that it prints last."""
    start, peak = time.perf_counter(), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], weight(process.pid))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode not in (0, 1) or not out:  # 1: verify found something, which main judges
        raise SystemExit(f"{' '.join(command)}: {errors[-2000:]}")
    printed = out.strip().splitlines()
    return {"seconds": seconds, "peak_gb": peak[0] / 1e9, "printed": json.loads(printed[-1]) if printed else None}


def load_epoch(folder: Path) -> dict[str, int]:
    """Load one training epoch, one sentence a ref, all augmentations; counts of its samples."""
    index = SplitIndex.load(folder, "train")
    data = dataset(index, "ref", AUGMENTATION)
    batches = TrainBatchSampler(index.samples("ref"), BATCH, BATCH, 0, 1, 0)
    seen = [s for b in iterate(make_loader(data, batches, 2, pin=False)) for s, w in zip(b["sample"], b["weight"]) if w]
    return {"samples": len(seen), "distinct": len(set(map(int, seen)))}


def markdown(result: dict[str, Any]) -> str:
    rows = [{"step": k, **v} for k, v in result["steps"].items()]
    columns = {
        "step": lambda r: r["step"],
        "seconds": lambda r: f"{r['seconds']:.0f}",
        "peak memory of all processes, GB": lambda r: f"{r['peak_gb']:.2f}",
    }
    counts = ", ".join(f"{n:,} {k}" for k, n in result["counts"].items())
    return f"{counts}.\n\n{common.table(rows, columns)}\n{result['date']}, {result['machine']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--epoch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.epoch:
        print(json.dumps(load_epoch(args.epoch)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        tree, shards = Path(temporary) / "tree", Path(temporary) / "shards"
        counts = write_photos(tree, args.images, min(args.images, args.distinct))
        folder = shards / DATASET / "unc"
        given = ["--refer-root", str(tree), "--images", str(tree / "images"), "--out", str(shards)]
        steps = {
            "shard": run([*CLI, "shard", *given, "--dataset", DATASET, "--split-by", "unc", "--json"]),
            "verify": run([*CLI, "verify", str(folder), "--json"]),
            "epoch": run([sys.executable, __file__, "--epoch", str(folder)]),
        }
        size = sum(f.stat().st_size for f in folder.glob("*.tar"))
    printed = {k: s.pop("printed") for k, s in steps.items()}
    errors = printed["verify"]["errors"]
    if errors or printed["epoch"]["samples"] != printed["epoch"]["distinct"]:
        raise SystemExit(f"it did not come through: {errors[:3]} {printed['epoch']}")
    result = {
        **common.conditions("cpu"),
        "cores": os.cpu_count(),
        "counts": counts,
        "shard_gb": size / 1e9,
        "epoch_samples": printed["epoch"]["samples"],
        "steps": steps,
    }
    common.write(args.out, "loader_full", result, markdown(result))
    print(json.dumps(result) if args.json else markdown(result))


if __name__ == "__main__":
    main()
