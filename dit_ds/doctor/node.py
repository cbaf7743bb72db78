"""Checks of a rank's node: the launcher's variables, host names, cores, memory and disks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dit_ds.distributed import outside_of_srun
from dit_ds.doctor.check import Check, Context
from dit_ds.errors import UserError
from dit_ds.files import GIB, full_disk_is_user_error
from dit_ds.processes import cores_of_rank, usable_cores

_COMPILERS = {"ninja", "nvcc", "cicc", "ptxas", "c++", "g++", "gcc", "cc1plus", "clang", "clang++"}
_LOCK_IS_OLD = 600  # seconds; building one of DeepSpeed's operators takes about one minute


def launch(c: Context) -> Iterator[Check]:
    """Whether the launcher's variables agree. Prints those alone: the environment can hold secrets."""
    env = os.environ
    where = f"rank {c.rank} of {c.world_size}" if c.world_size == 1 else f"{c.world_size} ranks"
    if not 0 <= c.rank < c.world_size:
        yield Check("launch", "fail", f"RANK is {c.rank}, WORLD_SIZE {c.world_size}", "launch with srun or torchrun")
    elif c.world_size > 1 and "TORCHELASTIC_RUN_ID" not in env and (why := outside_of_srun()):
        yield Check("launch", "fail", why, "write srun before the command")
    elif "SLURM_STEP_ID" in env and "TORCHELASTIC_RUN_ID" not in env and env.get("SLURM_PROCID") != str(c.rank):
        found = f"RANK is {c.rank}, SLURM_PROCID is {env.get('SLURM_PROCID')}"
        yield Check("launch", "fail", found, "unset RANK, WORLD_SIZE and LOCAL_RANK before srun")
    else:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "srun" if "SLURM_STEP_ID" in env else "no launcher"
        yield Check("launch", "ok", f"{where}, {launcher}, {c.nodes} node{'s' * (c.nodes > 1)}")
    threads, share = env.get("OMP_NUM_THREADS", ""), cores_of_rank(usable_cores(), c.local_ranks)
    if threads.isdigit() and int(threads) > share:
        found = f"OMP_NUM_THREADS is {threads} for {share} cores a rank, whose threads wait for each other"
        yield Check("threads", "warn", found, f"unset OMP_NUM_THREADS, or set it to {share} or less")


def names(c: Context) -> Iterator[Check]:
    """This host's name and the master's, which ranks on other nodes must be able to use."""
    host, master = socket.gethostname(), os.environ["MASTER_ADDR"]
    if not addresses(host):
        yield Check("host name", "warn", f"{host} does not resolve", f"add {host} to /etc/hosts or to the DNS")
    found = addresses(master)
    if not found:
        remedy = 'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)", or an IP address'
        yield Check("master address", "fail", f"MASTER_ADDR {master} does not resolve on {host}", remedy)
    elif c.nodes > 1 and any(_loopback(a) for a in found):
        remedy = "set MASTER_ADDR to the address that other nodes reach this one by (hostname -I)"
        why = "and /etc/hosts gives this name one" if master in (host, socket.getfqdn()) else "so nodes find themselves"
        yield Check("master address", "fail", f"MASTER_ADDR {master} is {found[0]}, a loopback address, {why}", remedy)
    elif c.rank == 0 and not any(_is_mine(a) for a in found):
        remedy = "set MASTER_ADDR to the host of rank 0"
        yield Check("master address", "warn", f"MASTER_ADDR {master} ({found[0]}) is none of {host}'s", remedy)
    else:
        yield Check("master address", "ok", f"{master} is {', '.join(found)}")


