"""Commands about runs: train, check, evaluate, predict, export."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

from dit_ds.cli.output import report
from dit_ds.errors import UserError


def _train(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    from dit_ds.training.train import train

    result = train(config, args.resume)
    report(args, result)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]} overrides a configuration: name one with --config")
    config = load_config(args.config, args.overrides) if args.config else None
    # before torch is imported: its traces of failed connections, of which the checks say the same in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from dit_ds import doctor

    return doctor.examine(config, args.timeout, lambda result: report(args, result, lambda: doctor.lines(result)))


def _eval(args: argparse.Namespace) -> int:
    from dit_ds.evaluation.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        args.run_or_checkpoint,
        args.split,
        args.data_root,
        args.batch_size,
        args.workers,
        args.shuffle_text,
        args.threshold,
        args.predictions,
        args.prompt,
    )
    report(args, result)
    return 0


def _numbers(names: str) -> Callable[[str], tuple[float, ...]]:
    def parse(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(x) for x in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != len(names.split(",")) or not all(map(math.isfinite, numbers)):
            raise argparse.ArgumentTypeError(f"'{text}' does not read {names}, in pixels of the picture")
        return numbers

    return parse


def _predict(args: argparse.Namespace) -> int:
    from dit_ds.visualize.prediction import predict_image

    result = predict_image(args.checkpoint, args.image, args.text, args.out, args.threshold, args.point, args.box)
    report(args, result)
    return 0


def _export(args: argparse.Namespace) -> int:
    import torch

    from dit_ds.checkpointing.export import export

    report(args, export(args.checkpoint, args.out, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]))
    return 0


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdigit() or not 0 < float(text) <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 0 to 3600")
    return float(text)
