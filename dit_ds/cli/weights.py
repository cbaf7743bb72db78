"""Commands about files of weights: export."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.output import command, report


def add(commands: Any) -> None:
    """Add `export` to the parser's commands."""
    p = command(commands, "export", _export, "write a checkpoint's model as one safetensors file")
    p.add_argument("checkpoint", help="a run's folder, one of its checkpoints/step_*, or an exported file")
    p.add_argument("--out", required=True, help="file to write, as model.safetensors")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--adapter",
        action="store_true",
        help="only what was trained (LoRA, projections, decoder); model.checkpoint and text.name give the rest",
    )
    what.add_argument("--merge", action="store_true", help="add LoRA's updates to the weights that they belong to")
    p.add_argument("--base", metavar="FILE", help="where an adapter's model.checkpoint is, if it moved since training")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")


def _export(args: argparse.Namespace) -> int:
    import torch

    from dit_ds.checkpointing.export import export

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    options = {"adapter": args.adapter, "merge": args.merge, "base": args.base}
    report(args, export(args.checkpoint, args.out, dtype, **options))
    return 0
