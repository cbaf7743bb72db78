"""What commands share: how they are declared, and how they print their results. Nothing else goes to stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from dit_ds.errors import UserError

if TYPE_CHECKING:
    from dit_ds.config.schema import RunConfig

_stdout: TextIO | None = None  # of the command that runs, whose libraries print on stderr


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """A context in which `say` alone writes to stdout: DeepSpeed and others print warnings there, which go to stderr."""
    global _stdout
    former, _stdout = _stdout, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = former


def say(text: str, end: str = "\n") -> None:
    """Print a result, or a part of one, to stdout, at once: some commands end without Python's clean-up."""
    print(text, end=end, file=_stdout or sys.stdout, flush=True)


def on_terminal() -> bool:
    """Whether results go to a terminal."""
    return (_stdout or sys.stdout).isatty()


def report(
    args: argparse.Namespace,
    result: dict[str, Any],
    lines: Callable[[], list[str]] | None = None,
    any_rank: bool = False,
) -> None:
    """Print the result: one JSON object with --json, else lines for people.

    Args:
        lines: makes those lines; by default one for each key.
        any_rank: print on whichever rank this is; by default rank 0 alone prints.
    """
    if int(os.environ.get("RANK", 0)) and not any_rank:
        return
    if args.json:
        say(json.dumps(result))
        return
    for line in lines() if lines else key_lines(result):
        say(line)


def report_and_warn(
    args: argparse.Namespace, result: dict[str, Any], lines: Callable[[], list[str]] | None = None
) -> None:
    """As `report`; the result's `warnings` go to stderr, too, a line each."""
    for line in result["warnings"]:
        logging.getLogger("dit_ds").warning(f"warning: {line}")
    report(args, result, lines)


def key_lines(result: dict[str, Any]) -> list[str]:
    """A result as lines for people: each key and its value, but for warnings."""
    shown = {k: v for k, v in result.items() if k != "warnings"}
    return [f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in shown.items()]


def command(parent: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """Declare a command with `--json`.

    Args:
        parent: what `add_subparsers` returned.
        run: carries it out and returns the exit status.
    """
    sub = parent.add_parser(name, help=help, description=help)
    sub.set_defaults(run=run, parser=sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return sub


def given_folder(args: argparse.Namespace) -> str:
    """The output folder of a command that takes it as an argument or as `--out`.

    Raises:
        UserError: it is missing, or given twice.
    """
    if args.folder is not None and args.out is not None:
        raise UserError(f"{args.folder} and --out {args.out} both say where it goes: give one of them")
    if args.folder is None and args.out is None:
        raise UserError("the folder to write is required: name it, or give --out FOLDER")
    return args.out if args.folder is None else args.folder


def optional_config(args: argparse.Namespace) -> RunConfig | None:
    """The configuration of a command that can do without one.

    Raises:
        UserError: as of `load_config`, or there is nothing that the overrides override.
    """
    from dit_ds.config.load import load_config

    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]} overrides a configuration: name one with --config")
    return load_config(args.config, args.overrides) if args.config else None


def config_options(p: argparse.ArgumentParser) -> None:
    """Options of a command that reads a run's configuration, with overrides as in train."""
    p.add_argument(
        "--config", required=True, help="YAML file, or a name of the package's, as base; overrides as in train"
    )
    p.set_defaults(takes_overrides=True)
