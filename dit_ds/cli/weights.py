"""Commands about files of weights: export and import."""

from __future__ import annotations

import argparse
from typing import Any

from dit_ds.cli.output import command, report, report_and_warn
from dit_ds.errors import UserError


def add(commands: Any) -> None:
    """Add `export` and `import` to the parser's commands."""
    _add_import(commands)
    p = command(commands, "export", _export, "write a checkpoint's model: as one file, or for others")
    p.add_argument("checkpoint", help="a run's folder, one of its checkpoints/step_*, or an exported file")
    p.add_argument(
        "--out", required=True, help="file to write, as model.safetensors or model.onnx; of transformers, a new folder"
    )
    p.add_argument(
        "--format",
        choices=["safetensors", "onnx", "transformers"],
        default="safetensors",
        help="safetensors (default): for dit-ds, and to train from; onnx: for onnxruntime, compared with the model there; "
        "transformers: a folder with a SamModel, of model.scheme default",
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--adapter",
        action="store_true",
        help="only what was trained (LoRA, projections, decoder); model.checkpoint and text.name give the rest",
    )
    what.add_argument("--merge", action="store_true", help="add LoRA's updates to the weights that they belong to")
    p.add_argument("--base", metavar="FILE", help="where an adapter's model.checkpoint is, if it moved since training")
    p.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32; onnx: fp32)"
    )


def _export(args: argparse.Namespace) -> int:
    if args.format != "safetensors" and (args.adapter or args.merge or args.base):
        raise UserError(f"--adapter, --merge and --base make a .safetensors file: leave them out, or export that first, and "
                        f"then the file with --format {args.format}")  # fmt: skip
    if args.format == "onnx":
        if args.dtype != "fp32":
            raise UserError(f"--format onnx is written in fp32: leave out --dtype {args.dtype}")
        from dit_ds.checkpointing.export_onnx import export_onnx

        report_and_warn(args, export_onnx(args.checkpoint, args.out))
        return 0
    import torch

    from dit_ds.checkpointing.export import export

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.format == "transformers":
        from dit_ds.checkpointing.export_transformers import export_transformers

        report(args, export_transformers(args.checkpoint, args.out, dtype))
        return 0
    options = {"adapter": args.adapter, "merge": args.merge, "base": args.base}
    report(args, export(args.checkpoint, args.out, dtype, **options))
    return 0


def _add_import(commands: Any) -> None:
    p = command(
        commands, "import", _import, "write another program's checkpoint as ours, with the configuration for it"
    )
    p.add_argument(
        "file",
        metavar="FILE",
        help="a .pth, .bin, .pkl or .safetensors, the index of a sharded one, or a folder of transformers; "
        "it is read as data, and nothing in it is run",
    )
    p.add_argument("--from", dest="source", choices=["auto", "dit", "lavt", "rela", "sam", "transformers"],
                   default="auto", help="whose it is: the paper's released code, LAVT, ReLA, SAM in its own names or in "
                   "transformers' (default auto: by its names)")  # fmt: skip
    p.add_argument("--out", required=True, metavar="X.safetensors", help="file to write; X.yaml goes beside it")
    p.add_argument("--scheme", choices=["end_to_end", "layer_wise"],
                   help="of DIT's E-DIT and L-DIT, whose tensors have the same names")  # fmt: skip
    p.add_argument("--text", metavar="NAME", help="the text encoder that it was trained with, as text.name (default "
                   "bert-base-uncased)")  # fmt: skip


def _import(args: argparse.Namespace) -> int:
    from dit_ds.checkpointing import import_weights

    result = import_weights.import_weights(args.file, args.out, args.source, scheme=args.scheme, text=args.text)
    report(args, result, lambda: import_weights.lines(result))
    return 0
