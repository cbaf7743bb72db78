"""Whether predictions of memory hold: figures for benchmarks/results/memory.* and, from a GPU, memory_cuda.*.

python benchmarks/memory.py             # without a GPU: real steps on 1, 2 and 4 ranks against the prediction; minutes
python benchmarks/memory.py --measure   # with one: `dit-ds memory measure` of 12 configurations against the prediction
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

from dit_ds.config.load import load_config, merge, validate  # noqa: E402
from dit_ds.config.schema import RunConfig  # noqa: E402
from dit_ds.errors import UserError  # noqa: E402
from dit_ds.files import GIB  # noqa: E402
from dit_ds.planning.gpus import known_gpu  # noqa: E402
from dit_ds.planning.memory import measure  # noqa: E402
from dit_ds.planning.memory.estimate import predict  # noqa: E402
from dit_ds.planning.memory.recorded.snapshot import read as read_snapshot  # noqa: E402
from dit_ds.planning.memory.recorded.verify import verify  # noqa: E402
from dit_ds.planning.memory.request import MemoryRequest  # noqa: E402

STAGES = [0, 1, 2, 3, "2_offload", "3_offload"]
STAYS = ("parameters", "gradients", "optimizer", "average", "buffers")
# (size, frozen encoders, checkpointing, batch on one GPU)
L_DIT = [
    ("vit_b", False, "none", 4),
    ("vit_b", False, "none", 8),
    ("vit_b", False, "none", 32),
    ("vit_b", False, "block", 32),
    ("vit_b", True, "none", 32),
    ("vit_b", True, "block", 32),
    ("vit_h", False, "none", 8),
    ("vit_h", False, "block", 8),
    ("vit_h", False, "block", 32),
    ("vit_h", True, "block", 32),
]
PAPER = ["table8_lavt", "table8_rela"]


def cases() -> dict[str, RunConfig]:
    """The configurations to measure on one GPU, by name; those whose files are here."""
    found = {}
    for size, frozen, policy, batch in L_DIT:
        changes = {
            "model": {"size": size, "freeze_image_encoder": frozen, "checkpoint": None},
            "text": {"freeze": frozen},
            "train": {"activation_checkpointing": policy},
            "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero0.json"), "precision": "bf16"},
        }
        name = f"L-DIT {size} {'frozen' if frozen else 'tuned'}, checkpointing {policy}, batch {batch}"
        found[name] = _with_batch(merge(load_config(ROOT / "configs/base.yaml").model_dump(), changes), batch)
    for name in PAPER:
        path = ROOT / f"configs/paper/{name}.yaml"
        if path.exists():
            config = load_config(path).model_dump()
            config["deepspeed"]["config"] = str(ROOT / "configs/deepspeed/zero0.json")
            found[f"{name}, batch 8"] = _with_batch(config, 8)
    return found


def _with_batch(values: dict, batch: int) -> RunConfig:
    changes = {"batch_size": batch}, {"override": {"train_micro_batch_size_per_gpu": batch}}
    return validate(merge(values, {"train": changes[0], "deepspeed": changes[1]}))


def compare(name: str, config: RunConfig) -> dict:
    """One configuration measured on this GPU, and predicted."""
    with tempfile.TemporaryDirectory() as folder:
        measured = measure.in_process(config, snapshot=Path(folder) / "memory.pickle")
        replayed = replayed_snapshot(Path(folder) / "memory.pickle")
    gpu = known_gpu(measured["device"]) or MemoryRequest.gpu
    (answer,) = predict([MemoryRequest(config, gpu=gpu)])
    (profile,), (figures,) = answer.profiles.values(), answer.figures.values()
    row = {"name": name, "predicted_gib": round(figures.allocated / GIB, 3), "oom": measured["oom"]}
    row |= {"predicted_reserved_gib": round(figures.reserved / GIB, 3), "snapshot": replayed}
    if not measured["oom"]:
        row |= {k: round(measured[k], 4) for k in ("peak_gib", "reserved_gib", "device_used_gib", "step_seconds")}
        row |= {"ratio": round(figures.allocated / GIB / measured["peak_gib"], 4), "phases": measured["phases"]}
        row["reserved_ratio"] = round(figures.reserved / GIB / measured["reserved_gib"], 4)
        row |= {"measured": measured["categories"], "predicted": {k: v / GIB for k, v in profile.at_peak.items()}}
    return row


def replayed_snapshot(path: Path) -> dict:
    """How far the model of the allocator follows the run's own record."""
    try:
        trace = read_snapshot(path)
    except UserError as e:
        return {"error": str(e)}
    found = verify(trace)
    keys = ("allocations", "at_recorded_address", "segments", "segments_foreseen", "exact")
    return {key: getattr(found, key) for key in keys} | {"contradictions": found.contradictions[:3]}


