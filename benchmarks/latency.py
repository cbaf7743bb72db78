"""Latency of one image with words, points, a box or nothing: the paper's Table 6, its last column.

Batch 1, warm, from the resized image in memory to the logits. All calls take turns in every round, and ratios are
medians of the rounds' ratios. Weights are random: they don't change the time. On a CPU it is the processor's time of
one thread, which other programs on the machine disturb least; on a GPU the time until it has finished.

    python benchmarks/latency.py                       # ViT-B at 512 px and vit_t at 128, default and L-DIT
    python benchmarks/latency.py --width vit_b --size 1024 --rounds 50
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor

from dit_ds.config.load import validate
from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import Prompts
from dit_ds.models.build import build_model
from dit_ds.paper.tables import TABLES

ROOT = Path(__file__).parent.parent
WORDS = 20
SIZES = {"vit_t": 128}  # pixels; of the others the paper's 512
KINDS = {"point": "points", "box": "box", "text": "words"}
PUBLISHED = {  # Table 6, ms
    f"{'default' if 'Default SAM' in row.name else 'layer_wise'} {KINDS[row.prompt]}": ms
    for row in TABLES[6].rows
    for column, ms in row.values.items()
    if column.metric == "ms"
}


def configuration(width: str, scheme: str, image_size: int, window_size: int) -> RunConfig:
    """With BERT of 12 layers, as the paper has it."""
    return validate(
        {
            "data": {"image_size": image_size, "tokens": WORDS},
            "model": {"size": width, "scheme": scheme, "window_size": window_size},
            "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True, "freeze": True},
        }
    )


def inputs_of(image_size: int, device: str) -> dict[str, dict[str, Tensor]]:
    """What the model is given, by kind of prompt: 20 tokens of which 8 are words, five points, a box, nothing."""
    rng = np.random.default_rng(0)
    encode = Prompts().points_and_labels
    places = {
        "points": encode(points=rng.integers(0, image_size, (5, 2))),
        "box": encode(box=np.array([0.2, 0.3, 0.6, 0.8]) * image_size),
    }
    kinds: dict[str, dict[str, Tensor]] = {
        "words": {
            "tokens": torch.from_numpy(rng.integers(1000, 2000, (1, WORDS))),
            "token_mask": torch.arange(WORDS)[None] < 8,
        },
        **{kind: {k: torch.from_numpy(v)[None] for k, v in drawn.items()} for kind, drawn in places.items()},
        "nothing": {},
    }
    image = torch.from_numpy(rng.integers(0, 256, (1, 3, image_size, image_size), dtype=np.uint8))
    common_inputs = {"image": image, "size": torch.tensor([[image_size, image_size * 3 // 4]])}
    return {k: {n: x.to(device) for n, x in (common_inputs | v).items()} for k, v in kinds.items()}


@torch.no_grad()
def measure(
    width: str, image_size: int, window_size: int, device: str, dtype: torch.dtype, rounds: int
) -> list[dict[str, object]]:
    """Rows of one size: both schemes and all prompts in turns, so that the machine's moods hit all alike."""
    given, calls = inputs_of(image_size, device), {}
    for scheme in ("default", "layer_wise"):
        torch.manual_seed(0)
        model = build_model(configuration(width, scheme, image_size, window_size)).eval().to(device, dtype)
        calls |= {f"{scheme} {kind}": _call(model, inputs) for kind, inputs in given.items()}
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = {name: np.array(s) for name, s in common.in_turns(calls, rounds, device, clock).items()}
    return [
        {
            "width": width,
            "size": image_size,
            "window_size": window_size,
            "dtype": str(dtype).removeprefix("torch."),
            "scheme": scheme,
            "prompt": kind,
            "seconds": float(np.median(s)),
            "over_default_points": float(np.median(s / seconds["default points"])),
            "paper_ms": PUBLISHED.get(f"{scheme} {kind}") if (width, image_size) == ("vit_b", 512) else None,
        }
        for name, s in seconds.items()
        for scheme, kind in [name.split()]
    ]


def _call(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**inputs)


COLUMNS = {
    "ViT": lambda r: r["width"],
    "px": lambda r: r["size"],
    "type": lambda r: r["dtype"],
    "scheme": lambda r: r["scheme"],
    "prompt": lambda r: r["prompt"],
    "ms an image": lambda r: f"{r['seconds'] * 1e3:.1f}",
    "over default with points": lambda r: f"{r['over_default_points']:.3f}x",
    "the paper's": lambda r: f"{r['paper_ms']} ms" if r["paper_ms"] else "",
}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", nargs="+", default=["vit_b", "vit_t"], choices=["vit_t", "vit_b", "vit_l", "vit_h"])
    parser.add_argument("--size", type=int, help="pixels (default: 512, of vit_t 128)")
    parser.add_argument("--window-size", type=int, default=0, help="14: SAM's windows (default 0: all layers global)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default=device)
    parser.add_argument("--rounds", type=int, default=100 if device == "cuda" else 7)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for width in args.width:
        size, dtype = args.size or SIZES.get(width, 512), getattr(torch, args.dtype)
        rows += measure(width, size, args.window_size, args.device, dtype, args.rounds)
        print(common.table(rows[-8:], COLUMNS), file=sys.stderr, flush=True)
    clock = "one thread's processor time" if args.device == "cpu" else "time"
    conditions = common.conditions(args.device) | {"rounds": args.rounds, "clock": clock}
    result = conditions | {"benchmark": "latency", "rows": rows}
    name = "latency" if args.device == "cpu" else f"latency_{args.device}"
    text = f"# Latency of one image\n\n{result['machine']}, {result['date']}; torch {result['torch']}. "
    text += "`python benchmarks/latency.py`\n\n"
    text += (
        f"Medians over {args.rounds} rounds in turns ({clock}), batch 1, without gradients, from the resized image in\n"
    )
    text += (
        "memory to the logits; with words BERT's 12 layers are in it. Ratios are medians of the rounds' ratios. The\n"
    )
    text += "paper's Table 6 does not name its GPU.\n\n"
    common.write(args.out, name, result, text + common.table(rows, COLUMNS))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
