"""The command line's entry: assembles the parser, runs a command, turns its errors into one line and an exit status.

Every module of commands has `add`, which declares them. What is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from dit_ds import __version__
from dit_ds.cli import data, figures, pages, paper, planning, predict, runs, start, status, weights
from dit_ds.cli.output import stdout_for_results
from dit_ds.config.suggestions import command_meant, option_meant
from dit_ds.data.progress import LineHandler, write_line
from dit_ds.errors import Interrupted, RankFailed, RunFailed, UserError


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its arguments; by default the process's.
    Returns:
        The exit status: 0 done, 1 it ran and failed, 2 the request was wrong, 75 interrupted, to be resumed. (76: see
        `training.watchdog`.)
    """
    try:
        parser = make_parser()
        args, rest = parser.parse_known_args(argv)
        _check_unknown(rest, args)
        if not hasattr(args, "run"):
            args.group.print_help()
            return 2
        args.overrides = rest
        logging.basicConfig(format="%(message)s", handlers=[LineHandler()])
        logging.getLogger("dit_ds").setLevel(logging.INFO)
        with stdout_for_results():
            return args.run(args)
    except UserError as e:
        return _fail(e, 2)
    except (RunFailed, RankFailed) as e:
        return _fail(e, 1)
    except Interrupted as e:
        return _fail(e, 75)  # EX_TEMPFAIL: slurm/train.sbatch requeues the job
    except KeyboardInterrupt:
        write_line("dit-ds: interrupted")
        return 130
    except PermissionError as e:
        if e.filename is None:
            raise
        return _fail(UserError(f"cannot use {e.filename} (permission denied): ask its owner, or choose another"), 2)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _check_unknown(words: list[str], args: argparse.Namespace) -> None:
    """See that words that the parser did not know may override a configuration's keys.

    Raises:
        UserError: they are none; with the option that was probably meant.
    """
    parser: argparse.ArgumentParser = getattr(args, "parser", args.group)
    overrides = getattr(args, "takes_overrides", False)
    for word in words:
        name = word.partition("=")[0]
        if overrides and (not name.startswith("--") or "." in name or name[2:] in _top_level_keys()):
            continue
        hint = _option_hint(word, parser) if word.startswith("-") else None
        if hint or not overrides:
            raise UserError("unknown argument " + (hint or f"{word}: see '{parser.prog} --help'"))


def _option_hint(word: str, parser: argparse.ArgumentParser) -> str | None:
    """The option that `word` is not, and the one of the parser's that was probably meant; None where there is none."""
    name, options = word.partition("=")[0], re.findall(r"--[\w-]+", parser.format_usage())
    if any(option.startswith(name) for option in options):  # it is one, or short for it
        return None
    meant = option_meant(word, options)
    return f"{name}: did you mean {meant}?" if meant else None


def _top_level_keys() -> Iterable[str]:
    from dit_ds.config.schema import RunConfig

    return RunConfig.model_fields


def _fail(error: Exception, status: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    label = f"dit-ds (rank {rank})" if rank else "dit-ds"
    kind = "" if isinstance(error, Interrupted) else "error: "
    write_line(f"{label}: {kind}{' '.join(str(error).split())}")
    return status


class _StoreOnce(argparse.Action):
    """Stores an option's value; refuses a second one, which would silently replace the first."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option and self.given:
            parser.error(f"{option} is given twice: give it once")
        self.given = True
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Options that hold one value may be given once. So are those of the commands, whose parsers are of this class.

    What is wrong is said in the one line that every other wrong request is answered with.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._given: list[str] = []  # the words to parse
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's."""
        self._given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise it as a `UserError`, with the command, or the required option, that was probably meant."""
        if message.endswith("required") or "are required: " in message:
            for word in self._given:
                if word.startswith("--") and (hint := _option_hint(word, self)):
                    raise UserError(f"unknown argument {hint}")
        if choice := re.fullmatch(r"argument COMMAND: (invalid choice: '(.*)') \(choose from (.*)\)", message):
            if meant := command_meant(choice[2], choice[3].replace("'", "").split(", ")):
                raise UserError(f"{choice[1]}: did you mean '{self.prog} {meant}'?")
        raise UserError(f"{message}: see '{self.prog} --help'")


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; what it can't read raises a `UserError`."""
    parser = _Parser("dit-ds", description="Deep Instruction Tuning for SAM, trained at scale on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"dit-ds {__version__}")
    parser.set_defaults(group=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (start, data, runs, predict, status, weights, figures, pages, planning, paper):
        module.add(commands)
    return parser
