"""What each node can do: matrix product, memory, disk and link, and the node that is slower than the others."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dit_ds.distributed import World, connect, gather_objects, share_cores
from dit_ds.doctor.check import Check, Context
from dit_ds.doctor.collective import longer_timeout

_SLOW = 2 / 3  # of the median: slower by a third
_PRODUCT_SECONDS = 0.4
_COPY_SECONDS = 0.2
_DISK_SECONDS = 0.5  # for writing; reading takes as long at most
_DISK_BYTES, _CHUNK = 64 << 20, 4 << 20
_LINK_BYTES = 4 << 20
_LINK_ROUNDS = 3  # partners of a node
# measure: (its name, its unit)
MEASURES = {
    "product": ("matrix product", "TFLOP/s"),
    "memory": ("memory bandwidth", "GB/s"),
    "disk_write": ("disk write", "MB/s"),
    "disk_read": ("disk read", "MB/s"),
    "link": ("link to other nodes", "GB/s"),
}


def node_speed(c: Context) -> Iterator[Check]:
    """Measure every node, and compare the nodes. Collective; about two seconds.

    All ranks compute at once, each with its share of the cores, as in training, so that ranks which share a node or a
    device measure what each of them gets; a node's figure is its slowest rank's. One rank a node measures the disk and the
    link, while the others wait.
    """
    world = connect(longer_timeout(c))
    threads = torch.get_num_threads()
    share_cores(world.world_size, 0)
    try:
        mine = _compute(c, world)
    finally:
        torch.set_num_threads(threads)
    hosts = _gathered(c.facts["host"], world)
    first = {host: hosts.index(host) for host in dict.fromkeys(hosts)}  # the rank of each node that measures for it
    if world.rank in first.values():
        mine |= _disk(_disk_folder(c), world.rank)
    _gathered(None, world)  # the ranks that measure links begin together
    if len(first) > 1:
        mine |= _link(world, list(first.values()))
    by_node: dict[str, list[dict[str, float]]] = {}
    for host, of_rank in zip(hosts, _gathered(mine, world), strict=True):
        by_node.setdefault(host, []).append(of_rank)
    yield from compare_nodes({host: slowest(ranks) for host, ranks in by_node.items()}, str(c.model_dtype))


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    """A node's figures: of each measure the smallest of its ranks'."""
    return {m: min(r[m] for r in ranks if m in r) for m in MEASURES if any(m in r for r in ranks)}


def compare_nodes(nodes: dict[str, dict[str, float]], dtype: str) -> Iterator[Check]:
    """All nodes' figures, and a warning for each node that is slower than the median of the nodes by more than a third.

    The median is the upper one: of two nodes the faster, as their mean would hide the slower. The link between two nodes is
    one figure of both, and names neither.

    Args:
        nodes: of each host its figures by measure.
    """
    slow: dict[str, list[str]] = {}
    parts = []
    for measure, (name, unit) in MEASURES.items():
        rates = {host: figures[measure] for host, figures in nodes.items() if measure in figures}
        if not rates:
            continue
        low, high = (f"{f(rates.values()):.4g}" for f in (min, max))
        of = f" ({dtype.removeprefix('torch.')})" if measure == "product" else ""
        parts.append(f"{name} {low if low == high else f'{low} to {high}'} {unit}{of}")
        if len(rates) < (3 if measure == "link" else 2):
            continue
        median, against = statistics.median_high(rates.values()), "median" if len(rates) > 2 else "other node"
        for host, rate in rates.items():
            if rate < _SLOW * median:
                text = f"{name} {rate:.4g} {unit} where the {against} has {median:.4g}"
                slow.setdefault(host, []).append(text)
    yield Check("node speed", "ok", f"{len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(parts)}")
    for host, texts in slow.items():
        remedy = f"sbatch --exclude={host} ..., or look at its load, clocks and temperature"
        yield Check("slow node", "warn", f"{host}: {'; '.join(texts)}", remedy)


def _gathered(value: Any, world: World) -> list[Any]:
    return gather_objects(value) if dist.is_initialized() and world.world_size > 1 else [value]


def _rounds(operation: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median seconds of an operation that is repeated for so long, at least three times."""
    times: list[float] = []
    operation()
    while len(times) < 3 or sum(times) < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _compute(c: Context, world: World) -> dict[str, float]:
    """The matrix product in TFLOP/s, in the dtype of the run's weights, and copying in the device's memory in GB/s."""
    device, gpu = world.device, world.device.type == "cuda"
    n = 4096 if gpu else 512
    a, b = (torch.randn(n, n, device=device).to(c.model_dtype) for _ in range(2))
    _gathered(None, world)
    product = 2 * n**3 / _rounds(lambda: a @ b, device, _PRODUCT_SECONDS) / 1e12
    out, source = (torch.ones((256 if gpu else 32) << 20, dtype=torch.uint8, device=device) for _ in range(2))
    _gathered(None, world)
    copy = 2 * source.nbytes / _rounds(lambda: out.copy_(source), device, _COPY_SECONDS) / 1e9  # read and written
    return {"product": product, "memory": copy}


