"""Commands about runs: train, check, evaluate, predict."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dit_ds.cli.arguments import Coordinates, from_one, probability, seconds, whole
from dit_ds.cli.output import command, optional_config, report, report_and_warn


def add(commands: Any) -> None:
    """Add `train`, `doctor`, `eval` and `predict` to the parser's commands."""
    _add_train(commands)
    p = command(commands, "doctor", _doctor, "check this machine, or all ranks under srun or torchrun, before a run")
    p.add_argument("--config", help="check what this configuration needs too; --section.key value overrides it")
    p.add_argument("--timeout", type=seconds, default=60, help="seconds to wait for the other ranks (default 60)")
    p.set_defaults(takes_overrides=True)
    _add_eval(commands)
    _add_predict(commands)


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
    p.add_argument("--config", required=True, help="YAML file, as configs/base.yaml")
    p.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint, or start where there is none"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.set_defaults(run=_train, takes_overrides=True)


def _add_eval(commands: Any) -> None:
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
    p.add_argument("--batch-size", type=from_one, help="expressions at once on a rank (default: the run's)")
    p.add_argument("--workers", type=whole(0, 1024), help="loader processes a rank (default: the run's)")
    p.add_argument(
        "--threshold", type=probability, help="a pixel is in above this probability (default: the run's, 0.35)"
    )
    p.add_argument(
        "--image-size", type=whole(16, 8192), help="side of the square input, in pixels (default: the run's)"
    )
    p.add_argument("--shuffle-text", action="store_true", help="control: give each image another image's expressions")
    p.add_argument("--predictions", metavar="DIR", help="write each predicted mask as DIR/IMAGE_EXPRESSION.png")


def _add_predict(commands: Any) -> None:
    p = command(commands, "predict", _predict, "segment what words, points or a box mean in one picture")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--image", required=True, help="the picture")
    p.add_argument("--text", help="the words, as 'the left star'")
    p.add_argument(
        "--point",
        metavar="X,Y",
        type=Coordinates("X,Y"),
        action="append",
        default=[],
        help="a point on the object, in pixels of the picture as viewers show it; may be repeated",
    )
    p.add_argument("--box", metavar="X0,Y0,X1,Y1", type=Coordinates("X0,Y0,X1,Y1"), help="a box around the object")
    p.add_argument("--out", required=True, help="picture to write: the picture beside the prediction")
    p.add_argument(
        "--threshold", type=probability, help="a pixel is in above this probability (default: the run's, 0.35)"
    )


def _train(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)  # before torch is imported: what is wrong is said at once
    from dit_ds.planning.memory.allocator_settings import use_train_settings

    use_train_settings(os.environ)
    from dit_ds.training.train import train

    report(args, train(config, args.resume))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    config = optional_config(args)
    # before torch is imported: its traces of failed connections, which the checks report in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from dit_ds import doctor

    return doctor.examine(config, args.timeout, lambda result: report(args, result, lambda: doctor.lines(result)))


def _eval(args: argparse.Namespace) -> int:
    from dit_ds.evaluation.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        args.run_or_checkpoint,
        args.split,
        data_root=args.data_root,
        batch_size=args.batch_size,
        workers=args.workers,
        shuffle_text=args.shuffle_text,
        threshold=args.threshold,
        predictions=args.predictions,
        prompt=args.prompt,
        image_size=args.image_size,
    )
    report(args, result)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from dit_ds.visualize.prediction import predict_image

    result = predict_image(
        args.checkpoint,
        args.image,
        args.out,
        text=args.text,
        points=args.point,
        box=args.box,
        threshold=args.threshold,
    )
    report_and_warn(args, result)
    return 0
