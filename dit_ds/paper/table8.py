"""The paper's Table 8 (appendix A.1), row by row: published, predicted and measured GPU memory.

The table gives a batch and a GPU's memory, but neither the precision, the number of GPUs nor which memory is counted. Each
row is taken under two readings: its batch on one GPU (literal), and its batch shared out over 4 or 8 GPUs (inferred, from
what fits); and in two forms: as released (fp32, or fp16 autocast for ReLA; with whole attention maps) and ours.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_ds.config.installed_files import paper_folder
from dit_ds.config.load import load_config, merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.data.progress import progress_bar
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import GIB
from dit_ds.paper.tables import TABLE_8, MemoryRow
from dit_ds.planning.gpus import require_peak
from dit_ds.planning.memory import plan
from dit_ds.planning.memory.allocator_settings import TRAIN_SETTINGS
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.measure import in_process
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest

# of the inferred reading: GPUs, and samples on each
_SHARED_OUT = {"L-DIT": (4, 8), "LAVT": (4, 8), "ReLA": (8, 4)}

_ZERO_0 = {"deepspeed": {"config": "zero0"}}
_OURS = {
    "train": {"activation_checkpointing": "block"},
    "deepspeed": _ZERO_0["deepspeed"] | {"precision": "bf16", "override": {"torch_autocast": {"enabled": False}}},
}
# the settings of the paper's released code that matter for memory: only BERT's first layer, text padding attended to
_RELEASED_LDIT = {
    "model": {"attention": "naive", "mask_padding": False, "word_dropout": 0.1},
    "text": {"layers": 1},
    "train": {"ema_decay": 0.9997},
}
_BERT_LAYERS_UNUSED = 77_972_736  # parameters of BERT-base's layers 2 to 12: on the GPU, without gradients
_GPU, _MFU = "H100", 0.4  # assumed: whose operators' scratch counts, and for step times, which are computation alone


@dataclass(frozen=True)
class Row:
    """A run whose memory is predicted and measured.

    Attributes:
        form: released or ours.
        reading: literal or inferred; more for rows that the paper does not have.
        batch_per_gpu: samples on each of the `gpus`.
        paper_gb: the paper's figure.
    """

    method: str
    form: str
    reading: str
    config: RunConfig
    batch_per_gpu: int
    gpus: int
    paper_gb: float | None = None


def rows(which: str, folder: str | Path | None = None) -> list[Row]:
    """The rows of the table.

    Args:
        which: `paper` for the paper's; `all` for those and other sizes, checkpointing policies and ZeRO stages.
        folder: of the paper's configurations; by default the package's.
    Raises:
        UserError: the configurations are not there.
    """
    folder = paper_folder() if folder is None else Path(folder)
    if not (folder / "table8_ldit.yaml").exists():
        raise UserError(f"no {folder}/table8_ldit.yaml here: name their folder with --configs, or leave it out")
    of_paper = [row for published in TABLE_8 for row in _of_paper(published, folder)]
    return of_paper if which == "paper" else of_paper + list(_more(folder))


def _of_paper(published: MemoryRow, folder: Path) -> Iterable[Row]:
    """A published row in both forms, each under both readings."""
    base = load_config(folder / f"{published.config}.yaml")
    gpus, share = _SHARED_OUT[published.method]
    released = merge(_ZERO_0, _RELEASED_LDIT if published.method == "L-DIT" else {"model": {"attention": "eager"}})
    for form, changes in {"released": released, "ours": _OURS}.items():
        for reading, batch_per_gpu, n in (("literal", published.batch, 1), ("inferred", share, gpus)):
            yield _row(
                published.method,
                _changed(base, changes),
                batch_per_gpu,
                n,
                form=form,
                reading=reading,
                paper_gb=published.gpu_gb,
            )


def _more(folder: Path) -> Iterable[Row]:
    """Rows that the paper does not have: ours in other sizes, with other checkpointing policies, LoRA and ZeRO stages."""
    frozen, text_tuned, tuned = (
        _changed(load_config(folder / f"{row.config}.yaml"), _OURS) for row in TABLE_8 if row.method == "L-DIT"
    )
    for size in ("vit_l", "vit_h"):
        for config in (frozen, text_tuned, tuned):
            yield _row("L-DIT", _changed(config, {"model": {"size": size}}), 32)
    for size in ("vit_b", "vit_l", "vit_h"):
        for policy in ("none", "selective"):
            changes = {"model": {"size": size}, "train": {"activation_checkpointing": policy}}
            yield _row("L-DIT", _changed(tuned, changes), 32)
    yield _row("E-DIT", _changed(tuned, {"model": {"scheme": "end_to_end"}}), 32)
    lora = {"lora": {"rank": 16, "targets": ["qkv", "proj"]}}
    for size in ("vit_b", "vit_l", "vit_h"):
        updated = _changed(frozen, {"model": {"size": size} | lora})
        for policy in ("none", "block"):
            yield _row("L-DIT", _changed(updated, {"train": {"activation_checkpointing": policy}}), 32)
    yield _row("L-DIT", _changed(updated, {"model": {"lora": {"targets": ["qkv", "proj", "text"]}}}), 32)
    for stage in range(4):
        changes = {"model": {"size": "vit_h"}, "deepspeed": {"config": f"zero{stage}"}}
        for gpus in (1, 2, 4, 8, 16):
            yield _row("L-DIT", _changed(tuned, changes), 8, gpus)


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    return validate(merge(config.model_dump(), changes))


def _row(
    method: str,
    config: RunConfig,
    batch_per_gpu: int,
    gpus: int = 1,
    *,
    form: str = "ours",
    reading: str = "more",
    paper_gb: float | None = None,
) -> Row:
    """A row with the configuration's batch set to that of the row."""
    batch = {
        "train": {"batch_size": batch_per_gpu * gpus},
        "deepspeed": {"override": {"train_micro_batch_size_per_gpu": batch_per_gpu}},
    }
    return Row(
        method=method,
        form=form,
        reading=reading,
        config=_changed(config, batch),
        batch_per_gpu=batch_per_gpu,
        gpus=gpus,
        paper_gb=paper_gb,
    )


