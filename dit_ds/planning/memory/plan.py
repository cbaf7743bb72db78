"""What a run takes of a GPU's memory, predicted with no GPU and no weights, and what fits.

The real model, loss, backward pass and DeepSpeed engine take steps on fake tensors (see `predict`), as one of the ranks.
What they ask for goes through a model of CUDA's caching allocator, for three figures: allocated, least capacity, reserved
(see `figures`). A run fits where its least capacity does. To that come assumptions, which every report states: CUDA's
context, NCCL's buffers where there are several ranks, cuDNN's workspace, and a margin for what is not modelled.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.config.train_schema import TrainConfig
from dit_ds.engine.batch_split import split_batch
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config, optimizer_refusal, read_deepspeed_json
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.errors import UserError
from dit_ds.files import GIB
from dit_ds.planning.memory.allocator_settings import TRAIN_SETTINGS, AllocatorSettings
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.figures import Figures
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest
from dit_ds.planning.memory.timeline import draw, require
from dit_ds.planning.memory.tracker import Profile

# train.compile is left out: what compiled kernels don't materialise is counted, too
CONTEXT_GIB, NCCL_GIB, MARGIN = 0.6, 0.5, 0.02

# settings from the fastest to the most frugal: tried in this order for a run that doesn't fit
_LADDER = ("zero2", "zero3", "zero3_offload")


def context(ranks: int) -> float:
    """Bytes of the GPU that others than PyTorch's allocator hold: assumed, see above."""
    return (CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0)) * GIB


def needed(capacity: float, ranks: int) -> float:
    """Bytes that a GPU must have for so many bytes of segments."""
    return capacity * (1 + MARGIN) + context(ranks)


def allowed(memory: float, ranks: int) -> int:
    """The other way round: the bytes of segments that a GPU of so many bytes has room for; 0 for very small ones."""
    return max(0, int((memory - context(ranks)) / (1 + MARGIN)))


def plan(config: RunConfig, gpus: int, nodes: int, memory: float, timeline: str | Path | None = None, *,
         gpu: str = "H100", settings: str = TRAIN_SETTINGS, rank: int = 0) -> dict[str, Any]:  # fmt: skip
    """Predict a run's memory.

    Args:
        gpus: of a node, one rank each.
        memory: bytes of a GPU.
        gpu: whose operators' workspaces and scratch count.
        settings: of the allocator, as in PYTORCH_CUDA_ALLOC_CONF.
        rank: whose memory.
        timeline: PNG to draw the step into.
    Returns:
        What `dit-ds memory plan --json` prints; all sizes in GiB, those at the peak by category.
    Raises:
        UserError: a batch that doesn't divide, a missing file, a text encoder that isn't there.
    """
    ranks = gpus * nodes
    if not rank < ranks:
        raise UserError(f"there is no rank {rank} of {ranks}: they are counted from 0")
    if timeline:
        require(timeline)
    AllocatorSettings.parse(settings)
    ds_config = deepspeed_config(config, ranks)
    room = allowed(memory, ranks)
    asked = MemoryRequest(config, ranks, rank, gpu, settings, capacity=room, memory=memory, compare=True, bar="predict")
    (answer,) = predict([asked])
    micro = DeepSpeedJson(ds_config).micro_batch
    result = _described(config, ds_config, ranks, micro, answer) | {
        "gpus": gpus,
        "nodes": nodes,
        "host_gib_per_node": _gib(answer.profiles[micro].host * gpus),
        "gpu_memory_gib": _gib(memory),
    }
    figures = answer.figures[micro]
    fits = answer.failure is None
    result |= {"fits": fits, "largest_micro_batch": answer.largest, "gpu": gpu, "rank": rank}
    result["advice"] = _advice(result, config.train, ds_config, ranks) + _less_reserved(figures)
    result["fails"] = answer.failure
    if timeline:
        draw(
            answer.profiles[micro],
            timeline,
            f"predicted: {config.model.size}, rank {rank} of {ranks}, {micro} samples at once",
        )
    if not fits:
        result["closest"] = closest(asked)
    return result


