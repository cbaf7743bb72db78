"""The paper's Table 8, row by row: what it says, what is predicted, what is measured, and why they differ.

The table gives a batch and a GPU's memory, but neither precision, number of GPUs nor what is counted. Each row is taken
under two readings: its batch on one GPU (literal), and the share of each of 4 or 8 GPUs (inferred, from what fits);
and in two forms: as released (fp32, or fp16 autocast for ReLA; the map of attention whole) and ours.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_ds.config.load import load_config, merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import GIB
from dit_ds.paper.tables import TABLE_8, MemoryRow
from dit_ds.planning.gpus import require_peak
from dit_ds.planning.memory import plan
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.measure import in_process
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest

# GPUs of the inferred reading, and the samples on each
_SHARED_OUT = {"L-DIT": (4, 8), "LAVT": (4, 8), "ReLA": (8, 4)}

_ZERO_0 = {"deepspeed": {"config": "configs/deepspeed/zero0.json"}}
_OURS = {
    "train": {"activation_checkpointing": "block"},
    "deepspeed": _ZERO_0["deepspeed"] | {"precision": "bf16", "override": {"torch_autocast": {"enabled": False}}},
}
# what the paper's released code is, as far as memory goes: BERT's first layer only, words' padding attended to
_RELEASED_LDIT = {
    "model": {"attention": "naive", "mask_padding": False, "word_dropout": 0.1},
    "text": {"layers": 1},
    "train": {"ema_decay": 0.9997},
}
_BERT_LAYERS_UNUSED = 77_972_736  # parameters of BERT-base's layers 2 to 12: on the GPU, without gradients


_GPU, _MFU = "H100", 0.4  # of predicted step times, which are computation alone


@dataclass(frozen=True)
class Row:
    """What a row asks: a run on so many GPUs, so many samples on each."""

    method: str
    form: str  # released or ours
    reading: str  # literal, inferred or more
    config: RunConfig
    batch_per_gpu: int
    gpus: int
    paper_gb: float | None = None


def rows(which: str, folder: str | Path = "configs/paper") -> list[Row]:
    """The table's rows: the paper's, or `all`, with other sizes, checkpointing and ZeRO stages.

    Raises:
        UserError: no such configurations there.
    """
    if not (Path(folder) / "table8_ldit.yaml").exists():
        raise UserError(f"no {folder}/table8_ldit.yaml here: run from dit-ds's folder")
    found = [row for published in TABLE_8 for row in _of_paper(published, Path(folder))]
    return found if which == "paper" else found + list(_more(Path(folder)))


def _of_paper(published: MemoryRow, folder: Path) -> Iterable[Row]:
    """Both readings, released and ours."""
    method, *_, batch, paper_gb, config = published
    base = load_config(folder / f"{config}.yaml")
    gpus, each = _SHARED_OUT[method]
    released = merge(_ZERO_0, _RELEASED_LDIT if method == "L-DIT" else {"model": {"attention": "eager"}})
    for form, changes in {"released": released, "ours": _OURS}.items():
        config = _changed(base, changes)
        yield _row(method, form, "literal", config=config, each=batch, gpus=1, paper_gb=paper_gb)
        yield _row(method, form, "inferred", config=config, each=each, gpus=gpus, paper_gb=paper_gb)


def _more(folder: Path) -> Iterable[Row]:
    """Rows that the paper doesn't have: ours in other sizes, with more or less computed again, and shared out."""
    frozen, text_tuned, tuned = (
        _changed(load_config(folder / f"{row.config}.yaml"), _OURS) for row in TABLE_8 if row.method == "L-DIT"
    )
    for size in ("vit_l", "vit_h"):
        for config in (frozen, text_tuned, tuned):
            yield _row("L-DIT", "ours", "more", _changed(config, {"model": {"size": size}}), 32)
    for size in ("vit_b", "vit_l", "vit_h"):
        for policy in ("none", "selective"):
            changes = {"model": {"size": size}, "train": {"activation_checkpointing": policy}}
            yield _row("L-DIT", "ours", "more", _changed(tuned, changes), 32)
    yield _row("E-DIT", "ours", "more", _changed(tuned, {"model": {"scheme": "end_to_end"}}), 32)
    for stage in range(4):
        changes = {"model": {"size": "vit_h"}, "deepspeed": {"config": f"configs/deepspeed/zero{stage}.json"}}
        for gpus in (1, 2, 4, 8, 16):
            yield _row("L-DIT", "ours", "more", config=_changed(tuned, changes), each=8, gpus=gpus)


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    return validate(merge(config.model_dump(), changes))


def _row(
    method: str, form: str, reading: str, config: RunConfig, each: int, gpus: int = 1, paper_gb: float | None = None
) -> Row:
    batch = {"train": {"batch_size": each * gpus}, "deepspeed": {"override": {"train_micro_batch_size_per_gpu": each}}}
    return Row(method, form, reading, config=_changed(config, batch), batch_per_gpu=each, gpus=gpus, paper_gb=paper_gb)


