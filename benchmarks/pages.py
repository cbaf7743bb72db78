"""How long `dit-ds report` takes and how large its page is, and how long `dit-ds app` takes for an expression.

make demo && python benchmarks/pages.py demo/layer_wise
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from demo import ENVIRONMENT, cpu_name

EXPRESSIONS = ("the left star", "the red thing", "the largest circle", "blue square at the bottom", "the striped heart")


def report(run: str) -> dict:
    """Seconds, CPU seconds and bytes of the report of a run, from the command's start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        start, before = time.perf_counter(), os.times()
        subprocess.run(
            [sys.executable, "-m", "dit_ds.cli", "report", run, "--out", out], check=True, env=ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(cpu, 2),
            "bytes": out.stat().st_size,
        }


def app(run: str, rounds: int) -> dict:
    """Seconds of an answer with every layer's attention, as the page asks for it."""
    command = [sys.executable, "-m", "dit_ds.cli", "app", run, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            seconds = []
            for text in EXPRESSIONS * rounds:
                body = json.dumps({"picture": "sample-0", "text": text}).encode()
                asked = urllib.request.Request(url + "segment", body, {"Content-Type": "application/json"})
                start = time.perf_counter()
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    assert json.load(answer)["layers"]
                seconds.append(time.perf_counter() - start)
        finally:
            server.kill()
    return {
        "first": round(seconds[0], 3),
        "median": round(statistics.median(seconds), 3),
        "largest": round(max(seconds), 3),
        "answers": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, as demo/layer_wise")
    args = parser.parse_args()
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    figures = {"report": report(args.run), "app": app(args.run, rounds=4)}
    print(json.dumps({"date": str(datetime.date.today()), "machine": machine} | figures))


if __name__ == "__main__":
    main()