def on_gpu(out: Path) -> bool:
    """memory_cuda.*; whether all predictions are within 1% of what is allocated, and within 3% of what is reserved."""
    rows = []
    for name, config in cases().items():
        rows.append(compare(name, config))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    lines = common.table(rows, {
        "configuration, one GPU": lambda r: r["name"],
        "measured GiB": lambda r: "out of memory" if r["oom"] else f"{r['peak_gib']:.2f}",
        "predicted": lambda r: f"{r['predicted_gib']:.2f}",
        "predicted / measured": lambda r: "" if r["oom"] else f"{r['ratio']:.3f}",
        "reserved": lambda r: "" if r["oom"] else f"{r['reserved_gib']:.2f}",
        "predicted / reserved": lambda r: "" if r["oom"] else f"{r['reserved_ratio']:.3f}",
        "snapshot replayed": lambda r: "exactly" if r["snapshot"].get("exact") else "not exactly",
        "used on the device": lambda r: "" if r["oom"] else f"{r['device_used_gib']:.2f}",
        "s a step": lambda r: "" if r["oom"] else f"{r['step_seconds']:.3f}",
    })  # fmt: skip
    where = common.conditions("cuda")
    worst, worst_reserved = (
        max((abs(r[key] - 1) for r in rows if not r["oom"]), default=None) for key in ("ratio", "reserved_ratio")
    )
    text = (
        f"Peaks of training steps on one {where['machine']}, {where['date']}: measured by CUDA's allocator, predicted "
    )
    text += f"without it.\n\n{lines}\n`python benchmarks/memory.py --measure`\n"
    common.write(
        out, "memory_cuda", {"conditions": where, "worst": worst, "worst_reserved": worst_reserved, "rows": rows}, text
    )
    return worst is not None and worst_reserved is not None and worst <= 0.01 and worst_reserved <= 0.03


def worker(mode: str, ranks: int, settings: list[dict]) -> list:
    """What tests/memory_worker.py makes of the settings."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / "tests/memory_worker.py"), mode,
         *map(json.dumps, settings)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def exact(out: Path, all_ranks: list[int], stages: list) -> bool:
    """memory.*: what stays between two steps of a tiny model in bf16, really and predicted, rank by rank."""
    rows = []
    for ranks in all_ranks:
        asked = [(i, rank) for i in range(len(stages)) for rank in sorted({0, ranks - 1})]
        real = worker("real", ranks, [{"stage": s} for s in stages])
        fake = worker("fake", 1, [{"stage": stages[i], "ranks": ranks, "rank": rank} for i, rank in asked])
        for (i, rank), predicted in zip(asked, fake):
            really = real[i][rank]
            row = {"stage": stages[i], "ranks": ranks, "rank": rank, "peak": [really["peak"], predicted["peak"]]}
            row |= {k: [really["after"][k], predicted["after"][k]] for k in STAYS}
            rows.append(row | {"exact": all(row[k][0] == row[k][1] for k in STAYS)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {"conditions": common.conditions("cpu"), "exact": sum(r["exact"] for r in rows), "of": len(rows)}
    common.write(out, "memory", result | {"rows": rows}, in_words(result | {"rows": rows}))
    print(json.dumps({k: result[k] for k in ("exact", "of")}))
    return all(r["exact"] or (r["stage"], r["ranks"]) == ONE_COPY for r in rows)


# a rank alone gathers its parameters from the host by a copy, which there is none of where the device is the host
ONE_COPY = ("3_offload", 1)


def in_words(result: dict) -> str:
    """memory.md"""
    columns = {"ZeRO stage": lambda r: r["stage"], "ranks": lambda r: r["ranks"], "rank": lambda r: r["rank"]}
    for k in STAYS:
        columns[k] = lambda r, k=k: f"{r[k][0]:,}" if r[k][0] == r[k][1] else f"{r[k][0]:,}, predicted {r[k][1]:,}"
    columns["predicted / real peak"] = lambda r: f"{r['peak'][1] / r['peak'][0]:.4f}"
    where = result["conditions"]
    return f"""Bytes between two steps of a tiny model in bf16, as real tensors hold them on {where["machine"]} over gloo, {where["date"]}: {result["exact"]} of {result["of"]} profiles are predicted to the byte in all of these categories.

{common.table(result["rows"], columns)}
Tensors on the host count, too. `3_offload` on one rank differs because a CPU has one memory: whole parameters are not copied out of the rank's share there, as they are onto a GPU. The peak within a step can also differ by what gloo holds until its thread is done. `python benchmarks/memory.py`
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="on the GPU that is here")
    parser.add_argument("--small", action="store_true", help="one setting on CPUs: that it works")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    if args.small:
        ((measured,),) = worker("measure", 1, [{"stage": 2}])
        (predicted,) = worker("fake", 1, [{"stage": 2}])
        print(json.dumps({"measured_gib": measured["peak_gib"], "predicted_gib": predicted["peak"] / GIB}))
        sys.exit(not exact(args.out, [1], [2]))
    elif args.measure:
        sys.exit(not on_gpu(args.out))
    else:
        sys.exit(not exact(args.out, args.ranks, STAGES))


if __name__ == "__main__":
    main()
