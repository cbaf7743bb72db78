"""What checkpoints on the node's own disk cost training: figures for benchmarks/results/local_saves.md.

python benchmarks/local_saves.py                                       # ViT-B, minutes
python benchmarks/local_saves.py --size vit_t --pairs 1 --seconds 5    # half a minute: that it works

Training goes on in one process, in intervals with one save each and without any, in turns. Counted are the seconds of a
step, all that training waits for included, and the processor time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import torch  # noqa: E402

from dit_ds.checkpointing.local import LocalSaver  # noqa: E402
from dit_ds.checkpointing.local_resume import new_run_id  # noqa: E402
from dit_ds.config.load import validate  # noqa: E402
from dit_ds.distributed import World, connect, disconnect  # noqa: E402
from dit_ds.engine import engine as ds  # noqa: E402
from dit_ds.engine.zero_state import TrainingState  # noqa: E402
from dit_ds.models.build import build_model  # noqa: E402
from dit_ds.planning.memory.profiled_step import fake_batch  # noqa: E402


class Training:
    """An engine with one batch, which takes steps, and its saver."""

    def __init__(self, size: str, image_size: int, batch_size: int, folder: Path, world: World):
        values = {
            "run_dir": str(folder / "run"),
            "model": {"size": size},
            "data": {"image_size": image_size},
            "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True},
            "train": {"batch_size": batch_size},
            "deepspeed": {
                "config": str(ROOT / "configs/deepspeed/zero2.json"),
                "precision": "bf16" if world.device.type == "cuda" else "fp32",
            },
        }
        config = validate(values)
        self.engine = ds.initialize(build_model(config), config, world)
        self.engine.train()
        batch = fake_batch(batch_size, image_size, config.data.tokens)
        self.batch = torch.utils._pytree.tree_map(lambda x: x.to(world.device), batch)
        self.state = TrainingState(self.engine)
        self.saver = LocalSaver(config, world, self.state, folder / "disk", new_run_id())
        self.world, self.steps = world, 0

    def step(self) -> None:
        """One training step."""
        inputs, mask, weight = self.batch
        loss = self.engine.module.loss(self.engine(**inputs), mask, weight)
        self.engine.backward(loss)
        ds.step(self.engine)
        self.steps += 1
        common.synchronize(self.world.device.type)

    def interval(self, seconds: float, save: bool) -> dict[str, float]:
        """Steps for so many seconds, with a save at their beginning, which is finished at their end, or without."""
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        blocked = 0.0
        if save:
            self.saver.begin({"step": self.steps})
        while time.perf_counter() - start < seconds:
            self.step()
            count += 1
        written = {}
        if save:
            waited = time.perf_counter()
            done = self.saver.finish()
            assert done is not None and done.whole, done
            written = {"bytes": done.bytes, "write_seconds": done.write_seconds, "thread_seconds": done.cpu_seconds}
            blocked = self.saver.waited_seconds + time.perf_counter() - waited
        return {
            "seconds_per_step": (time.perf_counter() - start) / count,
            "cpu_seconds_per_step": (time.process_time() - cpu) / count,
            "steps": count, "blocked_seconds": blocked, **written,
        }  # fmt: skip


def measure(training: Training, pairs: int, seconds: float) -> dict:
    """Intervals with and without a save, the order changing from pair to pair."""
    training.interval(min(seconds, 10), save=True)  # host memory, files and kernels are new
    rows = []
    for i in range(pairs):
        pair = {}
        for save in (True, False) if i % 2 else (False, True):
            pair["with" if save else "without"] = training.interval(seconds, save)
        rows.append(pair)
        print(f"pair {i + 1}: {cost(pair):+.2%} of a step's time, {cost(pair, 'cpu_seconds_per_step'):+.2%} of the "
              f"processors'; blocked {pair['with']['blocked_seconds']:.2f} s, written in "
              f"{pair['with']['write_seconds']:.2f} s", flush=True)  # fmt: skip
    costs = [cost(p) for p in rows]
    return {
        "pairs": rows, "interval_seconds": seconds, "bytes": rows[0]["with"]["bytes"],
        "trained_parameters": sum(torch.Size(s).numel() for s in training.state.shapes.values()),
        "cost": statistics.median(costs), "cost_quartiles": quartiles(costs),
        "cpu_cost": statistics.median(cost(p, "cpu_seconds_per_step") for p in rows),
        "thread_seconds": (thread := statistics.median(p["with"]["thread_seconds"] for p in rows)),
        "expected_cost": (statistics.median(p["with"]["blocked_seconds"] for p in rows) + thread) / seconds,
        "blocked_cost": statistics.median(p["with"]["blocked_seconds"] / seconds for p in rows),
        "seconds_per_step": statistics.median(p["without"]["seconds_per_step"] for p in rows),
        "blocked_seconds": statistics.median(p["with"]["blocked_seconds"] for p in rows),
        "write_seconds": statistics.median(p["with"]["write_seconds"] for p in rows),
    }  # fmt: skip


def cost(pair: dict, key: str = "seconds_per_step") -> float:
    """The share by which steps take longer with saves."""
    return pair["with"][key] / pair["without"][key] - 1


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


def markdown(r: dict) -> str:
    """The report."""
    low, high = r["cost_quartiles"]
    return f"""# Checkpoints on the node's own disk

