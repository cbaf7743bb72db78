"""CPU seconds of the imports that every rank and every command begins with.

`dit-ds train` is to import at most 0.3 s above `import torch, deepspeed`; `dit-ds --help`, which imports no torch, is to
take under a second. Each runs in processes of its own, in turns. Writes import_time.json and .md; `--json` prints one
JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import common  # noqa: E402

COMMANDS = {
    "torch, deepspeed": "import torch, deepspeed",
    "dit_ds.training.train": "import dit_ds.training.train",
    "dit-ds --help": "import runpy, sys; sys.argv = ['dit-ds', '--help']; runpy.run_module('dit_ds.cli', run_name='__main__')",
}


def cpu_seconds(code: str) -> float:
    """User and system time of a new Python process that runs `code`."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}  # no compiler is asked
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(args.rounds + 1):
        for name, code in COMMANDS.items():
            taken = cpu_seconds(code)
            if i:  # the first round fills the file cache
                seconds[name].append(taken)
    rows = [{"import": n, "median": statistics.median(s), "least": min(s)} for n, s in seconds.items()]
    base, train, _ = rows
    result = common.conditions("cpu") | {
        "rounds": args.rounds,
        "cpu_seconds": rows,
        "train_above_torch_and_deepspeed": train["median"] - base["median"],
        "train_over_torch_and_deepspeed": train["median"] / base["median"],
    }
    columns = {
        "import": lambda r: f"`{r['import']}`",
        "CPU seconds, median": lambda r: f"{r['median']:.2f}",
        "least": lambda r: f"{r['least']:.2f}",
    }
    text = f"# Import time\n\n{result['machine']}, torch {result['torch']}, {result['date']}, {args.rounds} rounds.\n\n"
    common.write(args.out, "import_time", result, text + common.table(rows, columns))
    print(json.dumps(result) if args.json else text + common.table(rows, columns))


if __name__ == "__main__":
    main()
