"""The demo: sample set -> shards -> training on two ranks under ZeRO-2 -> evaluation -> pictures, as a user would.

Each step is a `dit-ds` command and is printed before it runs. The last line of stdout is one JSON object: `eval`'s keys,
`shuffled_miou` (each image given another image's expressions), `train_seconds` and `run`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/demo.json"


def run(*command: str) -> str:
    """Print and run a command; return its stdout. Ends the demo where the command fails."""
    words = [str(c) for c in command]
    print("$ " + " ".join(words), file=sys.stderr, flush=True)
    python = [sys.executable, "-m"]
    launcher = {"dit-ds": [*python, "dit_ds.cli"], "torchrun": [*python, "torch.distributed.run"]}
    done = subprocess.run(
        [*launcher[words[0]], *words[1:]], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def demo(folder: Path, scheme: str) -> dict:
    """Train one scheme and return the figures."""
    start = time.perf_counter()
    run_dir = folder / scheme
    shutil.rmtree(run_dir, ignore_errors=True)
    run("dit-ds", "data", "sample", folder / "refer")
    run("dit-ds", "data", "shard", "--refer-root", folder / "refer", "--images", folder / "refer/images/train2014",
        "--out", folder / "shards")  # fmt: skip
    two_ranks = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "dit_ds.cli")
    trained = run(*two_ranks, "train", "--config", "configs/sample.yaml", "--data.root", folder / "shards",
                  "--run_dir", run_dir, "--model.scheme", scheme, "--json")  # fmt: skip
    figures = last_json(run(*two_ranks, "eval", run_dir, "--split", "val", "--json"))
    shuffled = last_json(run(*two_ranks, "eval", run_dir, "--split", "val", "--shuffle-text", "--json"))
    run("dit-ds", "sheet", run_dir, "--out", run_dir / "sheet.png", "--rows", "12")
    return figures | {
        "shuffled_miou": shuffled["miou"],
        "train_seconds": last_json(trained)["train_seconds"],
        "run": str(run_dir),
        "scheme": scheme,
        "sheet": str(run_dir / "sheet.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }


def last_json(text: str) -> dict:
    """The JSON object on the last line."""
    return json.loads(text.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="demo", help="where everything goes (default demo)")
    parser.add_argument("--scheme", default="layer_wise", choices=["layer_wise", "default"])
    parser.add_argument(
        "--record", action="store_true", help=f"write both schemes' figures to {RESULTS.relative_to(ROOT)}"
    )
    args = parser.parse_args()
    if not args.record:
        print(json.dumps(demo(Path(args.folder), args.scheme)))
        return
    rows = {scheme: demo(Path(args.folder), scheme) for scheme in ("layer_wise", "default")}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    record = {
        "date": str(datetime.date.today()),
        "machine": machine,
        "command": "python benchmarks/demo.py --record",
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows["layer_wise"]))


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
