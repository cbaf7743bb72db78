"""A training step's time on more nodes, predicted from FLOPs, bytes and rates. Nothing here is measured.

The time of a step is its computation and the communication that does not overlap with it. Computation: the hardware FLOPs
(see `flops.hardware_flops`) at a share (MFU) of the GPU's peak. Communication (see `communication`): each collective runs
first within the nodes, then between them over the node's link, which its GPUs share, with a latency for each step of the
ring. The gathers of a forward pass overlap with a share of that pass, the reductions and gathers of a backward pass with
a share of that pass; communication after the last backward pass does not overlap. Left out: the optimizer's update, data
loading, evaluation, the lower efficiency of kernels at small micro-batches, and whether the run fits into memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import BatchSplit, split_batch
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.planning.communication import ModuleTrace, Transfer, communication_volume
from dit_ds.planning.flops import Passes, hardware_flops, step_flops
from dit_ds.planning.gpus import known_gpu, require_peak


@dataclass(frozen=True)
class Machine:
    """The assumed hardware.

    Attributes:
        gpu: a name that `gpus.known_gpu` knows.
        gpus_per_node: one rank each.
        link_gbit: Gbit/s out of a node, all its GPUs together.
        intra_gb_s: GB/s from a GPU to the others of its node.
        mfu: share of the GPU's peak that computation reaches.
        overlap: share of a pass that communication can overlap with.
        latency_us: microseconds of each step of a ring.
    """

    gpu: str = "H100"
    gpus_per_node: int = 8
    link_gbit: float = 400
    intra_gb_s: float = 300
    mfu: float = 0.4
    overlap: float = 0.5
    latency_us: float = 5


@dataclass(frozen=True)
class Work:
    """What one step of a run computes and sends.

    Attributes:
        model_flops: of a sample, without recomputation; see `flops.step_flops`.
        passes: FLOPs of a sample as computed; see `flops.hardware_flops`.
        trace: of the model, for its communication.
        ds: the DeepSpeed JSON with its overrides.
        dtype: of the computation.
        batch: samples of all ranks in a step.
        micro_batch: samples of a rank at once.
    """

    model_flops: int
    passes: Passes
    trace: ModuleTrace
    ds: dict[str, Any]
    dtype: torch.dtype
    batch: int
    micro_batch: int


def work_of(config: RunConfig) -> Work:
    """Count a run's FLOPs and trace its modules on fake tensors, in seconds, without weights or a GPU.

    Raises:
        UserError: a DeepSpeed JSON that is missing or sets a key that the run owns; a text encoder that is missing.
    """
    ds = read_deepspeed_json(config)
    trace = ModuleTrace()
    passes = hardware_flops(config, trace.record)
    return Work(
        model_flops=step_flops(config),
        passes=passes,
        trace=trace,
        ds=ds,
        dtype=DeepSpeedJson(ds).dtype,
        batch=config.train.batch_size,
        micro_batch=DeepSpeedJson(ds).micro_batch,
    )


def predict(work: Work, machine: Machine, nodes: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Predict one step.

    Args:
        accumulation: micro-batches a step.
    Returns:
        `batch`, `micro_batch`, `accumulation`; `sent_bytes` a GPU; `step_seconds` and its parts `compute_seconds`,
        `gradients_seconds` and `weights_seconds` (the communication that does not overlap); `samples_per_second`;
        `dominated_by`, the longest part.
    """
    ranks = nodes * machine.gpus_per_node
    rate = require_peak(machine.gpu, work.dtype) * machine.mfu
    forward, backward = (flops * micro_batch / rate for flops in work.passes)
    transfers = communication_volume(work.trace, work.ds, ranks, accumulation)
    exposed = _exposed(transfers, machine, {"forward": forward, "backward": backward})
    parts = {"compute": (forward + backward) * accumulation} | exposed
    step = sum(parts.values())
    batch = ranks * micro_batch * accumulation
    return {
        "batch": batch,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "sent_bytes": round(sum(t.sent for t in transfers)),
        "step_seconds": step,
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "samples_per_second": batch / step,
        "dominated_by": max(parts, key=parts.__getitem__),
    }


def seconds(transfer: Transfer, machine: Machine) -> float:
    """Seconds of a transfer that runs alone, over as many nodes as its ranks fill."""
    inside = min(transfer.ranks, machine.gpus_per_node)
    nodes = math.ceil(transfer.ranks / machine.gpus_per_node)
    within = (inside - 1) / inside * transfer.buffer / (machine.intra_gb_s * 1e9)
    # each GPU sends its share of the buffer over its share of the link
    between = (nodes - 1) / nodes * transfer.buffer / (machine.link_gbit * 1e9 / 8)
    latency = transfer.calls * (inside - 1 + nodes - 1) * machine.latency_us * 1e-6
    return transfer.rounds * (within + between + latency)