def table8(which: str = "all", folder: str | Path | None = None) -> dict[str, Any]:
    """Predict every row, and measure it if this machine has enough GPUs.

    Args:
        which: paper or all, see `rows`.
        folder: of the paper's configurations; by default the package's.
    Returns:
        `rows`, and the assumptions. A row's `predicted_gib` is the memory that its `counts` names: for released rows
        `device`, which the device reports, as the paper does: what is reserved, and CUDA's context; for ours `allocated`,
        PyTorch's peak.
    Raises:
        UserError: the configurations are not there.
    """
    table_rows = rows(which, folder)
    requests = [_request(row) for row in table_rows]
    estimates = list(progress_bar(predict(requests), "predict", total=len(requests), unit="row", mininterval=1))
    # after all predictions, which take all cores and would slow the measured steps down
    disabled = not torch.cuda.is_available()
    measured = [_measured(row) for row in progress_bar(table_rows, "measure", unit="row", disable=disabled)]
    device = next((m["device"] for m in measured if m and "device" in m), None)
    assumed = {"context_gib": plan.CONTEXT_GIB, "nccl_gib": plan.NCCL_GIB, "gpu": _GPU, "torch": torch.__version__}
    return {
        "predicted": True,
        "date": str(datetime.date.today()),
        "machine": device or "no GPU",
        "assumed": assumed | {"step_time_of": f"{_GPU} at {_MFU:.0%} of its peak, computation alone"},
        "rows": [_result(*row) for row in zip(table_rows, estimates, measured)],
    }


def _request(row: Row) -> MemoryRequest:
    """What to predict: the released code leaves the allocator's settings as they are."""
    settings = "" if row.form == "released" else TRAIN_SETTINGS
    sizes = (row.batch_per_gpu,)
    return MemoryRequest(row.config, row.gpus, gpu=_GPU, settings=settings, micro_batches=sizes, flops=True)