def table8(which: str = "all", folder: str | Path = "configs/paper") -> dict[str, Any]:
    """Every row predicted, and measured on the GPUs of this machine if there are enough.

    Args:
        which: paper or all.
    Returns:
        `rows`, and what is assumed. A row's `predicted_gib` is what its `counts` says: for what was released the
        memory that the device shows, as the paper's figures; for ours what PyTorch has allocated at most.
    """
    asked = rows(which, folder)
    questions = [MemoryRequest(row.config, row.gpus, (row.batch_per_gpu,), flops=True) for row in asked]
    answers = list(tqdm(predict(questions), "predict", len(asked), unit="row", mininterval=1))
    # only then: a GPU's steps are not timed beside predictions that take all cores
    measured = [_measured(row) for row in tqdm(asked, "measure", unit="row", disable=not torch.cuda.is_available())]
    device = next((m["device"] for m in measured if m and "device" in m), None)
    assumed = {"context_gib": plan.CONTEXT_GIB, "nccl_gib": plan.NCCL_GIB, "reserve": plan.RESERVE}
    return {
        "predicted": True,
        "date": str(datetime.date.today()),
        "machine": device or "no GPU",
        "assumed": assumed | {"step_time_of": f"{_GPU} at {_MFU:.0%} of its peak, computation alone"},
        "rows": [_result(*row) for row in zip(asked, answers, measured)],
    }


def _rate(precision: str) -> float:
    """FLOP/s that are assumed."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return require_peak(_GPU, dtype) * _MFU


def _measured(row: Row) -> dict[str, Any] | None:
    if torch.cuda.device_count() < row.gpus:
        return None
    try:
        return in_process(row.config, row.gpus)
    except RunFailed as e:
        return {"failed": str(e)}


def _released_extras(row: Row, answer: MemoryEstimate) -> dict[str, int]:
    """Bytes on a GPU that our engine has no need of, and the released codes (DistributedDataParallel) have."""
    profile, trained = answer.profiles[row.batch_per_gpu], 4 * answer.trained
    extras = {"gradients that stay from step to step": trained - profile.at_peak["gradients"]}
    if row.gpus > 1:
        extras["DDP's buckets"] = trained
    if row.method == "L-DIT":
        extras["BERT's unused layers"] = 4 * _BERT_LAYERS_UNUSED
        whole = 4 * (answer.parameters + _BERT_LAYERS_UNUSED)
        extras["a moving average of all weights, frozen ones too"] = whole - profile.at_peak["average"]
    return extras


def _result(row: Row, answer: MemoryEstimate, measured: dict[str, Any] | None) -> dict[str, Any]:
    measured = measured or {}
    c, profile = row.config, answer.profiles[row.batch_per_gpu]
    extra = _released_extras(row, answer) if row.form == "released" else {}
    allocated = profile.peak + sum(extra.values())
    device = plan.needed(allocated, row.gpus)
    counts = "device" if row.form == "released" else "allocated"
    override = c.deepspeed.override
    stage = DeepSpeedJson(read_deepspeed_json(c)).stage
    autocast = override.get("torch_autocast", {}).get("enabled")
    precision = f"autocast {override['torch_autocast']['dtype']}" if autocast else c.deepspeed.precision
    figure = {"device": "device_used_gib", "allocated": "peak_gib"}[counts]
    return {
        "method": row.method,
        "size": c.model.size,
        "visual": "frozen" if c.model.freeze_image_encoder else "tuned",
        "text": "frozen" if c.text.freeze else "tuned",
        "form": row.form,
        "reading": row.reading,
        "precision": precision,
        "checkpointing": c.train.activation_checkpointing,
        "zero_stage": stage,
        "batch_per_gpu": row.batch_per_gpu,
        "gpus": row.gpus,
        "paper_gb": row.paper_gb,
        "predicted_gib": round((device if counts == "device" else allocated) / GIB, 2),
        "counts": counts,
        "allocated_gib": round(allocated / GIB, 2),
        "device_gib": round(device / GIB, 2),
        "categories": {k: round(v / GIB, 2) for k, v in profile.at_peak.items() if v >= GIB / 200},
        "beyond_ours": {k: round(v / GIB, 2) for k, v in extra.items()},
        "gib_per_sample": round(allocated / GIB / row.batch_per_gpu, 3),
        "measured_gib": measured.get(figure),
        "step_seconds": measured.get("step_seconds"),
        "predicted_step_seconds": round(answer.flops * row.batch_per_gpu / _rate(precision), 4),
        "out_of_memory": bool(measured.get("oom")),
        "failed": measured.get("failed"),
    }
