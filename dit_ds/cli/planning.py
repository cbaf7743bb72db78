"""Commands that plan a run: what memory it takes, how it scales, which settings are fastest."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dit_ds.cli.arguments import Number, Several, from_one, from_zero, gpus, nodes, positive, share, whole
from dit_ds.cli.output import command, config_options, report


def add(commands: Any) -> None:
    """Add `scaling`, `tune` and the group `memory` to the parser's commands."""
    memory = commands.add_parser("memory", help="what training takes of a GPU's memory")
    memory.set_defaults(group=memory)
    memory_commands = memory.add_subparsers(metavar="COMMAND")

    p = command(memory_commands, "plan", _memory_plan, "predict a run's memory and what fits; needs no GPU, no weights")
    config_options(p)
    p.add_argument("--gpus", type=gpus, default=1, help="of a node, one rank each (default 1)")
    p.add_argument("--nodes", type=nodes, default=1, help="default 1")
    p.add_argument("--gpu", default="H100", help="whose memory, as A100 or a name that CUDA gives (default H100)")
    p.add_argument("--gpu-memory", help="of a GPU, as 80GiB, instead")
    p.add_argument("--rank", type=whole(0, 2**31 - 1), default=0, help="whose memory (default 0)")
    p.add_argument(
        "--alloc-conf",
        metavar="SETTINGS",
        help="of the allocator, as in PYTORCH_CUDA_ALLOC_CONF (default: as train sets)",
    )
    p.add_argument("--timeline", metavar="PNG", help="draw the step, by category")

    p = command(
        memory_commands, "table8", _memory_table8, "the paper's Table 8: what it says, predicted, measured, and why"
    )
    p.add_argument("--rows", choices=["paper", "all"], default="all", help="the paper's only, or more (default all)")
    p.add_argument("--out", metavar="FOLDER", help="write table8.md, .csv, .json and .png there")
    p.add_argument("--configs", help="where its configurations are (default: the package's)")

    p = command(
        memory_commands,
        "measure",
        _memory_measure,
        "take a few steps on this GPU, or on all ranks under srun or torchrun",
    )
    config_options(p)
    p.add_argument("--steps", type=from_one, default=5, help="steps to measure (default 5)")
    p.add_argument("--warmup", type=from_zero, default=2, help="steps before them (default 2)")
    p.add_argument("--timeline", metavar="PNG", help="draw a step of rank 0, by category")
    p.add_argument(
        "--snapshot",
        metavar="FILE",
        help="write PyTorch's snapshot, as memory.pickle: drop it on pytorch.org/memory_viz",
    )

    _replay_parser(memory_commands)
    p = command(
        commands, "scaling", _scaling, "predict bytes sent, step time and efficiency on more nodes; needs no GPU"
    )
    config_options(p)
    p.add_argument("--nodes", type=Several(nodes), default=[1, 2, 4, 8, 16, 32, 64], help="default 1,2,4,8,16,32,64")
    p.add_argument("--gpus-per-node", type=gpus, default=8, help="and ranks (default 8)")
    p.add_argument("--gpu", default="H100", help="as A100, H100 PCIe, or a name that CUDA gives (default H100)")
    _machine_parser(p)
    _tune_parser(command(commands, "tune", _tune, "find the fastest settings that fit: predicted, or tried on GPUs"))


def _replay_parser(memory_commands: Any) -> None:
    p = command(
        memory_commands,
        "replay",
        _memory_replay,
        "replay a recorded history of the allocator: other settings, other GPUs",
    )
    p.add_argument("snapshot", metavar="SNAPSHOT", help="memory.pickle of PyTorch, or a trace file (JSON)")
    p.add_argument("--conf", metavar="SETTINGS", help="as in PYTORCH_CUDA_ALLOC_CONF (default: the recorded ones)")
    p.add_argument("--capacity", metavar="SIZE", help="of the GPU for segments, as 24GiB (default: no limit)")
    p.add_argument("--device", type=whole(0, 1023), help="whose history, where the file has several GPUs'")
    p.add_argument("--plot", metavar="PNG", help="draw segments and blocks at the peak, and who holds them")


def _machine_parser(p: Any) -> None:
    p.add_argument(
        "--link", type=positive(1e6), default=400, help="Gbit/s out of a node, all GPUs together (default 400)"
    )
    p.add_argument(
        "--intra", type=positive(1e6), default=300, help="GB/s from a GPU to others of its node (default 300)"
    )
    p.add_argument("--mfu", type=positive(1), default=0.4, help="assumed share of the GPU's peak (default 0.4)")
    p.add_argument("--overlap", type=share, default=0.5, help="assumed share of a pass that hides communication "
                   "(default 0.5)")  # fmt: skip
    p.add_argument(
        "--latency-us", type=Number(float, 0, 1e6), default=5, help="assumed microseconds a ring step (default 5)"
    )


