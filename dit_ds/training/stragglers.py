"""Stragglers: ranks whose own time is longer than the others', for which every step waits.

In synchronous training all ranks' steps last equally long. What tells them apart is a rank's own time: what it spends
before it waits for another. `ThroughputMeter` measures it, `RunLog` keeps it in ranks.jsonl, a line for each interval of
`log.every_steps`: `step`, `step_seconds` (of an optimizer step, with all waiting) and `own_seconds` (of each rank, for an
optimizer step), by host and rank.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dit_ds.errors import UserError
from dit_ds.files import json_lines

NAME = "ranks.jsonl"
_SLOW = 4 / 3  # times the median
_SHARE_OF_STEP = 0.05  # of a step's time that a rank must be behind the median: less does not hold training up
_PERSISTS = 0.5  # share of the intervals from which a slow rank is a straggler
_AT_TIMES = 0.1  # share from which it is reported as slow at times
_WINDOW = 6  # intervals that the running training looks back on
_IN_WINDOW = 4  # of which a rank was slow in so many: it is named
_AGAIN = 1800.0  # seconds between two warnings
_TAIL = 64 << 20  # bytes of the end of ranks.jsonl that are read

Times = dict[tuple[str, int], float]  # own seconds by host and rank

_log = logging.getLogger("dit_ds")


def median(seconds: Iterable[float]) -> float:
    """The lower median: of two ranks the faster one's, as the mean of the two would hide the slower."""
    return statistics.median_low(seconds)


def slow_ranks(times: Times, step_seconds: float) -> set[tuple[str, int]]:
    """The ranks whose own time is longer than the median by more than a third, and by 5% of a step's time."""
    typical = median(times.values())
    return {who for who, t in times.items() if t > _SLOW * typical and t - typical > _SHARE_OF_STEP * step_seconds}


def exclude_line(hosts: Iterable[str]) -> str:
    """The option that keeps a job off these hosts."""
    return f"sbatch --exclude={','.join(sorted(set(hosts)))}"


class StragglerWatch:
    """Names stragglers in the log while the run goes on; rank 0 has one.

    A rank is named when it was slow in 4 of the last 6 log intervals. A warning comes at most every 30 minutes.
    """

    def __init__(self) -> None:
        self._window: deque[tuple[Times, set[tuple[str, int]]]] = deque(maxlen=_WINDOW)
        self._warned: float | None = None

    def add(self, times: Times, step_seconds: float) -> list[str]:
        """One interval's own times. Returns the hosts that are named in a warning now; mostly none."""
        self._window.append((times, slow_ranks(times, step_seconds)))
        count = Counter(who for _, slow in self._window for who in slow)
        found = sorted(who for who, n in count.items() if n >= _IN_WINDOW)
        now = time.monotonic()
        if not found or (self._warned is not None and now - self._warned < _AGAIN):
            return []
        self._warned = now
        typical = statistics.median(median(t.values()) for t, _ in self._window)
        named = []
        for who in found:
            own = statistics.median(t[who] for t, _ in self._window if who in t)
            named.append(f"rank {who[1]} on {who[0]} ({own:.3g} s a step)")
        hosts = [host for host, _ in found]
        _log.warning(
            f"warning: {', '.join(named)} slower than the median rank ({typical:.3g} s) by more than a third, and the "
            f"others wait: look at the load and clocks there, or leave it out with {exclude_line(hosts)}"
        )
        return hosts


def stragglers(run_dir: str | Path) -> dict[str, Any]:
    """What `dit-ds stragglers --json` prints.

    Returns:
        `run`; `intervals`: log intervals that were read; `ranks`: of each `host` and `rank` the median `own_seconds` a
        step, its `ratio` to the median over the ranks (median over the intervals), `slow_share` of the intervals in
        which it was slow, and the `verdict`: straggler, slow at times or ok, the slowest first; `hosts`: those of
        stragglers; `exclude`: the option that leaves these out, or None; `why`: where there are no records, the reason.
    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no run in {folder}: it has no config.yaml; name a run's folder")
    own: dict[tuple[str, int], list[float]] = {}
    ratios: dict[tuple[str, int], list[float]] = {}
    slow: Counter[tuple[str, int]] = Counter()
    intervals = 0
    for times, step_seconds in _records(folder / NAME):
        intervals += 1
        typical = median(times.values())
        for who, seconds in times.items():
            own.setdefault(who, []).append(seconds)
            ratios.setdefault(who, []).append(seconds / typical if typical else 1.0)
        slow.update(slow_ranks(times, step_seconds))
    ranks = [_of_rank(who, own[who], statistics.median(ratios[who]), slow[who]) for who in own]
    ranks.sort(key=lambda r: (-r["slow_share"], -r["ratio"], r["rank"]))
    hosts = sorted({r["host"] for r in ranks if r["verdict"] == "straggler"})
    why = (
        None
        if intervals
        else f"no times of several ranks in {folder / NAME}: the run has one rank, is older, or is young"
    )
    exclude = exclude_line(hosts) if hosts else None
    return {"run": str(folder), "intervals": intervals, "ranks": ranks, "hosts": hosts, "exclude": exclude, "why": why}


def _of_rank(who: tuple[str, int], own: list[float], ratio: float, slow: int) -> dict[str, Any]:
    share = slow / len(own)
    verdict = "straggler" if share >= _PERSISTS else "slow at times" if share >= _AT_TIMES else "ok"
    numbers = {"own_seconds": statistics.median(own), "ratio": ratio, "slow_share": share}
    return {"host": who[0], "rank": who[1], "intervals": len(own)} | numbers | {"verdict": verdict}


def _records(path: Path) -> Iterator[tuple[Times, float]]:
    """The own times and the step's seconds of each line; lines that are none are passed over."""
    for line in json_lines(path, _TAIL):
        try:
            times = {
                (str(host), int(rank)): float(seconds)
                for host, ranks in line["own_seconds"].items()
                for rank, seconds in ranks.items()
            }
            step_seconds = float(line["step_seconds"])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if len(times) > 1 and all(0 <= t < float("inf") for t in (*times.values(), step_seconds)):
            yield times, step_seconds


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people: a line for each rank, the slowest first, and what to do."""
    if result["why"]:
        return [f"{result['run']}: {result['why']}"]
    out = [f"{result['run']}: {len(result['ranks'])} ranks, {result['intervals']} log intervals"]
    width = max(4, *(len(r["host"]) for r in result["ranks"]))
    out.append(f"{'host':{width}}  {'rank':>5}  {'own s/step':>10}  {'/ median':>8}  {'slow in':>7}  verdict")
    for r in result["ranks"]:
        out.append(f"{r['host']:{width}}  {r['rank']:5}  {r['own_seconds']:10.4g}  {r['ratio']:8.2f}  "
                   f"{r['slow_share']:7.0%}  {r['verdict']}")  # fmt: skip
    out.append(f"leave out: {result['exclude']} ..." if result["exclude"] else "no straggler")
    return out
