"""The commands that say how a run is, and which of its ranks are slow."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from dit_ds.cli.arguments import Number
from dit_ds.cli.output import command, on_terminal, report, say
from dit_ds.errors import UserError


def add(commands: Any) -> None:
    """Add `status` and `stragglers` to the parser's commands."""
    p = command(commands, "status", _status, "how a run is: step, loss, rate, finish predicted, checkpoint, restarts")
    p.add_argument("run_dir", metavar="RUN", help="the run's folder")
    p.add_argument(
        "--watch",
        nargs="?",
        type=Number(float, 0, 3600, above=True, unit="of seconds"),
        const=5.0,
        metavar="SECONDS",
        help="again every so many seconds (default 5), until the run ends; waits for a run that has not begun",
    )
    p = command(commands, "stragglers", _stragglers, "which ranks and hosts a run waits for, and how to leave them out")
    p.add_argument("run_dir", metavar="RUN", help="the run's folder")


def _stragglers(args: argparse.Namespace) -> int:
    from dit_ds.training import stragglers

    result = stragglers.stragglers(args.run_dir)
    report(args, result, lambda: stragglers.lines(result))
    return 0


def _status(args: argparse.Namespace) -> int:
    from dit_ds.training import status

    if args.watch is None:
        result = status.status(args.run_dir)
        report(args, result, lambda: status.lines(result))
        return 0
    while True:
        try:
            result = status.status(args.run_dir)
        except UserError as e:
            result = {"state": "none"}
            shown = [str(e)]
        else:
            shown = status.lines(result)
        clear = "\033[2J\033[H" if on_terminal() and not args.json else ""
        say(json.dumps(result) if args.json else clear + "\n".join(shown))
        if result["state"] in ("done", "stopped", "failed", "refused"):
            return 0
        time.sleep(args.watch)