def _disk_folder(c: Context) -> Path:
    """The run's folder, or what there is of its path; without a configuration the folder for temporary files."""
    if c.config is None:
        return Path(tempfile.gettempdir())
    run = Path(c.config.run_dir).absolute()
    return next(p for p in [run, *run.parents] if p.is_dir())


def _disk(folder: Path, rank: int) -> dict[str, float]:
    """Writing to the disk and reading from it, in MB/s. Empty where it can't be written, which other checks report.

    Each part is synced to the disk, and dropped from the page cache before it is read; where the file system keeps it all
    the same (tmpfs), reading is that of memory.
    """
    path = folder / f".dit_ds_doctor_speed_{rank}_{os.getpid()}"
    part, written, read = os.urandom(_CHUNK), 0, 0
    try:
        with open(path, "xb", buffering=0) as f:
            start = time.perf_counter()
            while written < _DISK_BYTES and time.perf_counter() - start < _DISK_SECONDS:
                written += f.write(part)
                os.fsync(f.fileno())
            write_seconds = time.perf_counter() - start
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, "rb", buffering=0) as f:
            start = time.perf_counter()
            while time.perf_counter() - start < _DISK_SECONDS and (data := f.read(_CHUNK)):
                read += len(data)
            read_seconds = time.perf_counter() - start
    except OSError:
        return {}
    finally:
        path.unlink(missing_ok=True)
    return {"disk_write": written / write_seconds / 1e6, "disk_read": read / read_seconds / 1e6}


def pairings(n: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of 0 .. n-1 in which each meets each other once (the circle method)."""
    players = list(range(n + n % 2))  # n itself stands for nobody
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        rounds.append([(a, b) for a, b in zip(players[:half], players[: half - 1 : -1], strict=True) if max(a, b) < n])
        players[1:] = [players[-1], *players[1:-1]]
    return rounds


def _link(world: World, ranks: list[int]) -> dict[str, float]:
    """The best rate, in GB/s, at which this rank exchanges data with one of up to three others; empty for other ranks.

    In each round every node has one partner. A node with a slow link is slow with all; a sound one is slow only with that.
    """
    if world.rank not in ranks:
        return {}
    me, best = ranks.index(world.rank), 0.0
    out, into = (torch.ones(_LINK_BYTES, dtype=torch.uint8, device=world.device) for _ in range(2))
    for pairs in pairings(len(ranks))[:_LINK_ROUNDS]:
        other = next((a + b - me for a, b in pairs if me in (a, b)), None)
        if other is None:
            continue
        peer = ranks[other]

        def exchange(peer: int = peer) -> None:
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]):
                work.wait()

        # three times: both sides of an exchange must repeat it equally often
        best = max(best, _LINK_BYTES / _rounds(exchange, world.device, 0.0) / 1e9)
    return {"link": best}
