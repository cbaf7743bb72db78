"""Commands about files of weights: export."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.output import command, report


def add(commands: Any) -> None:
    """Add `export` to the parser's commands."""
    p = command(commands, "export", _export, "write a checkpoint's model as one safetensors file")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--out", required=True, help="file to write, as model.safetensors")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")


def _export(args: argparse.Namespace) -> int:
    import torch

    from dit_ds.checkpointing.export import export

    report(args, export(args.checkpoint, args.out, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]))
    return 0
