"""A training step's time on more nodes, predicted: from FLOPs, bytes and rates. Nothing here is measured.

A step takes its computation and the communication that does not hide under it. Computation: what is really computed
(see `flops.hardware_flops`) at a share of the GPU's peak. Communication (see `communication`): each collective first within
the nodes, then between them over the node's link, which its GPUs share; and a latency for each step of the ring. The
gathers of a forward pass hide under a share of that pass, reductions and gathers of a backward pass under a share of
that; what comes after the last backward pass doesn't hide. Not in it: the optimizer's update, loading data, evaluation,
kernels' efficiency at small micro-batches, and whether it fits into memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_ds.config.schema import RunConfig
from dit_ds.engine.batch_split import BatchSplit, split_batch
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.errors import UserError
from dit_ds.planning.communication import ModuleTrace, Transfer, communication_volume
from dit_ds.planning.flops import Passes, hardware_flops, step_flops
from dit_ds.planning.gpus import known_gpu, require_peak


@dataclass(frozen=True)
class Machine:
    """What the prediction assumes.

    Attributes:
        gpu: a name that `gpus.known_gpu` knows.
        gpus_per_node: and ranks.
        link_gbit: Gbit/s out of a node, all its GPUs together.
        intra_gb_s: GB/s that a GPU sends to others of its node.
        mfu: share of the peak at which the GPU computes.
        overlap: share of a pass under which its communication can hide.
        latency_us: microseconds of each step of a ring.
    """

    gpu: str = "H100"
    gpus_per_node: int = 8
    link_gbit: float = 400
    intra_gb_s: float = 300
    mfu: float = 0.4
    overlap: float = 0.5
    latency_us: float = 5

    def check(self) -> None:
        """Raise a `UserError` where a value is impossible."""
        for option, value in {
            "gpus-per-node": self.gpus_per_node, "link": self.link_gbit, "intra": self.intra_gb_s
        }.items():  # fmt: skip
            if not 0 < value < math.inf:
                raise UserError(f"--{option} is {value}: it must be above 0")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}: it is a share of the GPU's peak, above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"--overlap is {self.overlap}: it is a share of a pass, from 0 to 1")
        if not 0 <= self.latency_us < math.inf:
            raise UserError(f"--latency-us is {self.latency_us}: it can't be negative")


@dataclass(frozen=True)
class Work:
    """What a configuration asks of a step.

    Attributes:
        model_flops: a sample's, nothing computed twice.
        passes: a sample's, as computed.
        ds: the DeepSpeed JSON with its overrides.
        batch, micro_batch: samples of all ranks, and those that a rank takes at once.
    """

    model_flops: int
    passes: Passes
    shape: ModuleTrace
    ds: dict[str, Any]
    dtype: torch.dtype
    batch: int
    micro_batch: int


def work_of(config: RunConfig) -> Work:
    """Count a configuration's FLOPs and record its modules on fake tensors: seconds, without weights or a GPU.

    Raises:
        UserError: a DeepSpeed JSON that is missing or sets what the run owns; a text encoder that isn't there.
    """
    ds = read_deepspeed_json(config)
    shape = ModuleTrace()
    passes = hardware_flops(config, shape.watch)
    micro_batch = DeepSpeedJson(ds).micro_batch
    return Work(step_flops(config), passes, shape, ds, DeepSpeedJson(ds).dtype, config.train.batch_size, micro_batch)


def predict(work: Work, machine: Machine, nodes: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """One step, predicted.

    Returns:
        `batch`, `micro_batch`, `accumulation`; `sent_bytes` a GPU; `step_seconds` and its parts `compute_seconds`,
        `gradients_seconds` and `weights_seconds`, of these two what doesn't hide; `samples_per_second`; `dominated_by`.
    """
    ranks = nodes * machine.gpus_per_node
    rate = require_peak(machine.gpu, work.dtype) * machine.mfu
    forward, backward = (flops * micro_batch / rate for flops in work.passes)
    transfers = communication_volume(work.shape, work.ds, ranks, accumulation)
    exposed = _exposed(transfers, machine, nodes, {"forward": forward, "backward": backward})
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


def seconds(transfer: Transfer, machine: Machine, nodes: int) -> float:
    """A transfer's time without anything beside it."""
    inside = min(transfer.ranks, machine.gpus_per_node)
    nodes = math.ceil(transfer.ranks / machine.gpus_per_node)
    within = (inside - 1) / inside * transfer.buffer / (machine.intra_gb_s * 1e9)
    # each GPU has its share of the buffer to send, and its share of the link
    between = (nodes - 1) / nodes * transfer.buffer / (machine.link_gbit * 1e9 / 8)
    latency = transfer.calls * (inside - 1 + nodes - 1) * machine.latency_us * 1e-6
    return transfer.rounds * (within + between + latency)


