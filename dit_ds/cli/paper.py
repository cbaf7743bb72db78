"""Commands about the paper's tables: which configuration each row is, and the tables with one's own rows in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_ds.cli.arguments import Several, names, nodes, whole
from dit_ds.cli.output import command, report, say
from dit_ds.data.progress import write_line


def add(commands: Any) -> None:
    """Add `experiments` and `compare` to the parser's commands."""
    p = command(commands, "experiments", _experiments, "list the rows of the paper's tables with their configurations; or "
                "submit them, or a sweep, to SLURM")  # fmt: skip
    _shared(p)
    _add_submissions(p.add_subparsers(metavar="COMMAND", prog="dit-ds experiments"))

    p = command(commands, "compare", _compare, "the paper's tables with your runs in them")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, evaluated with dit-ds eval")
    p.add_argument(
        "--keys", action="store_true", help="one table of all runs, with the configuration keys in which they differ"
    )
    p.add_argument("--skip-missing", action="store_true", help="note runs that are not there instead of refusing them")
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
    p.add_argument("--configs", help="where the configurations are (default: the package's)")


def _add_submissions(commands: Any) -> None:
    """`experiments submit` and `experiments sweep`."""
    p = command(commands, "submit", _submit, "train and evaluate the rows of tables as SLURM jobs, and compare them with "
                "the paper; --section.key value overrides every configuration")  # fmt: skip
    p.add_argument("--table", type=Several(whole(1, 100)), metavar="N,N", required=True, help="these tables")
    p.add_argument("--configs", help="where the configurations are (default: the package's)")
    p.add_argument(
        "--seeds", type=whole(1, 100), default=1, help="runs of each row, from the row's seed on (default 1)"
    )
    p.add_argument("--data-root", help="where the shards are or go (default: the configurations' data.root)")
    _submission_options(p, "runs")
    p = command(commands, "sweep", _sweep, "train a run for each line of a file as SLURM jobs, and write one table of them; "
                "--section.key value overrides every run's configuration")  # fmt: skip
    p.add_argument("file", metavar="FILE", help="a line of overrides a run, as --train.lr 1e-4 --train.batch_size 16")
    p.add_argument("--config", required=True, help="the YAML file that they override")
    p.add_argument("--splits", type=names, metavar="SPLIT,SPLIT",
                   help="splits to evaluate after the training, which evaluates data.val_split itself")  # fmt: skip
    _submission_options(p, "runs/sweep")


def _submission_options(p: argparse.ArgumentParser, runs: str) -> None:
    p.add_argument("--runs", default=runs, metavar="FOLDER", help=f"where the runs' folders go (default {runs})")
    p.add_argument("--nodes", type=nodes, default=1, help="of each training (default 1)")
    p.add_argument("--refer-root", default="refer", help="to make shards that are missing (default refer)")
    p.add_argument("--images", default="coco/train2014", help="their pictures (default coco/train2014)")
    p.add_argument("--dry-run", action="store_true", help="print the lines, in order, that would submit the jobs; "
                   "what was pasted into a shell, a later submission does not know of")  # fmt: skip
    p.set_defaults(takes_overrides=True)
    p.allow_abbrev = False  # --seed is a key of the configuration, and not --seeds


def _experiments(args: argparse.Namespace) -> int:
    from dit_ds.paper import experiments

    result = experiments.listing(args.table, args.configs)
    report(args, result, lambda: experiments.lines(result))
    return 0


def _submit(args: argparse.Namespace) -> int:
    from dit_ds.paper.submit import submit_tables

    root = ["--data.root", args.data_root] if args.data_root else []
    overrides = [*root, *args.overrides]
    result = submit_tables(args.table, _request(args), seeds=args.seeds, overrides=overrides, configs=args.configs)
    return _submitted(args, result)


def _sweep(args: argparse.Namespace) -> int:
    from dit_ds.paper.sweep import submit_sweep

    result = submit_sweep(args.file, args.config, _request(args), overrides=args.overrides, splits=args.splits or [])
    return _submitted(args, result)


def _request(args: argparse.Namespace) -> Any:
    from dit_ds.paper.submit import Request

    return Request(Path(args.runs), args.nodes, args.refer_root, args.images, args.dry_run)


def _submitted(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from dit_ds.paper.submit import lines

    if args.dry_run and not result["jobs"]:
        write_line(lines(result)[-1])
    report(args, result, lambda: [job["line"] for job in result["jobs"]] if args.dry_run else lines(result))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dit_ds.paper import compare, compare_report

    if args.keys:
        result = compare.by_keys(args.runs, args.shards, args.skip_missing)
    else:
        result = compare.compare(
            args.runs, args.table, args.configs, manifest=args.shards, skip_missing=args.skip_missing
        )
    form = args.format or compare_report.format_of(args.out)
    if args.out:
        report(args, {"written": compare_report.write(result, form, args.out)})
    else:
        say(compare_report.render(result, "json" if args.json else form), end="")
    return 0
