"""`dit-ds doctor`: what would stop a run, or slow it down, found in seconds and before any step.

Each rank looks at itself; the findings meet in a store at MASTER_ADDR:MASTER_PORT, where a training would meet too.
Everything has a time-out, so that a rank that hangs or never comes is named by the others and stops none of them.
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
from dit_ds.doctor import collective, configured, node, software
from dit_ds.doctor.check import THREAD, Check, Context, from_error, run_checks
from dit_ds.doctor.rendezvous import Meeting
from dit_ds.doctor.report import compare, lines, merge
from dit_ds.errors import UserError

__all__ = ["examine", "lines"]

Report = Callable[[dict[str, Any]], None]
_FIRST = (node.launch, node.names)
_LOCAL = (software.versions, software.gpu, software.attention, software.arithmetic, software.deepspeed,
          node.jit_locks, node.cores, node.memory, node.temporary)  # fmt: skip
_OF_CONFIG = (configured.configuration, configured.shards, configured.sam_checkpoint, configured.text_encoder,
              configured.run_folder)  # fmt: skip
_TOGETHER = (collective.bandwidth, collective.zero_step)
_OWN_SECONDS = 120  # that a rank's own checks may take together


def examine(config: RunConfig | None, timeout: float, report: Report) -> int:
    """Run every check and hand the result to `report` on rank 0; return the exit status: 1 if a check failed.

    Args:
        timeout: seconds to wait for the other ranks, and that what they do together may take.
    """
    signal.alarm(int(2 * _OWN_SECONDS + 6 * timeout))  # the last resort, for code that hangs and holds Python's lock
    c = Context(config=config, timeout=timeout)
    c.facts["offline"] = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    os.environ["HF_HUB_OFFLINE"] = "1"  # no check waits for the hub
    logging.getLogger("xformers").setLevel(logging.ERROR)  # `attention` says why it can't run
    found = _join_world(c) or run_checks(_FIRST, c, timeout)
    meeting = None
    if all(f.status != "fail" for f in found):
        try:
            meeting = Meeting(c.rank, c.world_size, timeout)
        except UserError as e:
            found.append(from_error("rendezvous", e, ""))
    found += run_checks(_LOCAL + (_OF_CONFIG if config else ()), c, _OWN_SECONDS)
    ok = _with_others(c, found, meeting, report) if meeting else _alone(c, found, report)
    signal.alarm(0)
    if any(t.name == THREAD for t in threading.enumerate()):  # what hangs must not hold up the end
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
    os.environ["RANK"] = str(c.rank)  # which others read as a number
    return [Check("launch", "fail", f"not all are numbers in range: {values}", remedy)]


def _alone(c: Context, found: list[Check], report: Report) -> bool:
    """This rank's findings, where it did not meet the others: on stderr, as stdout is rank 0's."""
    result = merge({c.rank: found}, 1 if c.rank else c.world_size)
    report(result)
    if c.rank:
        for line in lines(result)[:-1]:
            if not line.startswith("ok"):
                print(f"dit-ds (rank {c.rank}): {line}", file=sys.stderr)
    return result["ok"]


def _with_others(c: Context, found: list[Check], meeting: Meeting, report: Report) -> bool:
    """Rank 0 collects and reports; all talk over a process group if all came; the verdict is everyone's."""
    try:
        sent = {"checks": [dataclasses.asdict(f) for f in found], "facts": c.facts}
        own, absent = meeting.collect("own", sent, _OWN_SECONDS + 10)
        if c.rank == 0:
            absent += compare({r: v["facts"] for r, v in own.items()})
            meeting.say("go", not absent)
        together = []
        if meeting.hear("go", _OWN_SECONDS + 2 * c.timeout + 10):
            together = run_checks(_TOGETHER, c, c.timeout)
        shared, late = meeting.collect("together", [dataclasses.asdict(f) for f in together], c.timeout + 10)
        if c.rank == 0:
            by_rank = {r: [Check(**f) for f in v["checks"] + shared.get(r, [])] for r, v in own.items()}
            result = merge(by_rank, c.world_size, absent + late or [meeting.all_came()])
            report(result)
            meeting.say("ok", result["ok"])
        return meeting.hear("ok", 2 * c.timeout + 10)
    except UserError as e:
        return _alone(c, [*found, from_error("rendezvous", e, "")], report)
    finally:
        meeting.close()
