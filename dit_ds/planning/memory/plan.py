"""What a run takes of a GPU's memory, predicted with no GPU and no weights, and what fits.

The real model, loss, backward pass and DeepSpeed engine take a step on fake tensors (see `predict`), as the first of all
ranks. To the peak of what they allocate come three assumptions, which every report states: the allocator's reserve, CUDA's
context with the libraries' workspaces, and NCCL's buffers where there are several ranks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import split_batch
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config, read_deepspeed_json
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.files import GIB
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest
from dit_ds.planning.memory.timeline import draw, require
from dit_ds.planning.memory.tracker import Profile

# train.compile is left out: what compiled kernels don't materialise is counted, too
CONTEXT_GIB, NCCL_GIB, RESERVE = 0.6, 0.5, 0.05

# settings from the fastest to the most frugal: tried in this order for a run that doesn't fit
_LADDER = ("zero2", "zero3", "zero3_offload")


def needed(peak: float, ranks: int) -> float:
    """Bytes of the GPU that a peak of allocated bytes takes up, as nvidia-smi would show it: assumed, see above."""
    return peak * (1 + RESERVE) + (CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0)) * GIB


def allowed(memory: float, ranks: int) -> int:
    """The other way round: the peak of allocated bytes that a GPU of so many bytes can have; 0 for very small ones."""
    return max(0, int((memory - needed(0, ranks)) / (1 + RESERVE)))


def plan(config: RunConfig, gpus: int, nodes: int, memory: float, timeline: str | Path | None = None) -> dict[str, Any]:
    """Predict a run's memory.

    Args:
        gpus: of a node, one rank each.
        memory: bytes of a GPU.
        timeline: PNG to draw the step into.
    Returns:
        What `dit-ds memory plan --json` prints; all sizes in GiB, those at the peak by category.
    Raises:
        UserError: a batch that doesn't divide, a missing file, a text encoder that isn't there.
    """
    ranks = gpus * nodes
    if timeline:
        require(timeline)
    ds_config = deepspeed_config(config, ranks)
    room = allowed(memory, ranks)
    (answer,) = predict([MemoryRequest(config, ranks, capacity=room)])
    micro = DeepSpeedJson(ds_config).micro_batch
    result = _described(config, ds_config, ranks, micro, answer) | {
        "gpus": gpus,
        "nodes": nodes,
        "host_gib_per_node": _gib(answer.profiles[micro].host * gpus),
        "gpu_memory_gib": _gib(memory),
    }
    fits = answer.profiles[micro].peak <= room
    result |= {"fits": fits, "largest_micro_batch": answer.largest}
    result["advice"] = _advice(result, ds_config, ranks)
    if timeline:
        draw(
            answer.profiles[micro],
            timeline,
            f"predicted: {config.model.size}, rank 0 of {ranks}, {micro} samples at once",
        )
    if not fits:
        result["closest"] = closest(config, ranks, room)
    return result


def _described(
    config: RunConfig, ds_config: dict[str, Any], ranks: int, micro: int, answer: MemoryEstimate
) -> dict[str, Any]:
    profile = answer.profiles[micro]
    categories = {k: _gib(v) for k, v in profile.at_peak.items() if v}
    return {
        "predicted": True,
        "ranks": ranks,
        "stage": DeepSpeedJson(ds_config).stage,
        "precision": DeepSpeedJson(ds_config).precision,
        "checkpointing": config.train.activation_checkpointing,
        "micro_batch": micro,
        "accumulation": DeepSpeedJson(ds_config).accumulation,
        "parameters": answer.parameters,
        "trained_parameters": answer.trained,
        "peak_gib": _gib(profile.peak),
        "peak_phase": profile.phase,
        "peak_module": profile.module,
        "categories": categories,
        "dominated_by": max(categories, key=categories.__getitem__),
        "phases": {k: _gib(v) for k, v in profile.phases.items()},
        "between_steps": {k: _gib(v) for k, v in profile.after.items() if v},
        "kept_by_module": {k: _gib(v) for k, v in by_module(profile).items()},
        "gib_per_sample": _gib(profile.peak / micro),
        "reserve_gib": _gib(profile.peak * RESERVE),
        "context_gib": CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0),
        "needed_gib": _gib(needed(profile.peak, ranks)),
    }


def by_module(profile: Profile, most: int = 12) -> dict[str, int]:
    """Bytes kept for the backward pass by part of the model, its layers together, the largest first."""
    sums: dict[str, int] = defaultdict(int)
    for module, size in profile.kept.items():
        parts = re.sub(r"\.\d+(?=\.|$)", ".*", module).split(".")
        sums[".".join(parts[:4]) or "loss"] += size
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:most])


def _gib(size: float) -> float:
    return round(size / GIB, 3)


def _advice(result: dict[str, Any], ds_config: dict[str, Any], ranks: int) -> list[str]:
    """What would lower the peak, by what it mostly consists of."""
    at, stage, advice = defaultdict(float, result["categories"]), result["stage"], []
    kept = at["activations"]
    if kept > 0.3 * result["peak_gib"] and result["checkpointing"] == "none":
        advice.append(f"activations take {kept:.1f} GiB: train.activation_checkpointing block keeps each layer's input")
    elif kept > 0.5 * result["peak_gib"]:
        advice.append(f"activations take {kept:.1f} GiB: a smaller micro-batch takes less in proportion")
    states, grads, weights = at["optimizer"] + at["average"], at["gradients"], at["parameters"]
    if states > 0.25 * result["peak_gib"]:
        if stage == 0 and ranks > 1:
            saved = states * (1 - 1 / ranks)
            advice.append(f"masters and Adam's states take {states:.1f} GiB: zero1.json to share out {saved:.1f} of it")
        elif not DeepSpeedJson(ds_config).offload_optimizer:
            name = "zero3_offload" if stage == 3 else "zero2_offload"
            advice.append(f"masters and Adam's states take {states:.1f} GiB: {name}.json puts them on the host")
    if weights + grads > 0.25 * result["peak_gib"] and stage < 3 and ranks > 1:
        advice.append(f"weights and gradients take {weights + grads:.1f} GiB: zero3.json shares them out, too")
    if at["buffers"] > 0.2 * result["peak_gib"]:
        advice.append(f"DeepSpeed's buffers take {at['buffers']:.1f} GiB: see reduce_bucket_size in configs/deepspeed")
    if not advice:
        advice.append(f"mostly {result['dominated_by']}: nothing stands out")
    return advice


def closest(config: RunConfig, ranks: int, room: int) -> dict[str, Any]:
    """The nearest setting that fits: fewer samples at once first, then what costs more and more time.

    Returns:
        `changes` in words, `micro_batch`, `needed_gib`; `fits` False where none does, with the most frugal one.
    """
    for words, shape in _frugal(config, ranks):
        (answer,) = predict([MemoryRequest(shape, ranks, (1,), capacity=room)])
        micro, peak = 1, answer.peak(1)
        if answer.largest:
            split = split_batch(config.train.batch_size, ranks, answer.largest)
            assert split is not None  # the ranks divide the batch, or nothing would be predicted
            micro = split.micro_batch
            override = {"deepspeed": {"override": {"train_micro_batch_size_per_gpu": micro}}}
            (answer,) = predict([MemoryRequest(validate(merge(shape.model_dump(), override)), ranks)])
            peak = answer.peak(micro)
        found = {"fits": peak <= room, "changes": words, "micro_batch": micro, "needed_gib": _gib(needed(peak, ranks))}
        if found["fits"]:
            break
    return found


def _frugal(config: RunConfig, ranks: int) -> Iterator[tuple[list[str], RunConfig]]:
    """The run as it is, then with every layer recomputed, then with ever more partitioned or offloaded."""
    values = config.model_dump()
    words: list[str] = []
    yield words, config
    if config.train.activation_checkpointing != "block":
        words = ["train.activation_checkpointing block"]
        values = merge(values, {"train": {"activation_checkpointing": "block"}})
        yield words, validate(values)
    ds = DeepSpeedJson(read_deepspeed_json(config))
    for name in _LADDER:
        setting = SETTINGS[name]
        further = setting["stage"] > ds.stage if ranks > 1 else False  # a single rank has nothing to partition
        if further or ("offload_optimizer" in setting and not ds.offload_param):
            changes = {"deepspeed": {"override": {"zero_optimization": setting}}}
            yield [*words, f"the zero_optimization of configs/deepspeed/{name}.json"], validate(merge(values, changes))


def lines(result: dict[str, Any]) -> list[str]:
    """`plan`'s result for people."""
    r = result
    at = ", ".join(f"{k} {v:.2f}" for k, v in sorted(r["categories"].items(), key=lambda x: -x[1]) if v >= 0.005)
    where = f"in {r['peak_phase']}" + (f", {r['peak_module']}" if r["peak_module"] else "")
    out = [
        f"predicted, not measured: ZeRO stage {r['stage']} on {r['ranks']} ranks, {r['precision']}, "
        f"{r['micro_batch']} samples at once x {r['accumulation']}, checkpointing {r['checkpointing']}; "
        f"{r['trained_parameters'] / 1e6:.0f} of {r['parameters'] / 1e6:.0f} M parameters trained",
        f"peak      {r['peak_gib']:.2f} GiB allocated ({where}): {at}",
        "phases    " + ", ".join(f"{k} {v:.2f}" for k, v in r["phases"].items()),
        "kept      " + ", ".join(f"{k} {v:.2f}" for k, v in r["kept_by_module"].items() if v >= 0.005),
        f"needed    {r['needed_gib']:.2f} of {r['gpu_memory_gib']:.1f} GiB, with {RESERVE:.0%} for the allocator's "
        f"reserve and {r['context_gib']:.1f} GiB for CUDA's context{' and NCCL' if r['ranks'] > 1 else ''} (assumed)",
    ]
    if r["host_gib_per_node"] >= 0.1:
        out.append(f"host      {r['host_gib_per_node']:.1f} GiB a node")
    out.append(f"largest   micro-batch that fits: {r['largest_micro_batch']}")
    out += [f"lower it  {a}" for a in r["advice"]]
    if not r["fits"]:
        c = r["closest"]
        with_ = ", ".join([*c["changes"], f"micro-batch {c['micro_batch']}"])
        verdict = "fits with" if c["fits"] else "does not fit on any setting; the most frugal is"
        out.append(f"{verdict} {with_}: {c['needed_gib']:.2f} GiB")
    return out
