"""Bytes that ranks send in a step, by formula and counted, and predicted step times on more nodes.

Counted: a tiny model's real steps on 2 and 4 ranks, every collective that torch.distributed is asked for, at micro-batch 1.
Predicted: ViT-B and ViT-H with BERT-base. Writes scaling.json and .md; `--json` prints the JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from scaling_worker import compare  # noqa: E402
from test_scaling import TIGHT  # noqa: E402

from benchmarks import common  # noqa: E402
from dit_ds.config.load import load_config  # noqa: E402
from dit_ds.planning.communication import Transfer  # noqa: E402
from dit_ds.planning.scaling import Machine, lines, table  # noqa: E402

COUNTED = [{"stage": stage, "accumulation": a} for stage in range(4) for a in (1, 2)] + [
    {"stage": 2, "override": {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}}},
    {"stage": 2, "bf16": True, "override": {"communication_data_type": "fp32"}},
    {"stage": 3, "freeze_text": False, "policy": "block", "override": {"zero_optimization": TIGHT}},
]
PREDICTED = [("vit_b", 2, "none", 64), ("vit_b", 3, "none", 64), ("vit_h", 2, "block", 64), ("vit_h", 3, "block", 64)]
NODES = [1, 2, 4, 8, 16, 32, 64]


def sent(buffers: dict[tuple[str, int], float]) -> float:
    """Bytes that a rank sends of whole buffers, by the ring algorithm."""
    return sum(Transfer("", kind, size, 1, ranks, "step").sent for (kind, ranks), size in buffers.items())


def described(setting: dict) -> str:
    """A setting in words."""
    zero = dict(setting.get("override", {}))
    zero |= zero.pop("zero_optimization", {})
    words = [f"{k.removeprefix('stage3_')} {v}" for k, v in zero.items()]
    words += ["text encoder tuned"] * (not setting.get("freeze_text", True)) + ["bf16"] * setting.get("bf16", False)
    words += ["each layer recomputed"] * (setting.get("policy") == "block")
    return ", ".join(words)


def counted_rows() -> list[dict]:
    """Each setting on 2 and on 4 ranks, and hierarchical partitioning on 4."""
    hierarchical = {
        "stage": 3,
        "accumulation": 2,
        "override": {"zero_optimization": TIGHT | {"zero_hpz_partition_size": 2}},
    }
    rows = []
    for ranks, settings in ((2, COUNTED), (4, [*COUNTED, hierarchical])):
        for got in compare(ranks, settings):
            setting = got["setting"]
            rows.append(
                {
                    "ranks": ranks,
                    "stage": setting["stage"],
                    "accumulation": setting.get("accumulation", 1),
                    "setting": described(setting),
                    "formula_bytes": sent(got["formula"]),
                    "counted_bytes": sent(got["counted"]),
                    "same": got["formula"] == got["counted"],
                    "single_numbers_bytes": got["scalars"],
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def predicted_tables() -> list[dict]:
    """The commands' own results."""
    results = []
    for size, stage, policy, batch in PREDICTED:
        overrides = [
            *("--model.size", size, "--train.activation_checkpointing", policy, "--train.batch_size", str(batch)),
            *("--deepspeed.config", str(ROOT / f"configs/deepspeed/zero{stage}.json")),
        ]
        config = load_config(ROOT / "configs/base.yaml", overrides)
        results.append({"model": size, "checkpointing": policy} | table(config, Machine(), NODES))
    return results


ROWS = {
    "ranks": lambda r: r["ranks"],
    "stage": lambda r: r["stage"],
    "micro-batches": lambda r: r["accumulation"],
    "setting": lambda r: r["setting"],
    "formula": lambda r: f"{r['formula_bytes']:,.0f}",
    "counted": lambda r: f"{r['counted_bytes']:,.0f}",
    "the same": lambda r: "yes" if r["same"] else "no",
}


def report(result: dict) -> str:
    """The Markdown of all tables."""
    text = f"# Scaling\n\n{result['machine']}, {result['date']}.\n\n## Bytes a rank sends in a step\n\n"
    text += (
        "A tiny model in fp32 with a frozen text encoder where nothing else is said. Counted: what torch.distributed "
    )
    text += "was asked for, times what the ring algorithm sends of it. The gradient norm and the overflow flag, single "
    text += f"numbers, come on top: {max(r['single_numbers_bytes'] for r in result['counted'])} bytes at most.\n\n"
    text += common.table(result["counted"], ROWS)
    text += "\n## Predicted step times\n\nPredictions, not measurements; `configs/base.yaml`, micro-batch 8 where it divides.\n"
    for r in result["predicted"]:
        text += f"\n### {r['model']}, ZeRO stage {r['stage']}, activation checkpointing {r['checkpointing']}\n\n```\n"
        text += "\n".join(lines(r)) + "\n```\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    result = common.conditions("cpu") | {"benchmark": "scaling"}
    result |= {"counted": counted_rows(), "predicted": predicted_tables()}
    common.write(args.out, "scaling", result, report(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
