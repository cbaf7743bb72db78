"""`dit-ds tune` from end to end."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import RunFailed, UserError
from dit_ds.planning.gpus import known_gpu, memory_of, parse_memory
from dit_ds.planning.tune import output as files
from dit_ds.planning.tune import trials
from dit_ds.planning.tune.candidates import Candidate, candidates
from dit_ds.planning.tune.memory_model import ProfilerPool
from dit_ds.planning.tune.search import Cluster, NothingFits, SearchResult, check, closest, search
from dit_ds.planning.tune.time_model import Assumptions


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        config_path, overrides: the run.
        nodes, gpus: GPUs are of a node.
        gpu: a name; empty for this machine's where trials are made on it, else H100.
        gpu_memory, host_memory: as "80GiB"; None for the data sheet's, and for no limit.
        assumed: all else.
        out: folder; None for RUN_DIR/tune.
        measure: whether trials are made; `count` of `steps` each, started by `launch`, failed ones `again`.
    """

    config_path: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 8
    gpu: str = ""
    gpu_memory: str | None = None
    host_memory: str | None = None
    assumed: Assumptions = Assumptions()
    out: str | None = None
    measure: bool = False
    count: int = 5
    steps: int = 20
    launch: str | None = None
    again: bool = False


def tune(request: Request) -> tuple[dict[str, Any], SearchResult]:
    """Search, try if asked to, write the files; return the answer as JSON and as it is.

    Raises:
        UserError: an impossible request.
        RunFailed: nothing fits, and what would; or every trial failed.
        Interrupted: a signal came during the trials.
    """
    start = time.monotonic()
    config = load_config(request.config_path, list(request.overrides))
    out = Path(request.out or f"{config.run_dir}/tune")
    if request.count < 1 or request.steps < 1:
        raise UserError(f"--trials {request.count} --steps {request.steps}: there is at least one of each")
    launch = trials.launcher(request.launch, request.nodes, request.gpus) if request.measure else ()
    name, capacity = _gpu(request)
    machine = replace(request.assumed.machine, gpu=name, gpus_per_node=request.gpus)
    assumed = replace(request.assumed, machine=machine)
    host = request.host_memory and parse_memory(request.host_memory)
    place = Cluster(request.nodes, request.gpus, capacity, host or None)
    ds = check(config, place, assumed)
    among = candidates(config, ds, place.ranks, known_gpu(name) or "")
    if request.measure and request.launch is None:
        among = _that_run_here(among, config, ds)
    with ProfilerPool() as jobs:
        try:
            found = search(config, place, assumed, jobs, among)
        except NothingFits as nothing:
            raise RunFailed(closest(config, place, assumed, nothing, jobs)) from None
    if request.measure:
        how = trials.Trials(out / "trials", request.count, request.steps, launch, request.again)
        trials.measure(found, how, request.config_path, config, ds)
    result = files.write(out, found, request.config_path, config, ds, started=start)
    return result, found


def _gpu(request: Request) -> tuple[str, float]:
    """The GPU's name and bytes."""
    name, capacity = request.gpu, None
    if not name and request.measure:
        name, capacity = _of_this_machine()
    name = name or "H100"
    of_name = memory_of(name)
    return name, parse_memory(request.gpu_memory) if request.gpu_memory else capacity or of_name


def _of_this_machine() -> tuple[str, float | None]:
    """In another process, as looking takes of a GPU's memory, which trials will want."""
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.returncode:
        return "", None
    name, memory = done.stdout.strip().splitlines()[-1].split("|")
    return (name, float(memory)) if known_gpu(name) else ("", None)


def _that_run_here(among: list[Candidate], config: RunConfig, ds: dict[str, Any]) -> list[Candidate]:
    """Without those whose attention kernel this machine hasn't."""
    code = (
        "import sys, torch; "
        "from dit_ds.models.attention_kernels import KERNELS, why_not; "
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'; of = getattr(torch, sys.argv[1]); "
        "print(*(k for k in sys.argv[2:] if k in KERNELS and why_not(k, device, of)))"
    )
    from dit_ds.engine.deepspeed_json import DeepSpeedJson

    kernels = dict.fromkeys(c.kernel for c in among)
    words = [sys.executable, "-c", code, str(DeepSpeedJson(ds).dtype).removeprefix("torch."), *kernels]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    missing = done.stdout.split() if done.returncode == 0 else []
    return [c for c in among if c.kernel not in missing]
