"""Every configuration of the Triton attention kernels, compiled ahead of time for A100, H100 and B200; needs no GPU.

Registers, spills and shared memory are those of the machine code that Triton's own ptxas makes. Writes triton_aot.json
and .md; `--json` prints one JSON object: configurations, spills (bytes in all), max_registers, max_shared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common
from dit_ds.models import attention_triton
from dit_ds.models.attention_triton import KINDS, Problem, Tile, constants, tiles
from dit_ds.models.sam import SIZES
from dit_ds.processes import usable_cores


class GPU(NamedTuple):
    """What a multiprocessor has."""

    capability: int
    target: str  # ptxas's name
    shared: int  # bytes that a program can have
    shared_of_all: int  # bytes


GPUS = {
    "A100": GPU(80, "sm_80", 163 << 10, 164 << 10),
    "H100": GPU(90, "sm_90a", 227 << 10, 228 << 10),
    "B200": GPU(100, "sm_100a", 227 << 10, 228 << 10),
}
# of 512 and 1024 px, of SAM's windows, and one whose columns are padded
GRIDS = ((32, 32), (64, 64), (14, 14), (20, 20))
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WORDS = 20
MODULE = Path(attention_triton.__file__).with_name("triton_kernels.py")


class Configuration(NamedTuple):
    """One compilation."""

    gpu: str
    dtype: str
    d: int
    grid: tuple[int, int]
    kernel: str
    tile: Tile
    of_text: bool

    @property
    def name(self) -> str:
        """Unique, readable."""
        kernel = self.kernel + " of text" * self.of_text
        return f"{self.gpu} {self.dtype} d={self.d} {self.grid[0]}x{self.grid[1]} {kernel} {self.tile.name}"


def _problem(gpu: str, dtype: torch.dtype, d: int, grid: tuple[int, int]) -> Problem:
    capability = GPUS[gpu].capability
    return Problem(grid, 16, d, words=WORDS, masked=True, dtype=dtype, capability=capability)


def configurations() -> Iterator[Configuration]:
    """All that `attention_triton` may run for SAM's sizes."""
    widths = sorted({s.embed_dim // s.num_heads for n, s in SIZES.items() if n != "vit_t"})
    for gpu in GPUS:
        for dtype in TYPES:
            for d in widths:
                for grid in GRIDS:
                    for kernel in KINDS:
                        for tile in tiles(kernel, _problem(gpu, dtype, d, grid)):
                            for of_text in (False, True)[: 1 + (kernel == "keys")]:
                                yield Configuration(gpu, str(dtype)[6:], d, grid, kernel, tile=tile, of_text=of_text)


@cache
def _ptxas() -> str:
    import triton

    # the one for Blackwell reads what Triton writes for all
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell")


def compiled(c: Configuration) -> dict:
    """Registers a thread, bytes spilled and on the stack, bytes of shared memory, and programs that a multiprocessor holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dit_ds.models import triton_kernels

    gpu, dtype = GPUS[c.gpu], getattr(torch, c.dtype)
    values = constants(c.kernel, _problem(c.gpu, dtype, c.d, c.grid), c.tile, c.of_text)
    function = getattr(triton_kernels, f"{c.kernel}_kernel")
    types = {"lse": "*fp32", "delta": "*fp32", "mask": "*u8", "batch": "i32", "words": "i32"}
    signature = {n: "constexpr" if n in values else types.get(n, TYPES[dtype]) for n in function.arg_names}
    # as at a launch: tensors begin at multiples of 16 bytes
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n].startswith("*")}
    kernel = triton.compile(
        ASTSource(function, signature, constexprs=values, attrs=aligned),
        target=GPUTarget("cuda", gpu.capability, 32),
        options=c.tile.options,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.ptx").write_text(kernel.asm["ptx"])
        command = [_ptxas(), "-v", f"--gpu-name={gpu.target}", "x.ptx", "-o", "x.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{c.name}: ptxas: {said.strip()[:500]}")
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    found = {n: int(re.search(rf"(\d+) bytes {n}", said)[1]) for n in ("stack frame", "spill stores", "spill loads")}
    shared = kernel.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * c.tile.warps)
    return c._asdict() | {
        "tile": c.tile.name, "registers": registers, "spills": found["spill stores"] + found["spill loads"],
        "stack": found["stack frame"], "shared": shared,
        "programs": min(by_registers, gpu.shared_of_all // (shared + 1024), 64 // c.tile.warps),
    }  # fmt: skip


def wrong(row: dict) -> str | None:
    """What breaks the limits; None if nothing does."""
    if row["spills"]:
        return f"{row['spills']} bytes spilled"
    if row["registers"] > 255 or row["shared"] > GPUS[row["gpu"]].shared:
        return f"{row['registers']} registers, {row['shared']} bytes of shared memory"
    return None


def digest() -> str:
    """Of the kernels' source, without which a table says nothing of them."""
    return hashlib.sha256(MODULE.read_bytes()).hexdigest()


def summary(rows: list[dict]) -> dict:
    """The keys that `--json` prints."""
    return {
        "configurations": len(rows), "spills": sum(r["spills"] for r in rows),
        "max_registers": max(r["registers"] for r in rows), "max_shared": max(r["shared"] for r in rows),
        "wrong": [f"{r['name']}: {wrong(r)}" for r in rows if wrong(r)],
    }  # fmt: skip


def _compiled(c: Configuration) -> dict:
    return compiled(c) | {"name": c.name}


def by_tile(rows: list[dict]) -> list[dict]:
    """The most that a tile takes of anything, over head widths and grids."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["gpu"], r["dtype"], r["kernel"], r["of_text"], r["tile"]), []).append(r)
    return [
        of[0] | {k: max(r[k] for r in of) for k in ("registers", "spills", "shared")}
        | {"programs": min(r["programs"] for r in of), "count": len(of)}
        for of in groups.values()
    ]  # fmt: skip


COLUMNS = {
    "GPU": lambda r: r["gpu"],
    "type": lambda r: r["dtype"],
    "kernel": lambda r: r["kernel"] + " of text" * r["of_text"],
    "tile": lambda r: r["tile"],
    "compiled": lambda r: r["count"],
    "registers": lambda r: r["registers"],
    "spills": lambda r: r["spills"],
    "shared KiB": lambda r: f"{r['shared'] / 1024:.1f}",
    "programs at once": lambda r: r["programs"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--dtype", nargs="+", default=[str(t)[6:] for t in TYPES])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    chosen = [c for c in configurations() if c.gpu in args.gpu and c.dtype in args.dtype]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.environ["TRITON_CACHE_DIR"] = folder  # compiled now, not found
        with ProcessPoolExecutor(usable_cores()) as pool:
            rows = []
            for i, row in enumerate(pool.map(_compiled, chosen), 1):
                rows.append(row)
                print(f"{i}/{len(chosen)} {row['name']}: {wrong(row) or 'fits'}", flush=True)
    import triton

    result = common.conditions("cpu") | {"benchmark": "triton_aot", "triton": triton.__version__, "source": digest()}
    result |= summary(rows) | {"rows": rows}
    text = f"# Triton attention kernels, compiled ahead of time\n\nTriton {triton.__version__}, {result['date']}; none ran on a GPU. "
    text += f"{len(rows)} configurations: the most over heads of 64 and 80 and grids of "
    text += f"{', '.join(f'{h} x {w}' for h, w in GRIDS)}. Programs at once: on a multiprocessor.\n\n"
    common.write(args.out, "triton_aot", result, text + common.table(by_tile(rows), COLUMNS))
    if args.json:
        print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
