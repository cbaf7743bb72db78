"""Whole training steps of DITSAM under DeepSpeed against the naive formulation, and what Table 8's rows take.

Timed in one process, alternating, from the same weights and batch: forward, loss, backward, Adam. On a CPU the ViTs have
their full width and `--layers` layers, in fp32; on a GPU all layers, in bf16 against the naive formulation under
autocast. Counted with fake tensors at full depth: the peak of a step in bf16 at batch 32. On a GPU the counted rows are
measured, too. Writes train_step.json, .md and .png; `--json` prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import common  # noqa: E402
from dit_ds import engine as ds  # noqa: E402
from dit_ds.checkpoint import build_model  # noqa: E402
from dit_ds.config import RunConfig, validate  # noqa: E402
from dit_ds.distributed import connect, disconnect  # noqa: E402
from dit_ds.memory.fake_step import fake_batch, fake_tensors, training_step_memory  # noqa: E402
from dit_ds.models.dit_sam import segmentation_loss  # noqa: E402
from dit_ds.models.sam import SIZES  # noqa: E402

MODES = {  # frozen image encoder, frozen text encoder
    "frozen": (True, True),
    "text_tuned": (True, False),
    "tuned": (False, False),
}
TARGETS = {("vit_b", "frozen"): 2.5, ("vit_b", "text_tuned"): 3.8, ("vit_b", "tuned"): 4.8, ("vit_h", "tuned"): 16.0}


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

    def __init__(self, config: RunConfig, naive: bool, world, compile_blocks: bool = False):
        self.model = build_model(config).to(world.device)
        self.model.image_encoder.checkpoint_activations(config.train.activation_checkpointing)
        if compile_blocks:
            self.model.image_encoder.compile_blocks()
        if naive:
            common.make_naive(self.model, torch.bfloat16 if world.device.type == "cuda" else None)
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


def step_flops(config: RunConfig) -> int:
    """FLOPs of the matrix products and convolutions of one step a sample: unfolded attention, nothing computed twice.

    Counted by torch on fake tensors. Frozen parts count with the products that training needs of them.
    """
    one = config.model_copy(deep=True)
    one.model.attention, one.train.activation_checkpointing = "eager", "none"
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        model = build_model(one, text_weights=False)
        inputs, mask, weight = fake_batch(1, one.data.image_size, one.data.tokens)
        segmentation_loss(model(**inputs), mask, weight).backward()
    return counter.get_total_flops()


@contextlib.contextmanager
def depth(width: str, layers: int | None):
    """The ViT cut to so many layers."""
    whole = SIZES[width]
    SIZES[width] = replace(whole, depth=min(layers or whole.depth, whole.depth))
    try:
        yield SIZES[width].depth
    finally:
        SIZES[width] = whole


def timed_row(width: str, size: int, mode: str, batch: int, args, world, flop_rate: float) -> dict:
    """Steps timed beside the naive formulation's."""
    cuda = world.device.type == "cuda"
    row = {"width": width, "size": size, "device": world.device.type, "mode": mode, "batch": batch}
    with depth(width, args.layers) as layers:
        config = configuration(width, size, mode, batch, bf16=cuda)
        naive_config = configuration(width, size, mode, batch, bf16=False)
        flops = step_flops(config) * batch
        steps = {"ours": Step(config, False, world), "naive": Step(naive_config, True, world)}
        for policy in args.policies:
            changed = config.model_copy(deep=True)
            changed.train.activation_checkpointing = policy
            steps[policy] = Step(changed, False, world)
        if args.compile:
            steps["compiled"] = Step(config, False, world, compile_blocks=True)
        seconds = common.alternate(steps, args.rounds, world.device.type)
        peaks = {name: common.peak_bytes(step, world.device.type) for name, step in steps.items()}
        saved = {n: common.saved_bytes(steps[n].forward, list(steps[n].model.parameters())) for n in ("ours", "naive")}
    return row | {
        "layers": layers, "dtype": "bfloat16" if cuda else "float32",
        "step_seconds": seconds["ours"], "naive_seconds": seconds["naive"],
        "speedup": seconds["naive"] / seconds["ours"],
        "saved_bytes": saved["ours"], "naive_saved_bytes": saved["naive"],
        "memory_ratio": saved["ours"] / saved["naive"],
        "peak_bytes": peaks["ours"], "naive_peak_bytes": peaks["naive"],
        "samples_per_second": batch / seconds["ours"],
        "flops": flops, "mfu": flops / seconds["ours"] / flop_rate, "mfu_of": flop_rate,
        "relative_step_seconds": {n: s / seconds["ours"] for n, s in seconds.items()},
        "peak_bytes_by_variant": peaks,
    }  # fmt: skip


def counted_row(width: str, size: int, mode: str, batch: int, policy: str, naive: bool, world) -> dict:
    """A step's peak under fake tensors at full depth in bf16, by SDPA's memory-efficient kernel."""
    config = configuration(width, size, mode, batch, True, policy, "sdpa_efficient")
    phases = training_step_memory(config, world, change=common.make_naive if naive else None)
    row = {"width": width, "size": size, "mode": mode, "batch": batch, "checkpointing": policy, "naive": naive}
    return row | {"gib": {k: round(v / common.GIB, 3) for k, v in phases.items()}}