def _exposed(
    transfers: list[Transfer], machine: Machine, nodes: int, pass_seconds: dict[str, float]
) -> dict[str, float]:
    """Seconds of gradients and of weights that don't hide; what hides of both under a pass, hides in proportion."""
    exposed = {"gradients": 0.0, "weights": 0.0}
    for under in ("step", *pass_seconds):
        here = [(t.what, seconds(t, machine, nodes), t.passes) for t in transfers if t.under == under]
        total = sum(s for _, s, _ in here)
        if not total:
            continue
        room = machine.overlap * pass_seconds.get(under, 0.0) * max(passes for *_, passes in here)
        for what, alone, _ in here:
            exposed[what] += alone * max(0.0, 1 - room / total)
    return exposed


def table(config: RunConfig, machine: Machine, nodes: list[int]) -> dict[str, Any]:
    """Predict a run on several numbers of nodes, two ways.

    `fixed`: the run's own global batch, in fewer micro-batches, then in smaller ones (which a run must be told, by
    `train_micro_batch_size_per_gpu`). `grown`: each GPU keeps what it has on one node, and the batch grows with the
    nodes. Efficiency is samples a second and GPU against one node's. A row whose ranks don't divide the batch has None
    for `fixed`.

    Raises:
        UserError: impossible inputs, an unknown GPU.
    """
    machine.check()
    if min(nodes) < 1:
        raise UserError(f"--nodes {min(nodes)}: a number of nodes is at least 1")
    require_peak(machine.gpu, DeepSpeedJson(read_deepspeed_json(config)).dtype)  # said before the count
    work = work_of(config)
    one = _both(work, machine, 1)
    rows = []
    for n in nodes:
        row = _both(work, machine, n)
        for how in row:
            if row[how] and one[how]:
                row[how]["efficiency"] = row[how]["samples_per_second"] / (n * one[how]["samples_per_second"])
        rows.append({"nodes": n, "gpus": n * machine.gpus_per_node} | row)
    assumed = asdict(machine) | {"gpu": known_gpu(machine.gpu), "peak_flops": require_peak(machine.gpu, work.dtype)}
    return {
        "predicted": True,
        "assumed": assumed | {"dtype": str(work.dtype).removeprefix("torch.")},
        "stage": DeepSpeedJson(work.ds).stage,
        "parameters": sum(work.shape.sizes),
        "trained_parameters": sum(size for size, t in zip(work.shape.sizes, work.shape.trained) if t),
        "model_flops_per_sample": work.model_flops,
        "hardware_flops_per_sample": sum(work.passes),
        "rows": rows,
    }


def _both(work: Work, machine: Machine, nodes: int) -> dict[str, dict[str, Any] | None]:
    fixed = split_batch(work.batch, nodes * machine.gpus_per_node, work.micro_batch)
    one_node = split_batch(work.batch, machine.gpus_per_node, work.micro_batch)
    grown = one_node or BatchSplit(work.micro_batch, 1, machine.gpus_per_node)
    return {
        "fixed": fixed and predict(work, machine, nodes, fixed.micro_batch, fixed.accumulation),
        "grown": predict(work, machine, nodes, grown.micro_batch, grown.accumulation),
    }


_COLUMNS = f"{'nodes':>5} {'GPUs':>5} {'batch':>6} {'a GPU':>7} {'sent/GPU':>9} {'s/step':>8} {'samples/s':>10} {'eff.':>5}  mostly"


def lines(result: dict[str, Any]) -> list[str]:
    """`table`'s result for people; \"a GPU\" is micro-batch x micro-batches a step."""
    a = result["assumed"]
    recomputed = result["hardware_flops_per_sample"] / result["model_flops_per_sample"] - 1
    out = [
        f"predicted, not measured: ZeRO stage {result['stage']}, {result['trained_parameters'] / 1e6:.0f} of "
        f"{result['parameters'] / 1e6:.0f} M parameters trained, "
        f"{result['model_flops_per_sample'] / 1e12:.2f} TFLOP a sample and {recomputed:.0%} computed again",
        f"assumed: {a['gpu']} at {a['mfu']:.0%} of {a['peak_flops'] / 1e12:.0f} TFLOP/s ({a['dtype']}); "
        f"{a['link_gbit']:g} Gbit/s out of a node, {a['intra_gb_s']:g} GB/s a GPU inside; {a['overlap']:.0%} of a pass "
        f"hides communication; {a['latency_us']:g} us a ring step",
    ]
    for how, title in (("fixed", "the run's global batch, shared out"), ("grown", "a batch that grows with the nodes")):
        out += ["", title, _COLUMNS]
        out += [f"{row['nodes']:>5} {row['gpus']:>5} " + _cells(row[how]) for row in result["rows"]]
    return out


def _cells(r: dict[str, Any] | None) -> str:
    if r is None:
        return "     -  the batch is not a multiple of the GPUs"
    efficiency = f"{r['efficiency']:.0%}" if "efficiency" in r else "-"
    each = f"{r['micro_batch']} x {r['accumulation']}"
    sent, step, rate = f"{r['sent_bytes'] / 1e9:.2f} GB", f"{r['step_seconds']:.4f}", f"{r['samples_per_second']:.0f}"
    return f"{r['batch']:>6} {each:>7} {sent:>9} {step:>8} {rate:>10} {efficiency:>5}  {r['dominated_by']}"
