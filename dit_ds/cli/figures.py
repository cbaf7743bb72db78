"""Commands that draw: predictions side by side, attention by layer, contact sheets."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.arguments import Several, from_zero, names, share, whole
from dit_ds.cli.output import command, report, report_and_warn


def add(commands: Any) -> None:
    """Add `sheet`, `grid` and `attention` to the parser's commands."""
    p = command(commands, "sheet", _sheet, "a contact sheet: image, words, ground truth, prediction")
    p.add_argument("run_or_checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--out", required=True, metavar="FILE", help="PNG or PDF to write")
    _split_options(p)
    p.add_argument("--rows", type=whole(1, 1000), default=8, help="expressions to show (default 8)")

    p = command(commands, "grid", _grid, "figure 4: the predictions of several checkpoints, wrong ones framed red")
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="runs' folders or checkpoints, of one data set")
    p.add_argument("--out", required=True, metavar="FILE", help="PNG or PDF to write")
    _split_options(p)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--rows", type=whole(1, 1000), default=8, help="expressions, spread over the split (default 8)")
    which.add_argument(
        "--samples", type=Several(from_zero), help="these, by their numbers in the split from 0 on, as 3,17"
    )
    p.add_argument("--wrong-below", type=share, default=0.5, metavar="IOU", help="frame these (default 0.5)")
    p.add_argument("--titles", type=names, help="of the checkpoints, as SAM,E-DIT,L-DIT "
                   "(default: scheme and what is frozen)")  # fmt: skip

    p = command(commands, "attention", _attention, "figure 5: what the words attend to in each layer of the ViT")
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="runs' folders or checkpoints, a row each")
    p.add_argument("--image", required=True, help="the picture")
    p.add_argument("--text", required=True, help="the words, as 'the left star'")
    p.add_argument("--out", required=True, metavar="FILE", help="PNG or PDF to write")
    p.add_argument("--words", action="store_true", help="a row for each word, too, of one checkpoint")
    p.add_argument("--layers", type=Several(whole(1, 1000)), help="only these, from 1 on, as 1,4,12 (default: all)")


def _split_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--split", default="val", help="which split (default val)")
    p.add_argument("--data-root", help="where the shards are, if they moved since training")


def _sheet(args: argparse.Namespace) -> int:
    from dit_ds.visualize.figures import contact_sheet

    report(args, contact_sheet(args.run_or_checkpoint, args.out, args.split, data_root=args.data_root, rows=args.rows))
    return 0


def _grid(args: argparse.Namespace) -> int:
    from dit_ds.visualize import figures

    result = figures.grid(
        args.checkpoints,
        args.out,
        args.split,
        data_root=args.data_root,
        rows=args.rows,
        samples=args.samples,
        wrong_below=args.wrong_below,
        titles=args.titles,
    )
    report(args, result, lambda: figures.grid_lines(result))
    return 0


def _attention(args: argparse.Namespace) -> int:
    from dit_ds.visualize import attention

    result = attention.attention(
        args.checkpoints, args.image, args.text, args.out, by_word=args.words, layers=args.layers
    )
    report_and_warn(args, result, lambda: attention.attention_lines(result))
    return 0
