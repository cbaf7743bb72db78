"""Training steps whose every collective is counted, beside the formula's figures. `compare` starts the ranks:

torchrun --nproc_per_node 2 tests/scaling_worker.py '[{"stage": 2, "accumulation": 2}, ..]'
"""

from __future__ import annotations

import collections
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from conftest import MINILM, ROOT, warm
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.distributed import World, connect, disconnect
from dit_ds.engine import engine as ds
from dit_ds.engine.deepspeed_json import read_deepspeed_json
from dit_ds.models.build import build_model
from dit_ds.models.losses import segmentation_loss
from dit_ds.planning.communication import ModuleTrace, communication_volume
from dit_ds.planning.flops import hardware_flops
from dit_ds.planning.memory.profiled_step import fake_batch

KINDS = {
    "allreduce_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
}


class Collectives(TorchDispatchMode):
    """Counts the tensors that torch.distributed is asked to send.

    Attributes:
        bytes: (kind, ranks in the group) to bytes of the whole buffer, those of single numbers apart as `scalar`.
        calls: the same of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname != "barrier":
            kind = KINDS[func._opname]  # another one is an error: it would go uncounted
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            group = next(x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject))
            size = max(x.numel() * x.element_size() for x in tensors)  # of a gather's output, a reduce-scatter's input
            if sum(x.numel() for x in tensors) == 1:
                kind = "scalar"
            self.bytes[kind, ProcessGroup.unbox(group).size()] += size
            self.calls[kind, ProcessGroup.unbox(group).size()] += 1
        return func(*args, **(kwargs or {}))


def configuration(world_size: int, stage: int, accumulation: int = 1, policy: str = "none", freeze_text: bool = True,
                  freeze_image: bool = False, bf16: bool = False, override: dict | None = None) -> RunConfig:  # fmt: skip
    """A tiny model at micro-batch 1."""
    base = {"bf16": {"enabled": bf16}, "train_micro_batch_size_per_gpu": 1}
    return validate(
        {
            "model": {"size": "vit_t", "attention": "chunked", "freeze_image_encoder": freeze_image},
            "data": {"image_size": 64},
            "text": {"name": MINILM, "layers": 1, "freeze": freeze_text, "random_init": True},
            "train": {"batch_size": world_size * accumulation, "activation_checkpointing": policy},
            "deepspeed": {
                "config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                "override": merge(base, override or {}),
            },
        }
    )


def count(world: World, setting: dict) -> list[list]:
    """[kind, ranks, bytes, calls] of one rank's third step; by the third all that happens once is over."""
    config = configuration(world.world_size, **setting)
    model = build_model(config)
    model.image_encoder.checkpoint_activations(config.train.activation_checkpointing)
    engine = ds.initialize(model, config, world)
    engine.train()
    for _ in range(3):
        with Collectives() as collectives:
            for _ in range(setting.get("accumulation", 1)):
                inputs, mask, weight = fake_batch(1, config.data.image_size, config.data.tokens)
                engine.backward(segmentation_loss(engine(**inputs), mask, weight))
                engine.step()
    return [[*key, size, collectives.calls[key]] for key, size in collectives.bytes.items()]


def by_formula(ranks: int, setting: dict) -> dict[tuple[str, int], float]:
    """(kind, ranks) to bytes of the whole buffers."""
    config, trace = configuration(ranks, **setting), ModuleTrace()
    hardware_flops(config, trace.record)
    found: collections.Counter = collections.Counter()
    for transfer in communication_volume(trace, read_deepspeed_json(config), ranks, setting.get("accumulation", 1)):
        found[transfer.collective, transfer.ranks] += transfer.buffer
    return dict(found)


def compare(ranks: int, settings: list[dict]) -> list[dict]:
    """Both of each setting: `counted`, `formula` ((kind, ranks) to bytes) and `scalars`, bytes of single numbers."""
    done = warm([__file__, json.dumps(settings)], ranks, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for setting, rows in zip(settings, json.loads(done.stdout.splitlines()[-1])):
        counted = {(kind, n): size for kind, n, size, _ in rows if kind != "scalar"}
        scalars = sum(size for kind, _, size, _ in rows if kind == "scalar")
        formula = by_formula(ranks, setting)
        results.append({"setting": setting, "counted": counted, "formula": formula, "scalars": scalars})
    return results


if __name__ == "__main__":
    world = connect()
    results = [count(world, setting) for setting in json.loads(sys.argv[1])]
    if world.main:
        print(json.dumps(results))
    disconnect()
