"""Commands to start with: `demo`, and `init`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_ds.cli.output import command, given_folder, report


def add(commands: Any) -> None:
    """Add `demo` and `init` to the parser's commands."""
    p = command(commands, "demo", _demo, "train a small model on the embedded sample set, evaluate it and draw a sheet: minutes "
                "on two CPU cores")  # fmt: skip
    p.add_argument("--out", default="demo", metavar="FOLDER", help="where everything goes (default demo)")
    p.add_argument("--scheme", default="layer_wise", choices=["layer_wise", "default"], help="default layer_wise: L-DIT; "
                   "default: SAM's own, where text meets the image in the mask decoder only")  # fmt: skip

    p = command(commands, "init", _init, "write configurations and job scripts into a folder, to change and to run")
    p.add_argument("folder", nargs="?", help="where configs/, slurm/ and README.md go; nothing is overwritten")
    p.add_argument("--out", metavar="FOLDER", help="the same")


def _demo(args: argparse.Namespace) -> int:
    from dit_ds.cli.demo import demo, lines

    result = demo(Path(args.out), args.scheme)
    report(args, result, lambda: lines(result))
    return 0


def _init(args: argparse.Namespace) -> int:
    from dit_ds.config.init_folder import init_folder

    result = init_folder(given_folder(args))
    report(
        args, result, lambda: [f"wrote {result['files']} files: {result['folder']}/README.md says what they are for"]
    )
    return 0