{r["machine"]}, {r["date"]}; torch {r["torch"]}. `python benchmarks/local_saves.py`

{r["size"]} with BERT at {r["image_size"]} px, batch {r["batch_size"]}, {r["trained_parameters"] / 1e6:.0f} M trained parameters,
{r["bytes"] / 2**30:.2f} GiB of masters and moments, one rank, ZeRO-2. {len(r["pairs"])} pairs of intervals of
{r["interval_seconds"]:g} s, with one save and without, in turns, in one process.
What else ran: {r["load"]}.

| | median |
|---|---|
| a step without saves, s | {r["seconds_per_step"]:.2f} |
| cost of a save every {r["interval_seconds"]:g} s, of a step's time | {r["cost"]:.1%} (quartiles {low:.1%} and {high:.1%}) |
| more processor time of a step | {r["cpu_cost"]:.1%} |
| training waits for a save, s | {r["blocked_seconds"]:.2f} ({r["blocked_cost"]:.1%} of the interval) |
| written in the background in, s | {r["write_seconds"]:.2f} |
| processor time of that thread, s | {r["thread_seconds"]:.2f} |
| waiting and that thread's time, of the interval | {r["expected_cost"]:.1%} |

The first line is what was timed; the last one is what a save can cost where training uses all cores and waits for the
slowest, as on CPUs, and depends less on what else runs. With GPUs the thread has cores of its own.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="vit_b", help="of the model (default vit_b)")
    parser.add_argument("--image-size", type=int, default=256, help="in pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=4, help="of a step (default 4)")
    parser.add_argument("--pairs", type=int, default=10, help="of intervals (default 10)")
    parser.add_argument("--seconds", type=float, default=20, help="between two saves (default 20)")
    parser.add_argument("--disk", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--load", default="nothing known", help="what else runs, for the report")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for local_saves.json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="local_saves_", dir=args.disk or os.environ.get("TMPDIR")) as scratch:
        world = connect()
        (Path(scratch) / "run").mkdir()
        training = Training(args.size, args.image_size, args.batch_size, Path(scratch), world)
        result = common.conditions(world.device.type) | measure(training, args.pairs, args.seconds)
        disconnect()
    result |= {"size": args.size, "image_size": args.image_size, "batch_size": args.batch_size, "load": args.load}
    name = "local_saves_cuda" if world.device.type == "cuda" else "local_saves"
    common.write(args.out, name, result, markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