def _described(
    config: RunConfig, ds_config: dict[str, Any], ranks: int, micro: int, answer: MemoryEstimate
) -> dict[str, Any]:
    profile, figures = answer.profiles[micro], answer.figures[micro]
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
        "allocated_gib": _gib(figures.allocated),
        "least_capacity_gib": _gib(figures.least_capacity),
        "reserved_gib": _gib(figures.reserved),
        "allocator_settings": figures.settings,
        "reserved_by_settings": {text: _gib(size) for text, size in figures.others.items()},
        "pinned_by": {site: _gib(size) for site, size in figures.pinned.items()},
        "margin_gib": _gib(figures.least_capacity * MARGIN),
        "context_gib": context(ranks) / GIB,
        "cudnn_workspace_gib": _gib(answer.cudnn),
        "needed_gib": _gib(needed(figures.least_capacity, ranks)),
        "torch": torch.__version__,
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


def _advice(result: dict[str, Any], t: TrainConfig, ds_config: dict[str, Any], ranks: int) -> list[str]:
    """What would lower the peak, by what it mostly consists of."""
    at, stage, advice = defaultdict(float, result["categories"]), result["stage"], []
    kept = at["activations"]
    if kept > 0.3 * result["peak_gib"] and result["checkpointing"] == "none":
        advice.append(f"activations take {kept:.1f} GiB: train.activation_checkpointing block keeps each layer's input")
    elif kept > 0.5 * result["peak_gib"]:
        advice.append(f"activations take {kept:.1f} GiB: a smaller micro-batch takes less in proportion")

    def possible(setting: str) -> bool:
        return optimizer_refusal(t, DeepSpeedJson(ds_config | {"zero_optimization": SETTINGS[setting]})) is None

    states, grads, weights = at["optimizer"] + at["average"], at["gradients"], at["parameters"]
    if states > 0.25 * result["peak_gib"]:
        if stage == 0 and ranks > 1:
            saved = states * (1 - 1 / ranks)
            advice.append(
                f"masters and the optimizer's states take {states:.1f} GiB: zero1.json to share out {saved:.1f} of it"
            )
        elif not DeepSpeedJson(ds_config).offload_optimizer and possible(
            name := "zero3_offload" if stage == 3 else "zero2_offload"
        ):
            advice.append(
                f"masters and the optimizer's states take {states:.1f} GiB: {name}.json puts them on the host"
            )
    if weights + grads > 0.25 * result["peak_gib"] and stage < 3 and ranks > 1 and possible("zero3"):
        advice.append(f"weights and gradients take {weights + grads:.1f} GiB: zero3.json shares them out, too")
    if at["buffers"] > 0.2 * result["peak_gib"]:
        advice.append(f"DeepSpeed's buffers take {at['buffers']:.1f} GiB: see reduce_bucket_size in configs/deepspeed")
    if not advice:
        advice.append(f"mostly {result['dominated_by']}: nothing stands out")
    return advice


def _less_reserved(figures: Figures) -> list[str]:
    """What would lower what is reserved beyond what is allocated, where that is much."""
    advice = []
    if figures.fragmentation > 0.1:
        settings, least = min(figures.others.items(), key=lambda item: item[1], default=("", figures.reserved))
        if least < 0.95 * figures.reserved:
            advice.append(
                f"{figures.reserved / GIB:.1f} GiB are reserved for {figures.allocated / GIB:.1f}: "
                f"{f'PYTORCH_ALLOC_CONF={settings}' if settings else 'the default settings'} would reserve {least / GIB:.1f}"
            )
        site = next(iter(figures.pinned), "")
        if site:
            advice.append(
                f"{figures.pinned[site] / GIB:.1f} GiB lie free around blocks of '{site}': another micro-batch moves them"
            )
    return advice


