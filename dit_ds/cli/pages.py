"""Commands that make pages for a browser: a report about runs, an app to try a model."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.arguments import whole
from dit_ds.cli.output import command, report


def add(commands: Any) -> None:
    """Add `report` and `app` to the parser's commands."""
    p = command(commands, "report", _report, "one HTML file about runs: curves, tables, predictions, configuration")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; several are shown side by side")
    p.add_argument("--out", required=True, metavar="FILE", help="page to write, as report.html; it needs no network")
    p.add_argument("--split", help="of the predictions (default: the one that the run is evaluated on)")
    p.add_argument("--data-root", help="where the shards are, if they moved since training")
    p.add_argument(
        "--examples",
        type=whole(0, 10_000_000),
        default=128,
        metavar="N",
        help="expressions of the split to predict, spread over it, of which the worst and best are shown (default 128)",
    )
    p.add_argument("--shown", type=whole(1, 100), default=6, help="how many of the worst, and of the best (default 6)")
    p.add_argument(
        "--table",
        type=whole(1, 100),
        metavar="N",
        help="of the paper (default: those with a row of these settings, or 1)",
    )
    p.add_argument("--configs", help="the paper's configurations (default: those of the package)")

    p = command(
        commands, "app", _app, "a page on this machine to try a model: words, points, a box; the mask, attention"
    )
    p.add_argument("run_or_checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    p.add_argument("--port", type=whole(0, 65535), default=7860, help="0 takes a free one (default 7860)")
    p.add_argument("--split", help="whose pictures to offer (default: the one that the run is evaluated on)")
    p.add_argument("--data-root", help="where its shards are, if they moved since training")


def _report(args: argparse.Namespace) -> int:
    from dit_ds.pages.report import report_lines, write_report

    result = write_report(
        args.runs,
        args.out,
        split=args.split,
        data_root=args.data_root,
        looked_at=args.examples,
        shown=args.shown,
        table=args.table,
        configs=args.configs,
    )
    report(args, result, lambda: report_lines(result))
    return 0


def _app(args: argparse.Namespace) -> int:
    from dit_ds.pages.app import serve

    serve(
        args.run_or_checkpoint,
        host=args.host,
        port=args.port,
        split=args.split,
        data_root=args.data_root,
        ready=lambda url: report(args, {"url": url}, lambda: [f"open {url} in a browser; Ctrl-C ends it"]),
    )
    return 0