def addresses(name: str) -> list[str]:
    """The addresses that a host's name resolves to; empty where it does not."""
    try:
        return list(dict.fromkeys(str(a[4][0]) for a in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except (OSError, UnicodeError):
        return []


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_mine(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
            s.bind((address, 0))
        return True
    except OSError:
        return False


def cores(c: Context) -> Iterator[Check]:
    """Cores of a rank, compared with its loader processes."""
    share = cores_of_rank(usable_cores(), c.local_ranks)
    text = f"{share} a rank"
    workers = c.config.data.workers if c.config else 0
    if c.config and workers > share:
        remedy = f"srun --cpus-per-task={workers + 1}, or --data.workers {share - 1}"
        yield Check("cores", "warn", f"{text} for data.workers {workers}", remedy)
    else:
        yield Check("cores", "ok", text + (f" for data.workers {workers}" if c.config else ""))


def memory(c: Context) -> Iterator[Check]:
    """Free RAM, and free shared memory, in which loader processes put batches."""
    free = _available_bytes() / GIB
    if free < 2 * c.local_ranks:
        yield Check(
            "memory", "warn", f"{free:.1f} GiB free for {c.local_ranks} ranks", "srun --mem, or fewer ranks a node"
        )
    else:
        yield Check("memory", "ok", f"{free:.0f} GiB free")
    shm = shutil.disk_usage("/dev/shm").free / GIB
    need = 1.0
    if c.config:
        d = c.config.data
        micro = max(c.config.eval.batch_size, c.config.train.batch_size // c.world_size)
        # four batches ahead and one in hand, of RGB in float32 and a mask
        need = c.local_ranks * d.workers * 5 * micro * 16 * d.image_size**2 / GIB
    if shm < need:
        remedy = "mount -o remount,size=16G /dev/shm (docker run --shm-size 16g), or fewer data.workers"
        yield Check(
            "shared memory", "warn", f"/dev/shm has {shm:.2f} GiB free, loader processes can fill {need:.2f}", remedy
        )
    else:
        yield Check("shared memory", "ok", f"/dev/shm has {shm:.1f} GiB free")


def _available_bytes() -> int:
    """MemAvailable, or what the control group (SLURM's --mem) leaves, where that is less."""
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    if available is None:
        raise UserError("/proc/meminfo does not say how much memory is free (no MemAvailable): look at free -h")
    left = int(available[1]) * 1024
    group = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
    folder = Path("/sys/fs/cgroup") / (group[1].strip("/") if group else "")
    for level in [folder, *folder.parents]:
        try:
            limit = (level / "memory.max").read_text().strip()
            if limit != "max":
                left = min(left, int(limit) - int((level / "memory.current").read_text()))
        except (OSError, ValueError):
            continue
    return max(0, left)


def temporary(c: Context) -> Iterator[Check]:
    """The folder for temporary files: writable, with space."""
    folder = Path(tempfile.gettempdir())
    with full_disk_is_user_error(folder):
        write_and_remove(folder, c.rank)
    free = shutil.disk_usage(folder).free / GIB
    status, remedy = ("ok", "") if free >= 1 else ("warn", "free some, or set TMPDIR")
    yield Check("temporary", status, f"{folder} has {free:.1f} GiB free", remedy)


def write_and_remove(folder: Path, rank: int) -> None:
    """Write one MiB into the folder, sync it to the disk and remove it."""
    path = folder / f".dit_ds_doctor_{rank}_{os.getpid()}"
    try:
        with open(path, "wb") as f:
            f.write(bytes(1 << 20))
            f.flush()
            os.fsync(f.fileno())
    finally:
        path.unlink(missing_ok=True)


def jit_locks(c: Context) -> Iterator[Check]:
    """Stale locks in torch's cache of compiled extensions: a job that loads such an extension waits for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = sorted(p for depth in ("lock", "*/lock", "*/*/lock") for p in root.glob(depth))
    for path in locks:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # its build just ended
            continue
        text = f"{path} is {age / 60:.0f} minutes old"
        if compiler := _compiler_in(path.parent):
            yield Check("jit lock", "warn", f"{text}; {compiler} is building there", "wait until it is done")
        else:
            status = "fail" if age > _LOCK_IS_OLD else "warn"  # a recent one may be of a build on another node
            found = f"{text}, and no process of yours builds there: a job waits for it for ever"
            yield Check("jit lock", status, found, f"rm {path}")
    if not locks:
        yield Check("jit lock", "ok", f"none in {root}")


def _compiler_in(folder: Path) -> str | None:
    """The name of a compiler of this user that runs in the folder, as torch's builds do; None where there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            mine = name in _COMPILERS and process.stat().st_uid == os.getuid()
            if mine and (process / "cwd").samefile(folder):
                return name
        except OSError:  # it ended
            continue
    return None
