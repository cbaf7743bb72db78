"""Commands about files of weights: export."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.output import command, report, report_and_warn
from dit_ds.errors import UserError


def add(commands: Any) -> None:
    """Add `export` to the parser's commands."""
    p = command(commands, "export", _export, "write a checkpoint's model as one file: safetensors or ONNX")
    p.add_argument("checkpoint", help="a run's folder or one of its checkpoints/step_*")
    p.add_argument("--out", required=True, help="file to write, as model.safetensors or model.onnx")
    p.add_argument(
        "--format",
        choices=["safetensors", "onnx"],
        default="safetensors",
        help="safetensors (default): for dit-ds, and to train from; onnx: for onnxruntime, compared with the model there",
    )
    p.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32; onnx: fp32)"
    )


def _export(args: argparse.Namespace) -> int:
    if args.format == "onnx":
        if args.dtype != "fp32":
            raise UserError(f"--format onnx is written in fp32: leave out --dtype {args.dtype}")
        from dit_ds.checkpointing.export_onnx import export_onnx

        report_and_warn(args, export_onnx(args.checkpoint, args.out))
        return 0
    import torch

    from dit_ds.checkpointing.export import export

    report(args, export(args.checkpoint, args.out, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]))
    return 0
