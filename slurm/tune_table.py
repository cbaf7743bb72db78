"""What tune.sbatch found: samples a second and peak memory of each candidate, the fastest first."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def row(run: Path) -> dict[str, str | float]:
    """One candidate: its figures, or why it has none."""
    status = (run / "status").read_text().split()[0]
    if status != "0":
        error = (run / "error").read_text().strip() if (run / "error").exists() else ""
        return {"name": run.name, "speed": 0.0, "note": f"failed, status {status}{': ' if error else ''}{error}"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    steady = lines[1:] or lines  # the first window holds what happens once: allocation, compilation, autotuning
    return {
        "name": run.name,
        "speed": statistics.median(line["samples_per_second"] for line in steady),
        "memory": max(line["peak_memory_gib"] for line in lines),
    }


def main() -> None:
    """Print the table of the runs in a folder."""
    rows = sorted((row(s.parent) for s in Path(sys.argv[1]).glob("*/status")), key=lambda r: -r["speed"])
    print("| candidate | samples/s | peak GiB of rank 0 |\n|---|---|---|")
    for r in rows:
        figures = r.get("note") or f"{r['speed']:.1f} | {r['memory']:.2f}"
        print(f"| {r['name']} | {figures}{' |' if 'note' in r else ''} |")


if __name__ == "__main__":
    main()
