"""Commands about runs: train and check."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from dit_ds.cli.arguments import seconds
from dit_ds.cli.output import command, key_lines, optional_config, report

if TYPE_CHECKING:
    from dit_ds.config.schema import RunConfig


def add(commands: Any) -> None:
    """Add `train` and `doctor` to the parser's commands."""
    _add_train(commands)
    p = command(commands, "doctor", _doctor, "check this machine, or all ranks under srun or torchrun, before a run")
    p.add_argument("--config", help="check what this configuration needs too; --section.key value overrides it")
    p.add_argument("--timeout", type=seconds, default=60, help="seconds to wait for the other ranks (default 60)")
    p.set_defaults(takes_overrides=True)


class _TrainHelp(argparse.Action):
    """Prints the configuration's keys too, which take a moment to load."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dit_ds.config.load import help_text

        parser.print_help()
        print("\n" + help_text())
        parser.exit()


def _add_train(commands: Any) -> None:
    p = commands.add_parser("train", help="train; one process, or each rank under torchrun or srun", add_help=False,
                            usage="dit-ds train --config C [--resume] [--json] [--section.key value ...]")  # fmt: skip
    p.add_argument("-h", "--help", action=_TrainHelp, nargs=0, help="show every option and configuration key")
    p.add_argument(
        "--config",
        required=True,
        help="YAML file, or the name of one that comes with dit-ds: base, sample, table1_default, ..",
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint, or start where there is none"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.set_defaults(run=_train, parser=p, takes_overrides=True)


def _train(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)  # before torch is imported: what is wrong is said at once
    from dit_ds.planning.memory.allocator_settings import use_train_settings

    use_train_settings(os.environ)
    from dit_ds.training.train import train

    result = train(config, args.resume)
    report(args, result, lambda: [*key_lines(result), *_next_lines(config, result)])
    return 0


def _next_lines(config: RunConfig, result: dict[str, Any]) -> list[str]:
    """What a training leaves, and what to do with it; after one that was stopped, how to go on."""
    from dit_ds.checkpointing.reader import all_checkpoints, find

    run, newest = result["run"], all_checkpoints(result["run"])
    lines = []
    if newest:
        best = find(run)
        lines.append(f"checkpoint: {newest[-1]}" + (f"; the best: {best}" if best != newest[-1] else ""))
    if result.get("stopped"):
        return [*lines, f"next: dit-ds train --config {run}/config.yaml --resume    # goes on"]
    prompt = {"text": "--text 'WORDS'", "point": "--point X,Y", "box": "--box X0,Y0,X1,Y1"}[config.data.default_prompt]
    return [
        *lines,
        f"next: dit-ds eval {run} --split {config.data.val_split}",
        f"      dit-ds predict {run} --image PICTURE {prompt} --out prediction.png",
        f"      dit-ds sheet {run} --out sheet.png    # expressions, masks and predictions side by side",
    ]


def _doctor(args: argparse.Namespace) -> int:
    config = optional_config(args)
    # before torch is imported: its traces of failed connections, which the checks report in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from dit_ds import doctor

    return doctor.examine(config, args.timeout, lambda result: report(args, result, lambda: doctor.lines(result)))