def _rate(precision: str) -> float:
    """Assumed FLOP/s."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return require_peak(_GPU, dtype) * _MFU


def _measured(row: Row) -> dict[str, Any] | None:
    """The result of `dit-ds memory measure`, or the error as `failed`; None without enough GPUs."""
    if torch.cuda.device_count() < row.gpus:
        return None
    try:
        return in_process(row.config, row.gpus)
    except RunFailed as e:
        return {"failed": str(e)}


def _released_extras(row: Row, estimate: MemoryEstimate) -> dict[str, int]:
    """Bytes on a GPU that the released code (DistributedDataParallel) holds and ours does not."""
    profile, trained = estimate.profiles[row.batch_per_gpu], 4 * estimate.trained
    extras = {"gradients that stay from step to step": trained - profile.at_peak["gradients"]}
    if row.gpus > 1:
        extras["DDP's buckets"] = trained
    if row.method == "L-DIT":
        extras["BERT's unused layers"] = 4 * _BERT_LAYERS_UNUSED
        whole = 4 * (estimate.parameters + _BERT_LAYERS_UNUSED)
        extras["a moving average of all weights, frozen ones too"] = whole - profile.at_peak["average"]
    return extras


def _result(row: Row, estimate: MemoryEstimate, measured: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the result: settings, published, predicted and measured figures."""
    measured = measured or {}
    c, profile = row.config, estimate.profiles[row.batch_per_gpu]
    assert estimate.flops is not None  # `table8` requests them
    extra = _released_extras(row, estimate) if row.form == "released" else {}
    figures = estimate.figures[row.batch_per_gpu]
    allocated, reserved, least = (size + sum(extra.values()) for size in
                                  (figures.allocated, figures.reserved, figures.least_capacity))  # fmt: skip
    device = reserved + plan.context(row.gpus)
    counts = "device" if row.form == "released" else "allocated"
    ds = DeepSpeedJson(read_deepspeed_json(c))
    autocast = ds.raw.get("torch_autocast", {})
    precision = f"autocast {autocast['dtype']}" if autocast.get("enabled") else ds.precision
    figure = {"device": "device_used_gib", "allocated": "peak_gib"}[counts]
    lora = c.model.lora
    return {
        "method": row.method,
        "size": c.model.size,
        "visual": f"LoRA {lora.rank}"
        if lora and lora.of_vit
        else "frozen"
        if c.model.freeze_image_encoder
        else "tuned",
        "text": f"LoRA {lora.rank}" if lora and lora.of_text else "frozen" if c.text.freeze else "tuned",
        "form": row.form,
        "reading": row.reading,
        "precision": precision,
        "checkpointing": c.train.activation_checkpointing,
        "zero_stage": ds.stage,
        "batch_per_gpu": row.batch_per_gpu,
        "gpus": row.gpus,
        "paper_gb": row.paper_gb,
        "predicted_gib": round((device if counts == "device" else allocated) / GIB, 2),
        "counts": counts,
        "allocated_gib": round(allocated / GIB, 2),
        "least_capacity_gib": round(least / GIB, 2),
        "reserved_gib": round(reserved / GIB, 2),
        "device_gib": round(device / GIB, 2),
        "allocator_settings": figures.settings,
        "cudnn_workspace_gib": round(estimate.cudnn / GIB, 2),
        "categories": {k: round(v / GIB, 2) for k, v in profile.at_peak.items() if v >= GIB / 200},
        "beyond_ours": {k: round(v / GIB, 2) for k, v in extra.items()},
        "gib_per_sample": round(allocated / GIB / row.batch_per_gpu, 3),
        "measured_gib": measured.get(figure),
        "step_seconds": measured.get("step_seconds"),
        "predicted_step_seconds": round(estimate.flops * row.batch_per_gpu / _rate(precision), 4),
        "out_of_memory": bool(measured.get("oom")),
        "failed": measured.get("failed"),
    }
