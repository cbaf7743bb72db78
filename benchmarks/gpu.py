"""What needs a GPU, in one call: the CUDA tests, attention, training steps, memory against its prediction, checkpoints,
latency.

Writes attention_cuda.*, attention_kernels_cuda.*, train_step_cuda.*, train_step_1024_cuda.*, memory_cuda.*, memory_error_cuda.*, table8.*,
checkpoint_cuda.* and latency_cuda.* to `benchmarks/results/`. `--only` takes a part, where a machine is lent for minutes. Without a GPU,
`--small` goes through the same steps with tiny ones on the CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP = "benchmarks/train_step.py --mode"
PARTS = {
    "tests": "-m pytest tests/test_attention.py tests/test_gpu.py -k cuda --timeout 240 "
    "--deselect tests/test_gpu.py::test_the_measured_peak_on_cuda_is_the_predicted_one",  # the part memory has it
    "attention": "benchmarks/attention.py --width vit_b vit_l vit_h",
    "attention_kernels": "benchmarks/attention_kernels.py --races",
    "train_step": f"{STEP} frozen tuned --compile --size 512",
    "train_step_1024": f"{STEP} tuned --size 1024 --rounds 5 --name train_step_1024_cuda",
    "memory": "benchmarks/memory.py --measure",
    "memory_error": "benchmarks/memory_error.py",
    "table8": "-m dit_ds.cli memory table8",
    "checkpoint": "benchmarks/checkpoint.py --steps 0",
    "latency": "benchmarks/latency.py --rounds 50",
}
SMALL = {
    "tests": "",
    "attention": "--width vit_t --size 64 --rounds 1",
    "attention_kernels": "--width vit_t --size 64 --rounds 1",
    "train_step": "--width vit_t --size 64 --rounds 1",
    "train_step_1024": "--width vit_t --size 128 --rounds 1",
    "memory": "--small",
    "memory_error": "--small",
    "table8": "--rows paper",
    "checkpoint": "--size vit_t --rounds 1",
    "latency": "--width vit_t --rounds 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, results thrown away")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as nowhere:
        for part in args.only:
            command = [sys.executable, *PARTS[part].split(), *(SMALL[part].split() if args.small else [])]
            if part != "tests":
                out = Path(nowhere) if args.small else args.out
                command += ["--out", str(out)]
            print("$ " + " ".join(map(str, command)), flush=True)
            start = time.perf_counter()
            status = subprocess.run(command, cwd=ROOT).returncode
            print(f"{part}: status {status}, {time.perf_counter() - start:.0f} s", flush=True)
            # 5: pytest found no test of that name, as without a GPU
            if status and not (part == "tests" and args.small and status == 5):
                failed.append(part)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
