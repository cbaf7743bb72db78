"""What commands share: how they are declared, and how they say their results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any


def report(
    args: argparse.Namespace,
    result: dict[str, Any],
    lines: Callable[[], list[str]] | None = None,
    any_rank: bool = False,
) -> None:
    """Print the result, on rank 0 or the one that is told to: one JSON object with --json, else lines for people."""
    if int(os.environ.get("RANK", 0)) and not any_rank:
        return
    if args.json:
        print(json.dumps(result))
    else:
        for line in (
            lines() if lines else [f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items()]
        ):
            print(line)


def command(parent: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """A command that can answer in JSON."""
    sub = parent.add_parser(name, help=help, description=help)
    sub.set_defaults(run=run)
    sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return sub


def from_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    return _from(1, text)


def from_zero(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    return _from(0, text)


def _from(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least} on")
    return int(text)
