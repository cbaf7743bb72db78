"""`dit-ds doctor`: finds in seconds, before any step, what would stop a run or slow it down.

Each rank checks its own process and node and publishes its findings in a store at MASTER_ADDR:MASTER_PORT, the address
at which a training's ranks meet. Everything has a time-out, so that a rank that hangs or never joins is named by the
others and stops none of them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.distributed import set_environment
from dit_ds.doctor import collective, configured, node, software, speed
from dit_ds.doctor.check import THREAD, Check, Context, from_error, run_checks
from dit_ds.doctor.rendezvous import Rendezvous
from dit_ds.doctor.report import compare, lines, merge
from dit_ds.errors import UserError

__all__ = ["examine", "lines"]

Report = Callable[[dict[str, Any]], None]
_FIRST = (node.launch, node.names)
_LOCAL = (software.versions, software.gpu, software.attention, software.arithmetic, software.deepspeed,
          node.jit_locks, node.cores, node.memory, node.temporary)  # fmt: skip
_OF_CONFIG = (configured.configuration, configured.shards, configured.sam_checkpoint, configured.text_encoder,
              configured.run_folder, configured.local_disk)  # fmt: skip
_TOGETHER = (collective.bandwidth, speed.node_speed, collective.zero_step)
_LOCAL_SECONDS = 120  # limit of a rank's local checks together


def examine(config: RunConfig | None, timeout: float, report: Report) -> int:
    """Run every check.

    Args:
        timeout: seconds to wait for the other ranks, and limit of the checks that all ranks make together.
        report: called with the result on rank 0, and on a rank that could not join.
    Returns:
        The exit status: 1 if a check failed.
    """
    signal.alarm(
        int(2 * _LOCAL_SECONDS + 6 * timeout)
    )  # for code that hangs and holds Python's lock, which no thread can interrupt
    c = Context(config=config, timeout=timeout)
    c.facts["offline"] = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    os.environ["HF_HUB_OFFLINE"] = "1"  # no check waits for the hub
    logging.getLogger("xformers").setLevel(logging.ERROR)  # the check `attention` reports why it can't run
    found = _join_world(c) or run_checks(_FIRST, c, timeout)
    rendezvous = None
    if all(f.status != "fail" for f in found):
        try:
            rendezvous = Rendezvous(c.rank, c.world_size, timeout)
        except UserError as e:
            found.append(from_error("rendezvous", e, ""))
    found += run_checks(_LOCAL + (_OF_CONFIG if config else ()), c, _LOCAL_SECONDS)
    ok = _with_others(c, found, rendezvous, report) if rendezvous else _alone(c, found, report)
    signal.alarm(0)
    if any(t.name == THREAD for t in threading.enumerate()):  # a thread that hangs must not delay the exit
        sys.stdout.flush()
        os._exit(not ok)
    return int(not ok)


def _join_world(c: Context) -> list[Check]:
    """Fill in rank and world size; a failed check if the environment makes no sense."""
    remedy = "launch with srun or torchrun"
    try:
        c.rank, c.world_size, c.local_rank = set_environment()
        if 0 < int(os.environ["MASTER_PORT"]) < 65536:
            return []
    except UserError as e:
        c.rank = int(os.environ.get("RANK", "0"))
        return [from_error("launch", e, remedy)]
    except ValueError:
        pass
    values = ", ".join(f"{n}={os.environ.get(n)}" for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    os.environ["RANK"] = str(c.rank)  # other code reads it as a number
    return [Check("launch", "fail", f"not all are numbers in range: {values}", remedy)]


def _alone(c: Context, found: list[Check], report: Report) -> bool:
    """Report a rank that could not join the others, also on stderr, as stdout is rank 0's. Whether all is well."""
    result = merge({c.rank: found}, 1 if c.rank else c.world_size)
    report(result)
    if c.rank:
        for line in lines(result)[:-1]:
            if not line.startswith("ok"):
                print(f"dit-ds (rank {c.rank}): {line}", file=sys.stderr)
    return result["ok"]


def _with_others(c: Context, found: list[Check], rendezvous: Rendezvous, report: Report) -> bool:
    """Rank 0 collects and reports; if all ranks joined, they run the collective checks. Whether all is well, on every rank."""
    try:
        sent = {"checks": [dataclasses.asdict(f) for f in found], "facts": c.facts}
        local, absent = rendezvous.collect("local", sent, _LOCAL_SECONDS + 10)
        if c.rank == 0:
            absent += compare({r: v["facts"] for r, v in local.items()})
            rendezvous.publish("go", not absent)
        together = []
        if rendezvous.wait_for("go", _LOCAL_SECONDS + 2 * c.timeout + 10):
            together = run_checks(_TOGETHER, c, c.timeout)
        shared, late = rendezvous.collect("together", [dataclasses.asdict(f) for f in together], c.timeout + 10)
        if c.rank == 0:
            by_rank = {r: [Check(**f) for f in v["checks"] + shared.get(r, [])] for r, v in local.items()}
            result = merge(by_rank, c.world_size, absent + late or [rendezvous.all_joined()])
            report(result)
            rendezvous.publish("ok", result["ok"])
        return rendezvous.wait_for("ok", 2 * c.timeout + 10)
    except UserError as e:
        return _alone(c, [*found, from_error("rendezvous", e, "")], report)
    finally:
        rendezvous.close()
