"""The model of CUDA's caching allocator against recorded GPUs: figures for benchmarks/results/allocator.*

python benchmarks/allocator.py --traces FOLDER [--json]   # memory snapshots (.pickle) and trace files (.json, .json.gz)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

from dit_ds.errors import UserError  # noqa: E402
from dit_ds.files import GIB  # noqa: E402
from dit_ds.planning.memory.allocator_settings import AllocatorSettings  # noqa: E402
from dit_ds.planning.memory.caching_allocator import CachingAllocator  # noqa: E402
from dit_ds.planning.memory.recorded.replay import replay  # noqa: E402

_ENDINGS = (".json", ".json.gz", ".pickle", ".pkl")
_KEYS = (
    "events", "allocations", "at_recorded_address", "segments", "segments_foreseen", "recorded_peak_reserved",
    "peak_reserved", "peak_allocated", "least_capacity", "fragmentation", "fits", "exact", "notes",
)  # fmt: skip


def events_a_second(events: int = 1_000_000) -> float:
    """Allocations and releases of random sizes, some 5,000 at a time."""
    rng = random.Random(0)
    sizes = [rng.choice([rng.randint(1, 1 << 20), rng.randint(1, 1 << 25)]) for _ in range(4096)]
    allocator = CachingAllocator(AllocatorSettings())
    held = [allocator.allocate(sizes[i % 4096]) for i in range(5000)]
    start = time.perf_counter()
    for i in range(events // 2):
        j = rng.randrange(5000)
        allocator.free(held[j])
        held[j] = allocator.allocate(sizes[i % 4096])
    return events / (time.perf_counter() - start)


def rows_of(folder: Path, report) -> list[dict]:
    """Every record in the folder, replayed."""
    rows = []
    for path in sorted(p for p in folder.iterdir() if p.name.endswith(_ENDINGS)):
        start = time.perf_counter()
        try:
            result = replay(path)
            rows.append({"trace": path.name, **{k: result[k] for k in _KEYS}})
            rows[-1]["ranking"] = {r["settings"]: r["peak_reserved"] for r in result["ranking"]}
        except UserError as e:
            rows.append({"trace": path.name, "error": str(e)})
        rows[-1]["seconds"] = round(time.perf_counter() - start, 3)
        report(json.dumps(rows[-1]))
    return rows


def in_words(result: dict) -> str:
    """allocator.md"""
    gib = lambda key: lambda r: f"{r[key] / GIB:.3f}"  # noqa: E731
    columns = {
        "record": lambda r: r["trace"].split(".")[0],
        "events": lambda r: f"{r['events']:,}",
        "at the recorded address": lambda r: f"{r['at_recorded_address']} of {r['allocations']}",
        "segments foreseen": lambda r: f"{r['segments_foreseen']} of {r['segments']}",
        "reserved, recorded": gib("recorded_peak_reserved"),
        "reserved": gib("peak_reserved"),
        "allocated": gib("peak_allocated"),
        "least capacity": gib("least_capacity"),
        "with expandable segments": lambda r: f"{r['ranking']['expandable_segments:True'] / GIB:.3f}",
        "exact": lambda r: "yes" if r["exact"] else "no",
        "s": lambda r: r["seconds"],
    }
    rows = [r for r in result["rows"] if "error" not in r]
    notes = [f"- {r['trace']}: {note}" for r in rows for note in r["notes"] if "not exact" in note]
    return (
        f"Recorded GPUs followed by the model of PyTorch's caching allocator: {result['exact']} of {len(rows)} records "
        f"exactly, to every address. GiB; seconds with all alternatives on {result['conditions']['machine']}, "
        f"{result['conditions']['date']}; the model takes {result['events_a_second']:,.0f} events a second.\n\n"
        f"{common.table(rows, columns)}\n" + "\n".join(notes) + "\n\n`python benchmarks/allocator.py --traces FOLDER`\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="a folder of records")
    parser.add_argument("--json", action="store_true", help="print only one JSON object on stdout")
    parser.add_argument("--out", type=Path, help="also write allocator.md and .json there, as benchmarks/results")
    args = parser.parse_args()
    if not args.traces.is_dir():
        parser.error(f"no folder {args.traces}")
    rows = rows_of(args.traces, lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True))
    if not rows:
        parser.error(f"no records in {args.traces}: names end in {', '.join(_ENDINGS)}")
    result = {"conditions": common.conditions("cpu"), "exact": sum(r.get("exact", False) for r in rows),
              "events_a_second": round(events_a_second()), "rows": rows}  # fmt: skip
    if args.out:
        common.write(args.out, "allocator", result, in_words(result))
    print(json.dumps(result if args.json else {k: v for k, v in result.items() if k != "rows"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