def _tune_parser(p: argparse.ArgumentParser) -> None:
    config_options(p)
    p.add_argument("--nodes", type=nodes, default=1, help="nodes of the job (default 1)")
    p.add_argument("--gpus", type=gpus, default=8, help="GPUs a node, a rank each (default 8)")
    p.add_argument("--gpu", default="", help="as A100, H100 PCIe (default: this machine's with --measure, else H100)")
    p.add_argument("--gpu-memory", metavar="SIZE", help="of a GPU, as 80GiB or 40GB (default: the GPU's)")
    p.add_argument("--host-memory", metavar="SIZE", help="of a node, for offload (default: not looked at)")
    p.add_argument("--explain", action="store_true", help="say why the others lost")
    p.add_argument("--out", metavar="FOLDER", help="where the files go (default RUN_DIR/tune)")
    g = p.add_argument_group("trials")
    g.add_argument("--measure", action="store_true", help="train the most promising ones for some steps; resumable")
    g.add_argument("--trials", type=whole(1, 10_000), default=5, help="candidates to try (default 5)")
    g.add_argument("--steps", type=from_one, default=20, help="optimizer steps of each (default 20)")
    g.add_argument("--launch", metavar="COMMAND", help="what starts the ranks, as 'srun --ntasks-per-node 8' "
                   "(default: torchrun on this machine)")  # fmt: skip
    g.add_argument("--retry-failed", action="store_true", help="try again what failed before")
    g = p.add_argument_group("assumptions")
    _machine_parser(g)
    g.add_argument("--half-tokens", type=from_zero, default=1024, help="tokens a micro-batch at which a GPU computes at half "
                   "of --mfu (default 1024)")  # fmt: skip
    g.add_argument("--pcie", type=positive(1e6), default=25, help="GB/s between a GPU and its host (default 25)")
    g.add_argument("--host-bandwidth", type=positive(1e6), default=200, help="GB/s of a node's memory (default 200)")


def _scaling(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    from dit_ds.planning import scaling

    machine = scaling.Machine(
        gpu=args.gpu,
        gpus_per_node=args.gpus_per_node,
        link_gbit=args.link,
        intra_gb_s=args.intra,
        mfu=args.mfu,
        overlap=args.overlap,
        latency_us=args.latency_us,
    )
    result = scaling.table(config, machine, args.nodes)
    report(args, result, lambda: scaling.lines(result))
    return 0


def _gpu_memory(args: argparse.Namespace) -> float:
    """Bytes: what --gpu-memory says, or the GPU's by name."""
    from dit_ds.planning.gpus import memory_of, parse_memory

    of_name = memory_of(args.gpu)
    return parse_memory(args.gpu_memory) if args.gpu_memory else of_name


def _memory_plan(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    from dit_ds.planning.gpus import known_gpu
    from dit_ds.planning.memory import plan
    from dit_ds.planning.memory.request import MemoryRequest

    settings = plan.TRAIN_SETTINGS if args.alloc_conf is None else args.alloc_conf
    memory, gpu = _gpu_memory(args), known_gpu(args.gpu) or MemoryRequest.gpu
    result = plan.plan(
        config, args.gpus, args.nodes, memory, timeline=args.timeline, gpu=gpu, settings=settings, rank=args.rank
    )
    report(args, result, lambda: plan.lines(result))
    return 0


def _memory_table8(args: argparse.Namespace) -> int:
    from dit_ds.paper import table8, table8_report

    result = table8.table8(args.rows, args.configs)
    written = table8_report.write(result, args.out) if args.out else []
    report(args, result | {"written": written}, lambda: table8_report.lines(result) + written)
    return 0


def _memory_replay(args: argparse.Namespace) -> int:
    from dit_ds.planning.gpus import parse_memory
    from dit_ds.planning.memory.recorded import replay

    capacity = None if args.capacity is None else int(parse_memory(args.capacity))
    result = replay.replay(args.snapshot, args.conf, capacity, args.plot, args.device)
    report(args, result, lambda: replay.lines(result))
    return 0


def _memory_measure(args: argparse.Namespace) -> int:
    from dit_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    from dit_ds.planning.memory.allocator_settings import use_train_settings

    use_train_settings(os.environ)
    from dit_ds.planning.memory import measure

    request = measure.MeasureRequest(args.steps, args.warmup, args.timeline, args.snapshot)
    return measure.run(
        config, args.config, request, lambda result: report(args, result, lambda: measure.lines(result), any_rank=True)
    )


def _tune(args: argparse.Namespace) -> int:
    from dit_ds.planning.scaling import Machine
    from dit_ds.planning.tune import command
    from dit_ds.planning.tune.report import lines
    from dit_ds.planning.tune.time_model import Assumptions

    machine = Machine(link_gbit=args.link, intra_gb_s=args.intra, mfu=args.mfu, overlap=args.overlap,
                      latency_us=args.latency_us)  # fmt: skip
    assumed = Assumptions(machine, half_tokens=args.half_tokens, pcie_gb_s=args.pcie, host_gb_s=args.host_bandwidth)
    request = command.TuneRequest(
        config_path=args.config,
        overrides=tuple(args.overrides),
        nodes=args.nodes,
        gpus=args.gpus,
        gpu=args.gpu,
        gpu_memory=args.gpu_memory,
        host_memory=args.host_memory,
        assumed=assumed,
        out=args.out,
        measure=args.measure,
        trials=args.trials,
        steps=args.steps,
        launch=args.launch,
        retry_failed=args.retry_failed,
    )
    written, result = command.tune(request)
    report(args, written, lambda: lines(result, written, args.explain))
    return 0