def _exposed(transfers: list[Transfer], machine: Machine, pass_seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of gradients and of weights that do not overlap; the overlap is shared out in proportion."""
    exposed = {"gradients": 0.0, "weights": 0.0}
    for pass_ in ("step", *pass_seconds):
        alone = [(t.payload, seconds(t, machine), t.passes) for t in transfers if t.overlaps == pass_]
        total = sum(s for _, s, _ in alone)
        if not total:
            continue
        hidden = machine.overlap * pass_seconds.get(pass_, 0.0) * max(passes for *_, passes in alone)
        for payload, s, _ in alone:
            exposed[payload] += s * max(0.0, 1 - hidden / total)
    return exposed


def table(config: RunConfig, machine: Machine, nodes: list[int]) -> dict[str, Any]:
    """Predict a run on several numbers of nodes, with strong and with weak scaling.

    `fixed` (strong): the run's global batch, in fewer micro-batches, then in smaller ones (which the run must set, by
    `train_micro_batch_size_per_gpu`); None in a row whose ranks do not divide the batch. `grown` (weak): each GPU keeps
    its samples of one node, and the batch grows with the nodes. Efficiency is samples a second and GPU, relative to one
    node.

    Returns:
        What `dit-ds scaling --json` prints.
    Raises:
        UserError: an unknown GPU.
    """
    require_peak(
        machine.gpu, DeepSpeedJson(read_deepspeed_json(config)).dtype
    )  # refused before the count, which takes seconds
    work = work_of(config)
    one = _fixed_and_grown(work, machine, 1)
    rows = []
    for n in nodes:
        predictions = _fixed_and_grown(work, machine, n)
        for kind, prediction in predictions.items():
            if prediction and (base := one[kind]):
                prediction["efficiency"] = prediction["samples_per_second"] / (n * base["samples_per_second"])
        rows.append({"nodes": n, "gpus": n * machine.gpus_per_node} | predictions)
    assumed = asdict(machine) | {"gpu": known_gpu(machine.gpu), "peak_flops": require_peak(machine.gpu, work.dtype)}
    return {
        "predicted": True,
        "assumed": assumed | {"dtype": str(work.dtype).removeprefix("torch.")},
        "stage": DeepSpeedJson(work.ds).stage,
        "parameters": sum(work.trace.sizes),
        "trained_parameters": work.trace.trained_size,
        "model_flops_per_sample": work.model_flops,
        "hardware_flops_per_sample": sum(work.passes),
        "rows": rows,
    }


def _fixed_and_grown(work: Work, machine: Machine, nodes: int) -> dict[str, dict[str, Any] | None]:
    fixed = split_batch(work.batch, nodes * machine.gpus_per_node, work.micro_batch)
    one_node = split_batch(work.batch, machine.gpus_per_node, work.micro_batch)
    grown = one_node or BatchSplit(work.micro_batch, 1, machine.gpus_per_node)
    return {
        "fixed": predict(work, machine, nodes, fixed.micro_batch, fixed.accumulation) if fixed else None,
        "grown": predict(work, machine, nodes, grown.micro_batch, grown.accumulation),
    }


_COLUMNS = f"{'nodes':>5} {'GPUs':>5} {'batch':>6} {'a GPU':>7} {'sent/GPU':>9} {'s/step':>8} {'samples/s':>10} {'eff.':>5}  mostly"


def lines(result: dict[str, Any]) -> list[str]:
    """The result of `table` as text; the column "a GPU" is micro-batch x micro-batches a step."""
    a = result["assumed"]
    recomputed = result["hardware_flops_per_sample"] / result["model_flops_per_sample"] - 1
    out = [
        f"predicted, not measured: ZeRO stage {result['stage']}, {result['trained_parameters'] / 1e6:.0f} of "
        f"{result['parameters'] / 1e6:.0f} M parameters trained, "
        f"{result['model_flops_per_sample'] / 1e12:.2f} TFLOP a sample and {recomputed:.0%} recomputed",
        f"assumed: {a['gpu']} at {a['mfu']:.0%} of {a['peak_flops'] / 1e12:.0f} TFLOP/s ({a['dtype']}); "
        f"{a['link_gbit']:g} Gbit/s out of a node, {a['intra_gb_s']:g} GB/s a GPU inside; {a['overlap']:.0%} of a pass "
        f"hides communication; {a['latency_us']:g} us a ring step",
    ]
    for kind, title in (
        ("fixed", "the run's global batch, shared out"),
        ("grown", "a batch that grows with the nodes"),
    ):
        out += ["", title, _COLUMNS]
        out += [f"{row['nodes']:>5} {row['gpus']:>5} " + _cells(row[kind]) for row in result["rows"]]
    return out


def _cells(r: dict[str, Any] | None) -> str:
    if r is None:
        return "     -  the batch is not a multiple of the GPUs"
    efficiency = f"{r['efficiency']:.0%}" if "efficiency" in r else "-"
    each = f"{r['micro_batch']} x {r['accumulation']}"
    sent, step, rate = f"{r['sent_bytes'] / 1e9:.2f} GB", f"{r['step_seconds']:.4f}", f"{r['samples_per_second']:.0f}"
    return f"{r['batch']:>6} {each:>7} {sent:>9} {step:>8} {rate:>10} {efficiency:>5}  {r['dominated_by']}"
