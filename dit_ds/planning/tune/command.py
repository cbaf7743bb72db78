"""`dit-ds tune` from end to end."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.engine.deepspeed_json import DeepSpeedJson
from dit_ds.errors import RunFailed
from dit_ds.planning.gpus import known_gpu, memory_of, parse_memory
from dit_ds.planning.memory.request import MemoryRequest
from dit_ds.planning.tune import output, this_machine, trials
from dit_ds.planning.tune.candidates import candidates
from dit_ds.planning.tune.memory_model import ProfilerPool
from dit_ds.planning.tune.search import Cluster, NothingFits, SearchResult, check, closest, search
from dit_ds.planning.tune.time_model import Assumptions


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """The arguments of `dit-ds tune`.

    Attributes:
        config_path, overrides: the run.
        nodes: of the job.
        gpus: of a node, one rank each.
        gpu: its name; if empty, this machine's with `measure`, else H100.
        gpu_memory: of a GPU, as "80GiB"; None for the data sheet's.
        host_memory: of a node, as "1TiB"; None for no limit.
        assumed: all other assumptions.
        out: output folder; None for RUN_DIR/tune.
        measure: try the most promising candidates by short trainings.
        trials: candidates to try.
        steps: optimizer steps of each trial.
        launch: command that starts the ranks of a trial; None for torchrun on this machine.
        retry_failed: try candidates anew whose trial failed before.
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
    trials: int = 5
    steps: int = 20
    launch: str | None = None
    retry_failed: bool = False


def tune(request: TuneRequest) -> tuple[dict[str, Any], SearchResult]:
    """Search, make trials if requested, and write the files.

    Returns:
        The JSON object that `dit-ds tune --json` prints, and the search result that it describes.
    Raises:
        UserError: an impossible request.
        RunFailed: nothing fits (the message says what would), or every trial failed.
        Interrupted: a signal came during the trials.
    """
    started = time.monotonic()
    config = load_config(request.config_path, list(request.overrides))
    out = Path(request.out or f"{config.run_dir}/tune")
    launch = trials.launcher(request.launch, request.nodes, request.gpus) if request.measure else ()
    name, capacity = _gpu(request)
    machine = replace(request.assumed.machine, gpu=name, gpus_per_node=request.gpus)
    assumed = replace(request.assumed, machine=machine)
    host_memory = parse_memory(request.host_memory) if request.host_memory else None
    cluster = Cluster(request.nodes, request.gpus, capacity, host_memory)
    ds = check(config, cluster, assumed)
    among = candidates(config, ds, cluster.ranks, known_gpu(name) or "")
    if request.measure and request.launch is None:
        missing = this_machine.missing_kernels(list(dict.fromkeys(c.kernel for c in among)), DeepSpeedJson(ds).dtype)
        among = [c for c in among if c.kernel not in missing]
    with ProfilerPool(gpu=known_gpu(name) or MemoryRequest.gpu) as pool:
        try:
            result = search(config, cluster, assumed, pool, among)
        except NothingFits as nothing:
            raise RunFailed(closest(config, cluster, assumed, nothing, pool)) from None
    if request.measure:
        plan = trials.Trials(out / "trials", request.trials, request.steps, launch, request.retry_failed)
        trials.measure(result, plan, request.config_path, config, ds)
    written = output.write(out, result, request.config_path, config, ds, started=started)
    return written, result


def _gpu(request: TuneRequest) -> tuple[str, float]:
    """The GPU's name and bytes."""
    name, capacity = request.gpu, None
    if not name and request.measure:
        here = this_machine.gpu()
        if here and known_gpu(here[0]):
            name, capacity = here
    name = name or "H100"
    data_sheet = memory_of(name)
    return name, parse_memory(request.gpu_memory) if request.gpu_memory else capacity or data_sheet