def table8(args, world) -> list[dict]:
    """Table 8's L-DIT rows and ViT-H's at batch 32 on one GPU: counted, and measured where there is a GPU."""
    rows = []
    for width in args.width:
        for mode in MODES:
            row = counted_row(width, 512, mode, 32, "block", False, world)
            row["target_gib"] = TARGETS.get((width, mode))
            if world.device.type == "cuda":
                config = configuration(width, 512, mode, 32, True, "block")
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                step = Step(config, False, world)
                step(), step()
                row["measured_gib"] = torch.cuda.max_memory_allocated() / common.GIB
                del step
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def counted(args, world) -> list[dict]:
    """Ours and the naive formulation, without checkpointing, at both sizes."""
    rows = []
    for width in args.width:
        for size in args.size:
            for mode in ("frozen", "tuned"):
                batch = 32 if size <= 512 else 8
                ours, naive = (counted_row(width, size, mode, batch, "none", n, world) for n in (False, True))
                ours["naive_gib"] = naive["gib"]
                rows.append(ours)
                print(json.dumps(ours), file=sys.stderr, flush=True)
    return rows


TIMED = {
    "ViT": lambda r: f"{r['width']}, {r['layers']} layers",
    "px": lambda r: r["size"],
    "mode": lambda r: r["mode"],
    "batch": lambda r: r["batch"],
    "s/step": lambda r: f"{r['step_seconds']:.2f}",
    "naive": lambda r: f"{r['naive_seconds']:.2f}",
    "faster": lambda r: f"{r['speedup']:.2f}x",
    "MFU": lambda r: f"{r['mfu']:.0%}",
    "kept GiB": lambda r: f"{r['saved_bytes'] / common.GIB:.2f}",
    "naive kept": lambda r: f"{r['naive_saved_bytes'] / common.GIB:.2f}",
    "ratio": lambda r: f"{r['memory_ratio']:.2f}",
    "peak GiB": lambda r: f"{r['peak_bytes'] / common.GIB:.2f}",
    "naive peak": lambda r: f"{r['naive_peak_bytes'] / common.GIB:.2f}",
    "time of variants": lambda r: ", ".join(f"{n} {x:.2f}x" for n, x in r["relative_step_seconds"].items()),
}
COUNTED = {
    "ViT": lambda r: r["width"],
    "px": lambda r: r["size"],
    "mode": lambda r: r["mode"],
    "batch": lambda r: r["batch"],
    "checkpointing": lambda r: r["checkpointing"],
    "peak GiB": lambda r: f"{r['gib']['peak']:.2f}",
    "between steps": lambda r: f"{r['gib']['after']:.2f}",
    "in backward": lambda r: f"{r['gib']['backward']:.2f}",
    "in step": lambda r: f"{r['gib']['step']:.2f}",
}
TABLE8 = COUNTED | {
    "target": lambda r: r["target_gib"] or "",
    "measured": lambda r: f"{r['measured_gib']:.2f}" if "measured_gib" in r else "",
}
NAIVE = COUNTED | {"naive peak": lambda r: f"{r['naive_gib']['peak']:.2f}"}


def report(result: dict) -> str:
    """The Markdown of all tables."""
    text = f"# Training steps\n\n{result['machine']}, {result['date']}.\n\n"
    text += "## Timed, against the naive formulation\n\n"
    text += "kept: bytes that wait for the backward pass; peak: measured, beyond what was there before the step. "
    text += "MFU: matrix products and convolutions of one step, none computed twice, over "
    text += (
        "989 TFLOP/s.\n\n" if result["rows"][0]["device"] == "cuda" else "the rate of a large matrix product here.\n\n"
    )
    text += common.table(result["rows"], TIMED)
    text += "\n## Table 8's L-DIT rows at batch 32 on one GPU: counted with fake tensors\n\n"
    text += "bf16, ZeRO stage 0, fp32 masters and Adam states, each layer recomputed.\n\n"
    text += common.table(result["table8"], TABLE8)
    text += "\n## Counted without checkpointing, bf16, against the naive formulation\n\n"
    return text + common.table(result["counted"], NAIVE)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", nargs="+", default=["vit_b", "vit_h"], choices=list(SIZES))
    parser.add_argument("--size", nargs="+", type=int, default=[512, 1024], help="pixels")
    parser.add_argument("--mode", nargs="+", default=["frozen", "tuned"], choices=list(MODES))
    parser.add_argument("--batch", type=int, default=32 if cuda else 2, help="at 512 px, a quarter above")
    parser.add_argument("--layers", type=int, default=None if cuda else 3, help="of the timed ViTs")
    parser.add_argument("--policies", nargs="*", default=["block", "selective"], help="checkpointing to time, too")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the blocks, too")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 3)
    parser.add_argument("--no-counting", action="store_true", help="leave out the fake-tensor counts")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    world = connect()
    device = world.device.type
    flop_rate = common.H200_BF16 if cuda else common.matmul_rate(device, torch.float32)
    rows = []
    for width in args.width:
        for size in args.size:
            for mode in args.mode:
                batch = args.batch if size <= 512 else max(1, args.batch // 4)
                rows.append(timed_row(width, size, mode, batch, args, world, flop_rate))
                print(common.table(rows[-1:], TIMED).splitlines()[-1], file=sys.stderr, flush=True)
    result = common.conditions(device) | {"benchmark": "train_step", "rows": rows}
    result |= {"table8": [], "counted": []} if args.no_counting else {
        "table8": table8(args, world), "counted": counted(args, world)
    }  # fmt: skip
    name = "train_step" if device == "cpu" else f"train_step_{device}"
    common.write(args.out, name, result, report(result))
    common.plot(
        args.out / f"{name}.png",
        rows,
        lambda r: f"{r['width']} {r['size']} px {r['mode']}",
        f"A training step against the naive formulation ({result['machine']})",
    )
    disconnect()
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
