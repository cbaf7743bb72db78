"""A rank of `test_memory` and of benchmarks/memory.py; rank 0 prints one JSON object: for each setting, all ranks'.

torchrun --nproc_per_node 2 tests/memory_worker.py real '{"stage": 2}' '{..}'          profiles of steps on real tensors
python tests/memory_worker.py fake '{"stage": 2, "ranks": 2, "rank": 1}' '{..}'        the same, predicted
torchrun --nproc_per_node 2 tests/memory_worker.py measure '{"stage": 2}' '{..}'       what `memory measure` does, on CPUs
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import BertConfig  # noqa: E402

from dit_ds.config.load import validate  # noqa: E402
from dit_ds.config.schema import RunConfig  # noqa: E402
from dit_ds.distributed import World, connect, disconnect, gather_objects  # noqa: E402
from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors  # noqa: E402
from dit_ds.planning.memory.live_tensors import LiveTensors  # noqa: E402
from dit_ds.planning.memory.measure import MeasureRequest, measure  # noqa: E402
from dit_ds.planning.memory.profiled_step import Steps  # noqa: E402
from dit_ds.planning.memory.tracker import MemoryTracker  # noqa: E402

MICRO_BATCH = 2


def configuration(
    folder: str, stage: int | str = 0, ranks: int = 1, precision: str = "bf16", policy: str = "none",
    accumulation: int = 1, **train: Any,
) -> RunConfig:  # fmt: skip
    """A tiny model whose attention runs on a CPU and on the fake GPU alike.

    It has no dropout, whose masks are of bools on a GPU and of the features' type on a CPU.

    Args:
        folder: to write BERT's configuration into.
        stage: names one of configs/deepspeed, as 2 or 2_offload.
        train: more keys of the configuration's `train`.
    """
    BertConfig(
        architectures=["BertModel"], vocab_size=1000, hidden_size=96, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=200, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)  # fmt: skip
    batch = {"batch_size": ranks * MICRO_BATCH * accumulation, "activation_checkpointing": policy}
    return validate(
        {
            "data": {"image_size": 64},
            "model": {"size": "vit_t", "attention": "chunked"},
            "text": {"name": folder, "random_init": True},
            "train": batch | train,
            "deepspeed": {
                "config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                "precision": precision,
                "override": {"train_micro_batch_size_per_gpu": MICRO_BATCH},
            },
        }
    )


def profiled(config: RunConfig, world: World, tracker: MemoryTracker) -> dict[str, Any]:
    """A step's profile, with what the engine's own tensors add up to. The tracker is active."""
    steps = Steps.load(config, world, tracker)
    steps.warm_up()
    p = steps.take(MICRO_BATCH)
    module, optimizer = steps.engine.module, steps.engine.basic_optimizer
    parameters = list(module.parameters())
    held = [getattr(p, "ds_tensor", p) for p in parameters]
    masters = [x for g in optimizer.param_groups for x in g["params"]]
    states = [x for s in optimizer.state.values() for x in s.values()]
    numels = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
    walked = {
        "parameters": storages([*parameters, *held, *module.buffers()]),
        "masters": storages(masters),
        "states": storages(states),
    }
    result = {"peak": p.peak, "phases": p.phases, "at_peak": p.at_peak, "after": p.after, "kept": p.kept}
    sizes = [x.numel() * x.element_size() for x in module.buffers()]
    return result | {"numels": numels, "buffer_sizes": sizes, "walked": walked}


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once and rounded as CUDA's allocator rounds."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(-(-n // 512) * 512 for n in found.values())


def real(setting: dict[str, Any], world: World, folder: str) -> list[dict[str, Any]]:
    """Each rank's profile."""
    tracker = MemoryTracker()
    with tracker:
        mine = profiled(configuration(folder, ranks=world.world_size, **setting), world, tracker)
    return gather_objects(mine)


def fake(setting: dict[str, Any]) -> dict[str, Any]:
    """One rank's profile, predicted; for a process of its own. What would lie on the host counts, too: as on a CPU."""
    warnings.simplefilter("ignore")
    ranks, rank, tracker = setting.pop("ranks", 1), setting.pop("rank", 0), MemoryTracker()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder, ranks=ranks, **setting)
        with fake_cluster(ranks, rank) as world, fake_tensors(tracker):
            return profiled(config, world, tracker)


class CountingAllocator(LiveTensors):
    """On a CPU in the place of CUDA's statistics: all tensors made while it is active.

    Args:
        capacity: bytes above which a new tensor is refused.
    """

    def __init__(self, capacity: int = 1 << 40):
        super().__init__()
        self._capacity = capacity

    def _allocated(self, size: int, x: Tensor) -> int:
        super()._allocated(size, x)
        if self.now > self._capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nOf this GPU's")
        return size

    def reset(self) -> None:
        self.peak = self.now

    def peaks(self) -> tuple[int, int]:
        return self.peak, 2 * self.peak

    def used(self) -> int:
        return 3 * self.now

    def capacity(self) -> int:
        return self._capacity

    def synchronize(self) -> None:
        """Nothing runs behind our back."""

    def record(self) -> None:
        """As on a GPU."""

    def snapshot(self, path: Path) -> None:
        path.write_text("snapshot")


def measured(setting: dict[str, Any], world: World, folder: str) -> list[dict[str, Any]]:
    """Each rank's result of `measure`. The one that is to report prints it, too.

    `capacity` is that of the last rank; `timeline` and `snapshot` are files.
    """
    files = {k: setting.pop(k, None) for k in ("timeline", "snapshot")}
    capacity, steps = setting.pop("capacity", 1 << 40), setting.pop("steps", 1)
    config = configuration(folder, ranks=world.world_size, **setting)
    last = world.rank == world.world_size - 1
    with CountingAllocator(capacity if last else 1 << 40) as allocator:
        result = measure(config, world, allocator, MeasureRequest(steps, 1, **files), lambda r: print(json.dumps(r)))
    return [result] if result["oom"] else gather_objects(result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    mode, settings = sys.argv[1], [json.loads(s) for s in sys.argv[2:]]
    if mode == "fake":
        # forked, each for itself: the imports take longer than the answers
        with (
            multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool,
            contextlib.redirect_stdout(sys.stderr),
        ):
            results = pool.map(fake, settings, chunksize=1)
        print(json.dumps(results))
    else:
        world = connect()
        with tempfile.TemporaryDirectory() as folder:
            results = [{"real": real, "measure": measured}[mode](s, world, folder) for s in settings]
        if world.main:
            print(json.dumps(results))
        disconnect()
