"""Commands about the paper's tables: which configuration each row is, and the tables with one's own rows in them."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.arguments import whole
from dit_ds.cli.output import command, report


def add(commands: Any) -> None:
    """Add `experiments` and `compare` to the parser's commands."""
    p = command(commands, "experiments", _experiments, "list the rows of the paper's tables with their configurations")
    _shared(p)

    p = command(commands, "compare", _compare, "the paper's tables with your runs in them")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, evaluated with dit-ds eval")
    p.add_argument("--format", choices=["text", "markdown", "csv", "json"], help="default: by --out's ending, or text")
    p.add_argument("--out", metavar="FILE", help="write it there instead of printing it")
    p.add_argument(
        "--shards",
        metavar="HASH",
        help="results on the shards whose manifest_sha begins so (default: those that the run evaluates on)",
    )
    _shared(p)


def _shared(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", type=whole(1, 100), metavar="N", help="this table only")
    p.add_argument("--configs", default="configs/paper", help="where the configurations are (default configs/paper)")


def _experiments(args: argparse.Namespace) -> int:
    from dit_ds.paper import experiments

    result = experiments.listing(args.table, args.configs)
    report(args, result, lambda: experiments.lines(result))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dit_ds.paper import compare, compare_report

    result = compare.compare(args.runs, args.table, args.configs, args.shards)
    form = args.format or compare_report.format_of(args.out)
    if args.out:
        report(args, {"written": compare_report.write(result, form, args.out)})
    else:
        print(compare_report.render(result, "json" if args.json else form), end="")
    return 0
