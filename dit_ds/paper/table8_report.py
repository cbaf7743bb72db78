"""Table 8 as Markdown, CSV, JSON and a chart."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dit_ds.files import full_disk_is_user_error
from dit_ds.planning.memory import plan

_COLUMNS = {
    "method": "method", "size": "size", "visual": "visual", "text": "text", "form": "form", "reading": "reading",
    "precision": "precision", "checkpointing": "recomputed", "zero_stage": "ZeRO", "batch_per_gpu": "batch/GPU",
    "gpus": "GPUs", "paper_gb": "paper GB", "predicted_gib": "predicted GiB", "counts": "counts",
    "allocated_gib": "allocated", "least_capacity_gib": "least capacity", "reserved_gib": "reserved",
    "measured_gib": "measured GiB", "gib_per_sample": "GiB/sample", "step_seconds": "s/step",
    "predicted_step_seconds": "predicted s/step",
}  # fmt: skip

_WHY = f"""
What the paper's figures mean, as far as its released code and plain counting tell:

- **Its batches are of different kinds.** A naive L-DIT (maps of attention whole, fp32, as released) takes about
  1.2 GiB a sample, so that 32 on one GPU don't fit its 11.9 to 17.1 GB: 8 on each of 4 GPUs do. LAVT's 24 GB goes with
  its published 8 on *each* GPU. ReLA's 12 GB is nearest to 4 on each of 8 GPUs. Per GPU, the table would then compare 8,
  8 and 4 samples. This is inferred from what fits; the paper doesn't say it.
- **`counts`.** Rows of what was released give what the device shows, as the paper does: what PyTorch's allocator reserves
  with its default settings, what DistributedDataParallel and the released code hold beyond it (`beyond_ours` in the JSON),
  {plan.CONTEXT_GIB} GiB for CUDA's context and, with several GPUs, {plan.NCCL_GIB} for NCCL. The last two are assumptions.
  Rows of ours give `torch.cuda.max_memory_allocated`; all rows have allocated, least capacity and reserved.
- **Which GPU.** The paper names none. Workspaces and scratch of reductions are those of the GPU that the line above names;
  on another one they differ by some ten MiB. cuDNN's workspaces are in no figure (`cudnn_workspace_gib` in the JSON).
- **LAVT** is counted below its 24 GB. Its authors report about 26 GB with the same settings; cuDNN's workspaces, which are
  not counted, are the likely rest. **ReLA** is counted above its 12 GB, with windows' maps of attention kept and everything
  but the pixel decoder in 16 bits; its authors' PyTorch of the time may have kept less.
- **Ours**, of L-DIT, keeps queries, keys, values and the output of attention instead of its maps, leaves out the text
  tokens' rows that are not used (both exact, but for rounding), computes in bf16 with fp32 masters, and recomputes each
  layer in the backward pass. Of LAVT and ReLA, ours is bf16 and recomputation.
- **Measured** rows of the released form are runs of it in our engine, without `beyond_ours`.
"""


def markdown(result: dict[str, Any]) -> str:
    """The result of `table8.table8` as Markdown: the paper's rows, other rows, and an explanation."""
    kinds = {"The paper's rows": lambda r: r["paper_gb"], "More": lambda r: not r["paper_gb"]}
    text = f"# Table 8: GPU memory\n\n{result['machine']}, {result['date']}. "
    text += f"Predicted step times: {result['assumed']['step_time_of']} (fp32 without TF32). "
    text += f"Predicted memory is counted on fake tensors, for {result['assumed']['gpu']} and torch "
    text += result["assumed"]["torch"]
    text += ".\n" if any(r["measured_gib"] for r in result["rows"]) else "; nothing here was measured on a GPU.\n"
    for title, of in kinds.items():
        rows = [r for r in result["rows"] if of(r)]
        if rows:
            text += f"\n## {title}\n\n" + _table(rows)
    return text + _WHY


def _table(rows: list[dict[str, Any]]) -> str:
    columns = {k: v for k, v in _COLUMNS.items() if any(r[k] is not None for r in rows)}
    out = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    out += ["| " + " | ".join("" if r[k] is None else str(r[k]) for k in columns) + " |" for r in rows]
    return "\n".join(out) + "\n"


def write(result: dict[str, Any], folder: str | Path) -> list[str]:
    """Write `table8.md`, `.csv`, `.json` and `.png` into a folder; return their paths.

    Raises:
        UserError: the folder can't be written.
    """
    folder, sheet = Path(folder), io.StringIO()
    rows = csv.DictWriter(
        sheet, [k for k in result["rows"][0] if k not in ("categories", "beyond_ours")], extrasaction="ignore"
    )
    rows.writeheader()
    rows.writerows(result["rows"])
    texts = {"md": markdown(result), "csv": sheet.getvalue(), "json": json.dumps(result, indent=1) + "\n"}
    with full_disk_is_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            (folder / f"table8.{kind}").write_text(text)
        draw(result, folder / "table8.png")
    return [str(folder / f"table8.{kind}") for kind in (*texts, "png")]


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar chart of the paper's figure of each row beside ours, measured if available, else predicted."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    rows = [r for r in result["rows"] if r["paper_gb"]]
    of_paper = {(r["method"], r["visual"], r["text"]): r["paper_gb"] for r in rows}
    names = [f"{method}\nvisual {visual}, text {text}" for method, visual, text in of_paper]
    bars = {"paper": ("#4d4d4d", list(of_paper.values()))}
    for form, shades in {"released": ("#e69f00", "#f5d48a"), "ours": ("#0072b2", "#8cc5e8")}.items():
        for reading, color in zip(("inferred", "literal"), shades):
            of = {
                (r["method"], r["visual"], r["text"]): r["measured_gib"] or r["predicted_gib"]
                for r in rows
                if (r["form"], r["reading"]) == (form, reading)
            }
            label = "share of 4 or 8 GPUs" if reading == "inferred" else "whole batch on one GPU"
            bars[f"{form}, {label}"] = (color, [of.get(key, 0.0) for key in of_paper])
    figure = Figure(figsize=(11, 5))
    axis = figure.subplots()
    width = 0.8 / len(bars)
    for i, (label, (color, values)) in enumerate(bars.items()):
        positions = [k + (i - (len(bars) - 1) / 2) * width for k in range(len(names))]
        drawn = axis.bar(positions, values, width, label=label, color=color)
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("GiB a GPU (the paper: GB)")
    measured = "measured" if any(r["measured_gib"] for r in rows) else "predicted, not measured"
    axis.set_title(f"Table 8 under both readings of its batch ({measured})")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})


def lines(result: dict[str, Any]) -> list[str]:
    """The result of `table8.table8` as text, a line per row."""
    out = []
    for r in result["rows"]:
        paper = f"paper {r['paper_gb']:5.1f} GB" if r["paper_gb"] else " " * 14
        measured = f", measured {r['measured_gib']:6.2f}" if r["measured_gib"] else ""
        out.append(
            f"{r['method']:6} {r['size']:6} {r['visual']:6} {r['text']:6} {r['form']:8} {r['reading']:8} "
            f"{r['precision']:18} {r['checkpointing']:9} ZeRO-{r['zero_stage']} {r['batch_per_gpu']:3} x {r['gpus']:2} GPUs  "
            f"{paper}  predicted {r['predicted_gib']:6.2f} GiB {r['counts']}{measured}"
        )
    return out
