"""`dit-ds demo` from the clone, as `make demo` calls it; with --record the figures of both schemes.

The last line of stdout is one JSON object, see `dit_ds.cli.demo.demo`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from dit_ds.cli.demo import demo  # noqa: E402
from dit_ds.errors import RunFailed, UserError  # noqa: E402

RESULTS = ROOT / "benchmarks/results/demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="demo", help="where everything goes (default demo)")
    parser.add_argument("--scheme", default="layer_wise", choices=["layer_wise", "default"])
    parser.add_argument(
        "--record", action="store_true", help=f"write both schemes' figures to {RESULTS.relative_to(ROOT)}"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        schemes = ("layer_wise", "default") if args.record else (args.scheme,)
        rows = {scheme: demo(Path(args.folder), scheme) for scheme in schemes}
    except (UserError, RunFailed) as e:
        print(f"demo: error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        sys.exit(130)
    if args.record:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        record = {
            "date": str(datetime.date.today()),
            "machine": machine,
            "command": "python benchmarks/demo.py --record",
            "rows": rows,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(next(iter(rows.values()))))


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
