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
GRIDS = ((32, 32), (64, 64), (14, 14))  # of 512 and 1024 px, and SAM's windows, whose columns are padded to 16
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


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _run(*command: str, cwd: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()[:500]}")
    return done.stdout + done.stderr


def _resources(assembly: dict, target: str) -> dict[str, int]:
    """Registers a thread, bytes of stack, and bytes that are spilled to it and read from it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.cubin").write_bytes(assembly["cubin"])
        said = _run(_tool("cuobjdump"), "--dump-resource-usage", "x.cubin", cwd=folder)
        found = {k: int(re.search(rf"{k}:(\d+)", said)[1]) for k in ("REG", "STACK", "LOCAL")}
        stack, spills = found["STACK"] + found["LOCAL"], 0
        if (
            stack
        ):  # what is spilled is there; the assembler says how much. This one reads what Triton writes for any GPU
            (Path(folder) / "x.ptx").write_text(assembly["ptx"])
            said = _run(_tool("ptxas-blackwell"), "-v", f"--gpu-name={target}", "x.ptx", "-o", "y.cubin", cwd=folder)
            spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", said))
    return {"registers": found["REG"], "stack": stack, "spills": spills}


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
    found, shared = _resources(kernel.asm, gpu.target), kernel.metadata.shared
    by_registers = 65536 // (-(-found["registers"] // 8) * 8 * 32 * c.tile.warps)
    programs = min(by_registers, gpu.shared_of_all // (shared + 1024), 64 // c.tile.warps)
    return c._asdict() | found | {"name": c.name, "tile": c.tile.name, "shared": shared, "programs": programs}


def wrong(row: dict) -> str | None:
    """What breaks the limits; None if nothing does."""
    if row["spills"]:
        return f"{row['spills']} bytes spilled"
    if row["registers"] > 255 or row["shared"] > GPUS[row["gpu"]].shared:
        return f"{row['registers']} registers, {row['shared']} bytes of shared memory"
    return None


def digest() -> str:
    """Of the kernels' source and of what they are compiled with, without which a table says nothing of them."""
    what = hashlib.sha256(MODULE.read_bytes())
    for c in configurations():
        problem = _problem(c.gpu, getattr(torch, c.dtype), c.d, c.grid)
        what.update(json.dumps([c.tile.options, constants(c.kernel, problem, c.tile, c.of_text)]).encode())
    return what.hexdigest()


def summary(rows: list[dict]) -> dict:
    """The keys that `--json` prints."""
    return {
        "configurations": len(rows), "spills": sum(r["spills"] for r in rows),
        "max_registers": max(r["registers"] for r in rows), "max_shared": max(r["shared"] for r in rows),
        "wrong": [f"{r['name']}: {wrong(r)}" for r in rows if wrong(r)],
    }  # fmt: skip


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
        os.environ.setdefault("TRITON_CACHE_DIR", folder)  # compiled now, unless a folder of former results is named
        with ProcessPoolExecutor(usable_cores()) as pool:
            rows = []
            for i, row in enumerate(pool.map(compiled, chosen), 1):
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
