"""The command line: parses, calls, prints. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from dit_ds import __version__
from dit_ds.cli import data as cli_data
from dit_ds.cli import figures as cli_figures
from dit_ds.cli import paper as cli_paper
from dit_ds.cli import planning as cli_planning
from dit_ds.cli.output import command
from dit_ds.cli.runs import _doctor, _eval, _export, _numbers, _predict, _seconds, _train
from dit_ds.errors import Interrupted, RankFailed, RunFailed, UserError


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 ran and failed, 2 the request was wrong, 75 go on later."""
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "takes_overrides", False):
            parser.error(f"unknown argument {rest[0]}: see 'dit-ds {args.command} --help'")
        if not hasattr(args, "run"):
            args.group.print_help()
            return 2
        args.overrides = rest
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("dit_ds").setLevel(logging.INFO)
        return args.run(args)
    except UserError as e:
        return _fail(e, 2)
    except (RunFailed, RankFailed) as e:
        return _fail(e, 1)
    except Interrupted as e:
        return _fail(e, 75)  # EX_TEMPFAIL: slurm/train.sbatch requeues the job
    except KeyboardInterrupt:
        print("dit-ds: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(error: Exception, status: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    label = f"dit-ds (rank {rank})" if rank else "dit-ds"
    kind = "" if isinstance(error, Interrupted) else "error: "
    print(f"{label}: {kind}{' '.join(str(error).split())}", file=sys.stderr)
    return status


# --- runs ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dit-ds", description="Deep Instruction Tuning for SAM, trained at scale on DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=f"dit-ds {__version__}")
    parser.set_defaults(group=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    cli_data.add(commands)

    class TrainHelp(argparse.Action):
        """Prints the configuration's keys too, which take a moment to load."""

        def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
            from dit_ds.config.load import help_text

            parser.print_help()
            print("\n" + help_text())
            parser.exit()

    p = commands.add_parser("train", help="train; one process, or each rank under torchrun or srun", add_help=False,
                            usage="dit-ds train --config C [--resume] [--json] [--section.key value ...]")  # fmt: skip
    p.add_argument("-h", "--help", action=TrainHelp, nargs=0, help="show every option and configuration key")
    p.add_argument("--config", required=True, help="YAML file, as configs/base.yaml")
    p.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint, or start where there is none"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.set_defaults(run=_train, takes_overrides=True)

    p = command(commands, "doctor", _doctor, "check this machine, or all ranks under srun or torchrun, before a run")
    p.add_argument("--config", help="check what this configuration needs too; --section.key value overrides it")
    p.add_argument("--timeout", type=_seconds, default=60, help="seconds to wait for the other ranks (default 60)")
    p.set_defaults(takes_overrides=True)

    p = command(commands, "eval", _eval, "evaluate a run's best checkpoint, or a given one, on one split")
    p.add_argument(
        "run_or_checkpoint",
        help="a run's folder or one of its checkpoints/step_*; or a YAML file: its model.checkpoint, not tuned",
    )
    p.add_argument("--split", default="val", help="val, testA, testB, test, ... (default val)")
    p.add_argument(
        "--prompt",
        choices=["text", "point", "box"],
        help="what says which object is meant; points and boxes are made of the ground truth (default: text, if the run "
        "was trained on it)",
    )
    p.add_argument("--data-root", help="where the shards are, if they moved since training")
    p.add_argument("--batch-size", type=int, help="expressions at once on a rank (default: the run's)")
    p.add_argument("--workers", type=int, help="loader processes a rank (default: the run's)")
    p.add_argument("--threshold", type=float, help="a pixel is in above this probability (default: the run's, 0.35)")
    p.add_argument("--shuffle-text", action="store_true", help="control: give each image another image's expressions")
    p.add_argument("--predictions", metavar="DIR", help="write each predicted mask as DIR/IMAGE_EXPRESSION.png")

    p = command(commands, "predict", _predict, "segment what words, points or a box mean in one picture")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--image", required=True, help="the picture")
    p.add_argument("--text", help="the words, as 'the left star'")
    p.add_argument(
        "--point",
        metavar="X,Y",
        type=_numbers("X,Y"),
        action="append",
        default=[],
        help="a point on the object, in pixels of the picture; may be repeated",
    )
    p.add_argument("--box", metavar="X0,Y0,X1,Y1", type=_numbers("X0,Y0,X1,Y1"), help="a box around the object")
    p.add_argument("--out", required=True, help="PNG to write: the picture beside the prediction")
    p.add_argument("--threshold", type=float, help="a pixel is in above this probability (default: the run's, 0.35)")

    p = command(commands, "export", _export, "write a checkpoint's model as one safetensors file")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--out", required=True, help="file to write, as model.safetensors")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")

    cli_figures.add(commands)
    cli_planning.add(commands)
    cli_paper.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
