"""The attention operator alone, by every kernel that runs here: forward, backward, both; memory; and whether it is right.

Of each kernel: milliseconds, TFLOP/s of the exact FLOPs (at the heads' width, nothing counted twice), peak memory, and the
error of output and gradients against fp32 arithmetic. flex is FlexAttention with the positions as a score modification.
For triton also whether 100 runs give the same bits, and with `--races` what compute-sanitizer finds. Writes
attention_kernels.json and .md, on a GPU attention_kernels_cuda.*; `--json` prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.attention import WORDS, flex_seconds
from dit_ds.models.attention import count_flops
from dit_ds.models.attention_kernels import FUSED, why_not
from dit_ds.models.sam import SIZES
from dit_ds.planning.attention_probe import Layer, Shape, fastest, relative_error

REPEATS = 100


def shape_of(width: str, image_size: int, batch: int) -> Shape:
    size, side = SIZES[width], image_size // 16
    return Shape((side, side), size.num_heads, size.embed_dim // size.num_heads, batch, WORDS)


def flops(layer: Layer) -> tuple[int, int]:
    """Of a forward pass, and of a backward pass that recomputes nothing: twice the forward's products."""
    with count_flops() as counter, torch.no_grad():
        layer.forward("chunked")
    return counter.get_total_flops(), 2 * counter.get_total_flops()


def repeats(layer: Layer, kernel: str) -> bool:
    """Whether each run gives the same bits."""
    first = layer.step(kernel)
    return all(all(torch.equal(x, y) for x, y in zip(layer.step(kernel), first)) for _ in range(REPEATS - 1))


def of_kernels(shape: Shape, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """All kernels at one shape, in turns."""
    layer = Layer(shape, dtype, torch.device(device))
    cannot = {k: r for k in FUSED if (r := why_not(k, device, dtype))}
    if device == "cuda" and "triton" not in cannot:
        fastest(shape, ["triton"], dtype, torch.device(device))  # chooses its tiles
    exact = layer.step("chunked", torch.float32, samples=1)
    errors = {}
    for k in ("eager", *FUSED):
        if k in cannot:
            continue
        try:
            errors[k] = max(relative_error(x, y) for x, y in zip(layer.step(k, samples=1), exact))
            layer.step(k)
        except Exception as e:  # it runs in general and not at this shape, or a compiler's own type of error
            errors.pop(k, None)
            cannot[k] = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
    forward = common.alternate({k: partial(layer.forward, k) for k in errors}, rounds, device)
    both = common.alternate({k: partial(layer.step, k) for k in errors}, rounds, device)
    count = flops(layer)
    found = {}
    for k in errors:
        backward = both[k] - forward[k]
        found[k] = {
            "forward_ms": forward[k] * 1e3, "backward_ms": backward * 1e3, "both_ms": both[k] * 1e3,
            "forward_tflops": count[0] / forward[k] / 1e12, "both_tflops": sum(count) / both[k] / 1e12,
            "peak_bytes": common.peak_bytes(partial(layer.step, k), device), "error": errors[k],
        }  # fmt: skip
    same = repeats(layer, "triton") if "triton" in errors else None
    return {"kernels": found, "cannot_run": cannot, "flops": count, "triton_repeats": same}


def races(width: str, image_size: int) -> str:
    """What compute-sanitizer says of one step of the Triton kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        return "compute-sanitizer is not installed" if torch.cuda.is_available() else "no GPU"
    code = "import sys, torch; from benchmarks.attention_kernels import Layer, shape_of; "
    code += f"Layer(shape_of('{width}', {image_size}, 1), torch.bfloat16, torch.device('cuda')).step('triton')"
    root = Path(__file__).parent.parent
    command = [tool, "--tool", "racecheck", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    said = [x for x in (done.stdout + done.stderr).splitlines() if "RACECHECK SUMMARY" in x or "Error" in x]
    return (said or [f"status {done.returncode}"])[-1].strip("= ")


COLUMNS = {
    "ViT": lambda r: r["width"],
    "px": lambda r: r["size"],
    "type": lambda r: r["dtype"],
    "batch": lambda r: r["batch"],
    "kernel": lambda r: r["kernel"],
    "forward ms": lambda r: f"{r['forward_ms']:.2f}",
    "backward ms": lambda r: f"{r['backward_ms']:.2f}",
    "both ms": lambda r: f"{r['both_ms']:.2f}",
    "TFLOP/s": lambda r: f"{r['both_tflops']:.2f}",
    "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.0f}",
    "error": lambda r: f"{r['error']:.1e}",
}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", nargs="+", default=["vit_b", "vit_l", "vit_h"], choices=list(SIZES))
    parser.add_argument("--size", nargs="+", type=int, default=[512, 1024], help="pixels")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--device", default=device)
    parser.add_argument("--batch", type=int, default=32 if device == "cuda" else 1, help="at 512 px, a quarter above")
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 3)
    parser.add_argument("--races", action="store_true", help="compute-sanitizer's racecheck: minutes")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    cases, rows = [], []
    for dtype in args.dtype:
        for width in args.width:
            for size in args.size:
                batch = args.batch if size <= 512 else max(1, args.batch // 4)
                kind = getattr(torch, dtype)
                case = {"width": width, "size": size, "dtype": dtype, "batch": batch}
                case |= of_kernels(shape_of(width, size, batch), kind, args.device, args.rounds)
                if args.device == "cuda":
                    case["flex_seconds"] = flex_seconds(width, size, batch, kind, args.rounds)
                cases.append(case)
                rows += [case | {"kernel": k} | of for k, of in case["kernels"].items()]
                print(common.table(rows, COLUMNS), file=sys.stderr, flush=True)
    result = common.conditions(args.device) | {"benchmark": "attention_kernels", "words": WORDS, "rows": cases}
    if args.races:
        result["races"] = races(args.width[-1], args.size[0])
    name = "attention_kernels" if args.device == "cpu" else f"attention_kernels_{args.device}"
    text = f"# The attention operator by kernel\n\n{result['machine']}, {result['date']}; {WORDS} words. TFLOP/s: exact FLOPs "
    text += "of forward and backward.\n\n" + common.table(rows, COLUMNS) + "\n"
    for case in cases:
        where = f"{case['width']}, {case['size']} px"
        text += f"- {where}: FlexAttention {case.get('flex_seconds', 'not tried')} s; "
        text += f"triton's {REPEATS} runs the same bits: {case['triton_repeats']}\n"
    common.write(args.out, name, result, text)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