def closest(asked: MemoryRequest) -> dict[str, Any]:
    """The nearest setting that fits: fewer samples at once first, then what costs more and more time.

    Returns:
        `changes` in words, `micro_batch`, `needed_gib`; `fits` False where none does, with the most frugal one.
    """
    asked = replace(asked, bar="predict what would fit")
    config, ranks = asked.config, asked.ranks
    assert asked.capacity is not None
    for words, shape in _frugal(config, ranks):
        (answer,) = predict([replace(asked, config=shape, micro_batches=(1,))])
        micro, capacity = 1, answer.figures[1].least_capacity
        if answer.largest:
            split = split_batch(config.train.batch_size, ranks, answer.largest)
            assert split is not None  # the ranks divide the batch, or nothing would be predicted
            micro = split.micro_batch
            override = {"deepspeed": {"override": {"train_micro_batch_size_per_gpu": micro}}}
            run = validate(merge(shape.model_dump(), override))
            (answer,) = predict([replace(asked, config=run, micro_batches=(), capacity=None, share=0.0)])
            capacity = answer.figures[micro].least_capacity
        fits, need = capacity <= asked.capacity, needed(capacity, ranks)
        found = {"fits": fits, "changes": words, "micro_batch": micro, "needed_gib": _gib(need)}
        if fits:
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
    raw = read_deepspeed_json(config)
    ds = DeepSpeedJson(raw)
    for name in _LADDER:
        setting = SETTINGS[name]
        if optimizer_refusal(config.train, DeepSpeedJson(raw | {"zero_optimization": setting})):
            continue
        further = setting["stage"] > ds.stage if ranks > 1 else False  # a single rank has nothing to partition
        if further or ("offload_optimizer" in setting and not ds.offload_param):
            changes = {"deepspeed": {"override": {"zero_optimization": setting}}}
            yield [*words, f"the zero_optimization of configs/deepspeed/{name}.json"], validate(merge(values, changes))


def lines(result: dict[str, Any]) -> list[str]:
    """`plan`'s result for people."""
    r = result
    at = ", ".join(f"{k} {v:.2f}" for k, v in sorted(r["categories"].items(), key=lambda x: -x[1]) if v >= 0.005)
    kept = ", ".join(f"{k} {v:.2f}" for k, v in r["kept_by_module"].items() if v >= 0.005)
    where = f"in {r['peak_phase']}" + (f", {r['peak_module']}" if r["peak_module"] else "")
    out = [
        f"predicted, not measured: ZeRO stage {r['stage']} on {r['ranks']} ranks, {r['precision']}, "
        f"{r['micro_batch']} samples at once x {r['accumulation']}, checkpointing {r['checkpointing']}; "
        f"{r['trained_parameters'] / 1e6:.0f} of {r['parameters'] / 1e6:.0f} M parameters trained",
        f"peak      {r['peak_gib']:.2f} GiB allocated ({where}): {at}",
        "phases    " + ", ".join(f"{k} {v:.2f}" for k, v in r["phases"].items()),
        f"kept      {kept or 'less than 0.005 a part'}",
        f"memory    {r['allocated_gib']:.2f} GiB allocated, {r['least_capacity_gib']:.2f} least capacity, "
        f"{r['reserved_gib']:.2f} reserved with {r['allocator_settings'] or 'default settings'} "
        f"({r['gpu']}, torch {r['torch']})",
        f"needed    {r['needed_gib']:.2f} of {r['gpu_memory_gib']:.1f} GiB: the least capacity, {MARGIN:.0%} of it as a "
        f"margin, and {r['context_gib']:.1f} GiB for CUDA's context{' and NCCL' if r['ranks'] > 1 else ''} (assumed); "
        f"cuDNN may take {r['cudnn_workspace_gib']:.2f} more for a moment",
    ]
    if r["host_gib_per_node"] >= 0.1:
        out.append(f"host      {r['host_gib_per_node']:.1f} GiB a node")
    out.append(f"largest   micro-batch that fits: {r['largest_micro_batch']}")
    out += [f"lower it  {a}" for a in r["advice"]]
    if not r["fits"]:
        out.append(f"fails     {r['fails']['site']}: {r['fails']['message']}")
        c = r["closest"]
        with_ = ", ".join([*c["changes"], f"micro-batch {c['micro_batch']}"])
        verdict = "fits with" if c["fits"] else "does not fit on any setting; the most frugal is"
        out.append(f"{verdict} {with_}: {c['needed_gib']:.2f} GiB")
    return out
