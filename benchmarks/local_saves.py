"""What checkpoints on the node's own disk cost training: figures for benchmarks/results/local_saves.md.

python benchmarks/local_saves.py                                       # ViT-B, minutes
python benchmarks/local_saves.py --size vit_t --pairs 1 --seconds 5    # half a minute: that it works

Training goes on in one process, in intervals with one save each and without any, in turns. A save is written during an
interval's first steps: what they take beyond the median of the interval's other steps is what it costs, all that training
waits for included, less what the same steps take beyond the others where there is no save. So a machine that is slower for
a minute, as shared ones are, does not count.
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
from typing import Any

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

    def interval(self, seconds: float, save: bool) -> dict[str, Any]:
        """Steps for so many seconds, with a save at their beginning, which is finished at their end, or without."""
        start, cpu, steps, first = time.perf_counter(), time.process_time(), [], 0
        if save:
            self.saver.begin({"step": self.steps})
        begin = begun = time.perf_counter() - start
        while time.perf_counter() - start < seconds:
            first += save and not self.saver.written
            self.step()
            steps.append(time.perf_counter() - start - begun)
            begun += steps[-1]
        found: dict[str, Any] = {"step_seconds": steps, "cpu_seconds": time.process_time() - cpu}
        if save:
            waited, start = self.saver.waited_seconds, time.perf_counter()
            done = self.saver.finish()
            assert done is not None and done.whole, done
            outside = begin + time.perf_counter() - start  # of the steps
            found |= {
                "first_steps": first, "outside_seconds": outside, "blocked_seconds": waited + time.perf_counter() - start,
                "bytes": done.bytes, "write_seconds": done.write_seconds, "thread_seconds": done.cpu_seconds,
            }  # fmt: skip
        return found


def measure(training: Training, pairs: int, seconds: float) -> dict:
    """Intervals with and without a save, the order changing from pair to pair."""
    training.interval(min(seconds, 10), save=True)  # host memory, files and kernels are new
    rows = []
    for i in range(pairs):
        pair = {}
        for save in (True, False) if i % 2 else (False, True):
            pair["with" if save else "without"] = training.interval(seconds, save)
        pair["cost_seconds"] = cost_seconds(pair)
        rows.append(pair)
        print(f"pair {i + 1}: {pair['cost_seconds']:+.2f} s, {pair['cost_seconds'] / seconds:+.2%} of the interval; "
              f"blocked {pair['with']['blocked_seconds']:.2f} s, written in {pair['with']['write_seconds']:.2f} s",
              flush=True)  # fmt: skip
    costs = [p["cost_seconds"] / seconds for p in rows]

    def median(key: str) -> float:
        return statistics.median(p["with"][key] for p in rows)

    return {
        "pairs": rows, "interval_seconds": seconds, "bytes": rows[0]["with"]["bytes"],
        "trained_parameters": sum(torch.Size(s).numel() for s in training.state.shapes.values()),
        "cost": statistics.median(costs), "cost_quartiles": quartiles(costs),
        "thread_seconds": median("thread_seconds"),
        "expected_cost": (median("blocked_seconds") + median("thread_seconds")) / seconds,
        "processors_share": median("thread_seconds") / seconds / (os.cpu_count() or 1),
        "blocked_cost": median("blocked_seconds") / seconds,
        "seconds_per_step": statistics.median(s for p in rows for s in p["without"]["step_seconds"]),
        "blocked_seconds": median("blocked_seconds"), "write_seconds": median("write_seconds"),
    }  # fmt: skip


def cost_seconds(pair: dict) -> float:
    """What a save costs: its first steps' time beyond the others', less the same without a save."""
    first = pair["with"]["first_steps"]

    def beyond(steps: list[float]) -> float:
        return sum(steps[:first]) - len(steps[:first]) * statistics.median(steps[first:])

    with_save, without = (beyond(pair[k]["step_seconds"]) for k in ("with", "without"))
    return with_save + pair["with"]["outside_seconds"] - without


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


ROWS = {
    "a step without saves, s": lambda r: f"{r['seconds_per_step']:.2f}",
    "cost of a save, of training's time": lambda r: f"{r['cost']:.1%}",
    "its quartiles": lambda r: " and ".join(f"{x:.1%}" for x in r["cost_quartiles"]),
    "training waits for a save, s": lambda r: f"{r['blocked_seconds']:.2f} ({r['blocked_cost']:.2%} of the interval)",
    "written in the background in, s": lambda r: f"{r['write_seconds']:.2f}",
    "processor time of that thread, s": lambda r: f"{r['thread_seconds']:.2f}",
    "of the processors' time": lambda r: f"{r['processors_share']:.1%}",
    "waiting and that thread's time, of the interval": lambda r: f"{r['expected_cost']:.1%}",
}


def markdown(r: dict) -> str:
    """The report."""
    runs = r["runs"]
    table = "\n".join(f"| {name} | " + " | ".join(map(of, runs)) + " |" for name, of in ROWS.items())
    return f"""# Checkpoints on the node's own disk

{r["machine"]}, {r["date"]}; torch {r["torch"]}. `python benchmarks/local_saves.py`

{r["size"]} with BERT at {r["image_size"]} px, batch {r["batch_size"]}, {runs[0]["trained_parameters"] / 1e6:.0f} M trained
parameters, {runs[0]["bytes"] / 2**30:.2f} GiB of masters and moments, one rank, ZeRO-2. {len(runs[0]["pairs"])} pairs of
intervals of {runs[0]["interval_seconds"]:g} s, with one save and without, in turns, in one process. Medians.
What else ran: {r["load"]}.

| training's threads | {" | ".join(str(x["threads"]) for x in runs)} |
|{"---|" * (len(runs) + 1)}
{table}

The cost is what was timed. The last line is what a save comes to where training uses all cores and waits for the slowest,
as on CPUs. Where a core is free, as on nodes with GPUs, training pays for the waiting and the memory's bandwidth.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="vit_b", help="of the model (default vit_b)")
    parser.add_argument("--image-size", type=int, default=256, help="in pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=1, help="of a step (default 1)")
    parser.add_argument("--pairs", type=int, default=10, help="of intervals (default 10)")
    parser.add_argument("--seconds", type=float, default=20, help="between two saves (default 20)")
    parser.add_argument("--threads", type=int, nargs="+", help="of training (default: one a core, and one less)")
    parser.add_argument("--disk", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--load", default="nothing known", help="what else runs, for the report")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for local_saves.json and .md")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="local_saves_", dir=args.disk or os.environ.get("TMPDIR")) as scratch:
        world = connect()
        (Path(scratch) / "run").mkdir()
        training = Training(args.size, args.image_size, args.batch_size, Path(scratch), world)
        runs = []
        for threads in args.threads or sorted({cores, max(1, cores - 1)}, reverse=True):
            torch.set_num_threads(threads)
            runs.append({"threads": threads} | measure(training, args.pairs, args.seconds))
        result = common.conditions(world.device.type) | {"runs": runs}
        disconnect()
    result |= {"size": args.size, "image_size": args.image_size, "batch_size": args.batch_size, "load": args.load}
    name = "local_saves_cuda" if world.device.type == "cuda" else "local_saves"
    common.write(args.out, name, result, markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
