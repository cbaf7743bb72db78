"""Rank and world size from torchrun's or SLURM's variables, the process group, and the collectives of a run."""

from __future__ import annotations

import datetime
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dit_ds.errors import UserError
from dit_ds.processes import cores_of_rank, usable_cores

_TIMEOUT = datetime.timedelta(minutes=15)


@dataclass(frozen=True)
class World:
    """This process's rank of `world_size`, its rank on its node, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which logs and writes for all."""
        return self.rank == 0


def set_environment() -> tuple[int, int, int]:
    """Complete RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; return the first three.

    torchrun sets all five. Under srun with one task a GPU they follow from SLURM's. Without either, this is
    one process of world size 1.

    Raises:
        UserError: this process is no task of the SLURM job's that it is in, WORLD_SIZE without MASTER_PORT, or SLURM's
            list of nodes can't be read.
    """
    env = os.environ
    if "RANK" not in env and (why := outside_of_srun()):
        alone = "RANK=0 WORLD_SIZE=1 before it runs this process alone"
        raise UserError(f"{why}: write srun before the command ({alone})")
    if "RANK" not in env and int(env.get("SLURM_NTASKS") or 1) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            env["SLURM_NTASKS"],
            env["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in env:  # where it is set, scontrol is not needed, which some containers lack
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", "")))
        # below the ephemeral range, from which any outgoing connection may take a port
        env.setdefault("MASTER_PORT", str(10000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        if env["WORLD_SIZE"] != "1":
            raise UserError("WORLD_SIZE is set but MASTER_PORT is not: launch with torchrun or srun, or set both")
        env["MASTER_PORT"] = str(free_port())
    return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])


def outside_of_srun() -> str | None:
    """What is wrong where a job of several tasks runs a command in its own shell, which is one process; None where not.

    A batch script and salloc's shell have the job's SLURM_NTASKS, and may have SLURM_PROCID, which is 0. As rank 0 they
    would wait for ranks that nothing starts.
    """
    env = os.environ
    tasks = env.get("SLURM_NTASKS", "1")
    is_step = "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", tasks) == tasks
    if tasks in ("", "1") or is_step or env.get("SLURM_PROCID", "0") != "0":
        return None
    return f"SLURM_NTASKS is {tasks}, but this is one process outside of srun, which starts the others"


def local_ranks(world_size: int) -> int:
    """Processes on this node, by the launcher's variables."""
    env = os.environ
    text = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    digits = re.match(r"\d+", text or "")  # SLURM writes 8(x2),4
    return max(1, int(digits[0])) if digits and world_size > 1 else 1


def share_cores(world_size: int, workers: int) -> str:
    """Limit PyTorch's threads in this process to its share of the cores, less one where loader workers need some.

    By itself PyTorch takes all cores in each process: its threads then wait for each other at every operation, which on a
    busy node takes ten times as long. OMP_NUM_THREADS decides where it is set; torchrun sets it to 1 for several processes.

    Args:
        workers: loader workers of this process, which have one thread each.
    Returns:
        What this process has, in words.
    """
    here, ranks = usable_cores(), local_ranks(world_size)
    if "OMP_NUM_THREADS" in os.environ:
        return f"{torch.get_num_threads()} a rank, as OMP_NUM_THREADS says"
    share = cores_of_rank(here, ranks)
    threads = max(1, min(torch.get_num_threads(), share - bool(workers)))
    torch.set_num_threads(threads)
    return f"{threads} a rank of {here} cores and {ranks} ranks on this node (set OMP_NUM_THREADS for another number)"


def _first_host(nodelist: str) -> str:
    try:
        out = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=60, check=True
        )
        return out.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(
            f"can't tell the first host of '{nodelist}' with scontrol: set MASTER_ADDR before srun"
        ) from None


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pick_device(local_rank: int) -> torch.device:
    """This process's GPU, made current for the calling thread; the CPU where there is none.

    Raises:
        UserError: more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    local_gpu = local_rank if gpus > 1 else 0  # SLURM may show each task its own GPU only
    if local_gpu >= gpus:
        raise UserError(f"local rank {local_rank} has no GPU, this node has {gpus}: start at most one process a GPU")
    torch.cuda.set_device(local_gpu)
    return torch.device("cuda", local_gpu)


def connect(timeout: datetime.timedelta = _TIMEOUT) -> World:
    """Join the process group (NCCL with CUDA, else gloo) and pick the device; `timeout` is that of each collective."""
    rank, world_size, local_rank = set_environment()
    device = pick_device(local_rank)
    if not dist.is_initialized():
        # one process alone needs no port, which another program may take meanwhile
        store = dist.HashStore() if world_size == 1 else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, world_size=world_size, rank=rank, store=store)
    return World(rank, world_size, local_rank, device)


def disconnect() -> None:
    """Leave the process group. Collective: NCCL waits for the other ranks.

    After an error of one rank alone it must not be called, as the error would not be reported; ending is enough.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """`value` (picklable) of every rank, on every rank, in the order of ranks. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_values(values: list[float], device: torch.device) -> torch.Tensor:
    """Every rank's values, (world_size, len(values)) fp64 on the CPU. Collective: one all-gather."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def connect_store(world: World) -> dist.TCPStore:
    """A key-value store served by rank 0 on a free port, for threads that must not use the process group. Collective.

    A request waits at most 60 s for its answer, then raises `torch.distributed.DistStoreError`.
    """
    address, timeout = os.environ["MASTER_ADDR"], datetime.timedelta(seconds=60)
    server = dist.TCPStore(address, 0, None, True, timeout, wait_for_workers=False) if world.main else None
    port = gather_objects(server.port if server else None)[0]
    store = server or dist.TCPStore(address, port, None, False, timeout)
    gather_objects(None)  # rank 0 may end soon: its store has to stay until all ranks are connected
    return store


def all_or_none(error: Exception | None) -> None:
    """Raise on every rank if any rank failed, so that none waits for another in a collective. Collective.

    Raises:
        UserError: with the first failing rank's message.
    """
    messages = [m for m in gather_objects(None if error is None else str(error)) if m is not None]
    if messages:
        raise UserError(messages[0]) from error
