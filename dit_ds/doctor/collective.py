"""Collective checks: bandwidth between ranks, and a step of DeepSpeed's engine."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dit_ds.distributed import World, connect, gather_objects
from dit_ds.doctor.check import Check, Context
from dit_ds.engine import engine
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.errors import UserError

_ELEMENTS = 1 << 24  # 64 MiB of fp32
_LINK_BYTES = 1 << 23
_ROUNDS = 3
_SLOW = 3.0  # times the median
_TCP_LIKE = 2.0  # GB/s: what NCCL stays below across nodes where it found no fast network


def bandwidth(c: Context) -> Iterator[Check]:
    """Bus bandwidth of an all-reduce of 64 MiB, over all ranks and inside the nodes; and the slowest link of a ring."""
    world = connect(longer_timeout(c))
    if world.world_size == 1:
        yield Check("bandwidth", "ok", "one rank: nothing to measure")
        return
    hosts = gather_objects(c.facts["host"])
    backend, nodes = dist.get_backend(), len(set(hosts))
    rate = _all_reduce_rate(world, None, world.world_size)
    text = f"{rate:.2f} GB/s by {backend} over {world.world_size} ranks on {nodes} node{'s' * (nodes > 1)}"
    inside = _rate_inside(world, hosts) if 1 < nodes < world.world_size else None
    if inside:
        text += f", {inside:.2f} GB/s inside a node"
    if backend == "nccl" and nodes > 1 and rate < _TCP_LIKE:
        remedy = "NCCL_DEBUG=INFO shows the network it takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose"
        yield Check("bandwidth", "warn", text, remedy)
    else:
        yield Check("bandwidth", "ok", text)
    if world.world_size > 2:
        yield from slowest_links(_ring_seconds(world), hosts)


def longer_timeout(c: Context) -> datetime.timedelta:
    """A collective's time-out, longer than the check's: NCCL's would end the process before it reports."""
    return datetime.timedelta(seconds=2 * c.timeout + 60)


def _seconds(operation: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Of the fastest round, after one that connects and is not timed."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _all_reduce_rate(world: World, group: Any, size: int) -> float:
    """Bus bandwidth of an all-reduce over the group's `size` ranks in GB/s, as nccl-tests define it; the slowest rank's."""

    def slowest(seconds: float) -> float:
        value = torch.tensor([seconds], device=world.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return float(value)

    data = torch.ones(_ELEMENTS, device=world.device)
    small = data[: _ELEMENTS // 64]
    expected = slowest(_seconds(lambda: dist.all_reduce(small, group=group), world.device, 1)) * 64
    part = data[: max(len(small), int(_ELEMENTS * min(1.0, 3 / expected)))]  # less over a slow network
    seconds = slowest(_seconds(lambda: dist.all_reduce(part, group=group), world.device, _ROUNDS))
    return 2 * (size - 1) / size * part.nbytes / seconds / 1e9


def _rate_inside(world: World, hosts: list[str]) -> float | None:
    """The bus bandwidth inside a node in GB/s, the slowest node's; None where no node has several ranks."""
    rate = None
    for host in sorted(set(hosts)):
        members = [r for r, h in enumerate(hosts) if h == host]
        group = dist.new_group(members)  # a collective: every rank makes every group
        if world.rank in members and len(members) > 1:
            rate = _all_reduce_rate(world, group, len(members))
    return min((r for r in gather_objects(rate) if r is not None), default=None)


def _ring_seconds(world: World) -> list[float]:
    """Of each rank, the seconds to send to the next and receive from the previous one, all at once."""
    n, rank = world.world_size, world.rank
    out, into = (torch.ones(_LINK_BYTES // 4, device=world.device) for _ in range(2))

    def ring() -> None:
        both = [dist.P2POp(dist.isend, out, (rank + 1) % n), dist.P2POp(dist.irecv, into, (rank - 1) % n)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return gather_objects(_seconds(ring, world.device, _ROUNDS))


def slowest_links(seconds: list[float], hosts: list[str]) -> Iterator[Check]:
    """Each rank's exchange compared with the median of its kind: across nodes, or inside one.

    Args:
        seconds: of each rank's exchange.
        hosts: of each rank.
    """
    n = len(hosts)
    across = [hosts[r] != hosts[r - 1] or hosts[r] != hosts[(r + 1) % n] for r in range(n)]
    for kind in (False, True):
        members = [r for r in range(n) if across[r] == kind]
        if len(members) < 3:
            continue
        worst, median = max(members, key=lambda r: seconds[r]), statistics.median(seconds[r] for r in members)
        rates = [_LINK_BYTES / 1e9 / s for s in (seconds[worst], median)]
        found = f"rank {worst} on {hosts[worst]}: {rates[0]:.3f} GB/s with its neighbours, the median is {rates[1]:.3f}"
        if seconds[worst] > _SLOW * median:
            yield Check(
                "slowest link", "warn", found, f"look at {hosts[worst]}'s network and load, or sbatch --exclude it"
            )
        else:
            yield Check("slowest link", "ok", found)


def zero_step(c: Context) -> Iterator[Check]:
    """One optimizer step of a tiny model with DeepSpeed as configured."""
    if c.config is None:
        return
    try:
        ds = deepspeed_config(c.config, c.world_size)
    except UserError:  # which `configuration` reports
        return
    world = connect(longer_timeout(c))
    torch.manual_seed(0)
    wrapped = engine.initialize(nn.Linear(16, 16), c.config, world)
    for _ in range(ds["gradient_accumulation_steps"]):
        wrapped.backward(wrapped(torch.ones(1, 16, device=world.device, dtype=DeepSpeedJson(ds).dtype)).float().mean())
        wrapped.step()
    stage = DeepSpeedJson(ds).stage
    if wrapped.global_steps == 1:
        yield Check("zero step", "ok", f"ZeRO stage {stage}, {str(DeepSpeedJson(ds).dtype).removeprefix('torch.')}")
    else:
        yield Check("zero step", "fail", f"ZeRO stage {stage} took {wrapped.global_steps} steps", "another DeepSpeed")
