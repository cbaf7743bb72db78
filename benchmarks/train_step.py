"""Whole training steps of DITSAM under DeepSpeed against the naive formulation.

Timed in one process, alternating, from the same weights and batch: forward, loss, backward, Adam. On a CPU the ViTs have
their full width and `--layers` layers, in fp32; on a GPU all layers, in bf16. Writes train_step.json, .md and .png;
`--json` prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import common, step_parts  # noqa: E402
from dit_ds.config.load import validate  # noqa: E402
from dit_ds.config.schema import RunConfig  # noqa: E402
from dit_ds.distributed import connect, disconnect  # noqa: E402
from dit_ds.engine import engine as ds  # noqa: E402
from dit_ds.files import GIB  # noqa: E402
from dit_ds.models.build import build_model  # noqa: E402
from dit_ds.models.losses import segmentation_loss  # noqa: E402
from dit_ds.models.sam import SIZES  # noqa: E402
from dit_ds.planning.flops import step_flops  # noqa: E402
from dit_ds.planning.gpus import peak_flops  # noqa: E402
from dit_ds.planning.memory.profiled_step import fake_batch  # noqa: E402

MODES = {  # frozen image encoder, frozen text encoder
    "frozen": (True, True),
    "text_tuned": (True, False),
    "tuned": (False, False),
}


def configuration(
    width: str, size: int, mode: str, batch: int, bf16: bool, policy: str = "none", attention: str = "auto"
) -> RunConfig:
    """A run with BERT-base's shape and random weights on one rank without sharding."""
    freeze_image, freeze_text = MODES[mode]
    override = {"train_micro_batch_size_per_gpu": batch, "bf16": {"enabled": bf16}}
    return validate(
        {
            "data": {"image_size": size},
            "model": {"size": width, "freeze_image_encoder": freeze_image, "attention": attention},
            "text": {
                "name": str(ROOT / "configs/text/bert_base"),
                "random_init": True,
                "freeze": freeze_text,
            },
            "train": {"batch_size": batch, "activation_checkpointing": policy},
            "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero0.json"), "override": override},
        }
    )


class Step:
    """A model in a DeepSpeed engine and one batch for it; call it to take a training step."""

    def __init__(self, config: RunConfig, world, compile_blocks: bool = False):
        self.model = build_model(config).to(world.device)
        self.model.image_encoder.checkpoint_activations(config.train.activation_checkpointing)
        if compile_blocks:
            self.model.image_encoder.compile_blocks()
        self.engine = ds.initialize(self.model, config, world)
        self.engine.train()
        batch = fake_batch(config.train.batch_size, config.data.image_size, config.data.tokens)
        self.inputs, self.mask, self.weight = torch.utils._pytree.tree_map(lambda x: x.to(world.device), batch)
        g = torch.Generator().manual_seed(0)
        self.inputs["image"] = torch.randint(0, 256, batch[0]["image"].shape, generator=g, dtype=torch.uint8).to(
            world.device
        )

    def forward(self) -> torch.Tensor:
        return segmentation_loss(self.engine(**self.inputs), self.mask, self.weight)

    def __call__(self) -> None:
        self.engine.backward(self.forward())
        self.engine.step()


@contextlib.contextmanager
def depth(width: str, layers: int | None):
    """The ViT cut to so many layers."""
    whole = SIZES[width]
    SIZES[width] = replace(whole, depth=min(layers or whole.depth, whole.depth))
    try:
        yield SIZES[width].depth
    finally:
        SIZES[width] = whole


def compare(width: str, size: int, mode: str, batch: int, variant: str, args, world) -> dict:
    """Our step beside the naive formulation's, another checkpointing policy's or the compiled blocks', alternating.

    Where both don't fit into the GPU, at half the batch.
    """
    device = world.device.type
    config = configuration(width, size, mode, batch, bf16=device == "cuda")
    policy = "none" if variant in ("naive", "compiled") else variant
    attention = "naive" if variant == "naive" else "auto"
    changed = configuration(width, size, mode, batch, bf16=device == "cuda", policy=policy, attention=attention)
    try:
        steps = {
            "ours": Step(config, world),
            variant: Step(changed, world, compile_blocks=variant == "compiled"),
        }
        seconds = common.alternate(steps, args.rounds if size <= 512 else max(2, args.rounds // 2), device)
        return {
            "batch": batch,
            "seconds": seconds,
            "peak_bytes": {n: common.peak_bytes(step, device) for n, step in steps.items()},
            "saved_bytes": {n: common.saved_bytes(s.forward) for n, s in steps.items() if n != "compiled"},
        }
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    steps = {}  # freed before the next try
    gc.collect()
    torch.cuda.empty_cache()
    return compare(width, size, mode, batch // 2, variant, args, world)


def timed_row(width: str, size: int, mode: str, batch: int, args, world, flop_rate: float) -> dict:
    """Steps timed beside the naive formulation's."""
    device = world.device.type
    with depth(width, args.layers or (None if device == "cuda" else 1 if width == "vit_h" else 3)) as layers:
        flops = step_flops(configuration(width, size, mode, batch, bf16=False))
        variants = ["naive", *args.policies] + ["compiled"] * args.compile
        pairs = {}
        for variant in variants:
            pairs[variant] = compare(width, size, mode, batch, variant, args, world)
            gc.collect()
    pair = pairs["naive"]
    ours, naive, batch = pair["seconds"]["ours"], pair["seconds"]["naive"], pair["batch"]
    saved, peak = pair["saved_bytes"], pair["peak_bytes"]
    return {
        "width": width, "size": size, "device": device, "mode": mode, "batch": batch,
        "layers": layers, "dtype": "bfloat16" if device == "cuda" else "float32",
        "step_seconds": ours, "naive_seconds": naive, "speedup": naive / ours,
        "saved_bytes": saved["ours"], "naive_saved_bytes": saved["naive"],
        "memory_ratio": saved["ours"] / saved["naive"],
        "peak_bytes": peak["ours"], "naive_peak_bytes": peak["naive"],
        "samples_per_second": batch / ours,
        "flops_per_sample": flops, "mfu": flops * batch / ours / flop_rate, "mfu_of": flop_rate,
        "variants": {
            v: {
                "batch": p["batch"],
                "relative_seconds": p["seconds"][v] / p["seconds"]["ours"],
                "saved_bytes": p["saved_bytes"].get(v),  # compiled code's tensors are not seen
                "peak_bytes": p["peak_bytes"][v],
            }
            for v, p in pairs.items() if v != "naive"
        },
    }  # fmt: skip


TIMED = {
    "ViT": lambda r: f"{r['width']}, {r['layers']} layer" + "s" * (r["layers"] > 1),
    "px": lambda r: r["size"],
    "mode": lambda r: r["mode"],
    "batch": lambda r: r["batch"],
    "s/step": lambda r: f"{r['step_seconds']:.2f}",
    "naive": lambda r: f"{r['naive_seconds']:.2f}",
    "faster": lambda r: f"{r['speedup']:.2f}x",
    "MFU": lambda r: f"{r['mfu']:.0%}",
    "kept GiB": lambda r: f"{r['saved_bytes'] / GIB:.2f}",
    "naive kept": lambda r: f"{r['naive_saved_bytes'] / GIB:.2f}",
    "ratio": lambda r: f"{r['memory_ratio']:.2f}",
    "peak GiB": lambda r: f"{r['peak_bytes'] / GIB:.2f}",
    "naive peak": lambda r: f"{r['naive_peak_bytes'] / GIB:.2f}",
    "variants: time, kept": lambda r: ", ".join(
        f"{n} {v['relative_seconds']:.2f}x" + (f", {v['saved_bytes'] / GIB:.2f} GiB" if v["saved_bytes"] else "")
        for n, v in r["variants"].items()
    ),
}


def report(result: dict) -> str:
    """The Markdown of the table."""
    text = f"# Training steps\n\n{result['machine']}, {result['date']}.\n\n"
    text += "## Timed, against the naive formulation\n\n"
    text += "kept: bytes that wait for the backward pass; peak: measured, beyond what was there before the step. "
    text += "MFU: matrix products and convolutions of one step, none computed twice, over "
    rate = result["rows"][0]["mfu_of"] / 1e12
    text += f"{rate:.0f} TFLOP/s.\n\n" if rate >= 10 else "the rate of a large matrix product here.\n\n"
    text += common.table(result["rows"], TIMED)
    return text + step_parts.report(result["parts"])


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", nargs="+", default=["vit_b", "vit_h"], choices=list(SIZES))
    parser.add_argument("--size", nargs="+", type=int, default=[512, 1024], help="pixels")
    parser.add_argument("--mode", nargs="+", default=["frozen", "tuned"], choices=list(MODES))
    parser.add_argument("--batch", type=int, default=32 if cuda else 2, help="at 512 px, a quarter above")
    parser.add_argument("--layers", type=int, help="of the timed ViTs; by default all on a GPU, on a CPU 3, of ViT-H 1")
    parser.add_argument("--policies", nargs="*", default=["block", "selective"], help="checkpointing to time, too")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the blocks, too")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 3)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--name", default="train_step_cuda" if cuda else "train_step", help="of the files written")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    world = connect()
    device = world.device.type
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if cuda else None
    flop_rate = peak or common.matmul_rate(device, torch.bfloat16 if cuda else torch.float32)
    rows = []
    for width in args.width:
        for size in args.size:
            for mode in args.mode:
                batch = args.batch if size <= 512 else max(1, args.batch // 4)
                rows.append(timed_row(width, size, mode, batch, args, world, flop_rate))
                print(common.table(rows[-1:], TIMED).splitlines()[-1], file=sys.stderr, flush=True)
    result = common.conditions(device) | {"benchmark": "train_step", "rows": rows}
    result["parts"] = step_parts.measure(device, args.rounds)
    common.write(args.out, args.name, result, report(result))
    common.plot(
        args.out / f"{args.name}.png",
        rows,
        lambda r: f"{r['width']} {r['size']} px {r['mode']}",
        f"A training step against the naive formulation ({result['machine']})",
    )
    disconnect()
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
