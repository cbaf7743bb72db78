"""The watchdog names the rank for which the others wait, whatever the hosts' clocks say."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dit_ds.distributed import World
from dit_ds.training import watchdog
from dit_ds.training.watchdog import Watchdog

SECONDS = 20.0


class Store(dict):
    """In place of the TCPStore."""

    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class Clocks:
    """Stands for the module `time`, on the host of the rank whose turn it is: each has its own, and they differ."""

    def __init__(self, wall: list[float], since_boot: list[float]):
        self.wall, self.since_boot, self.rank, self.now = wall, since_boot, 0, 0.0

    def monotonic(self) -> float:
        return self.since_boot[self.rank] + self.now

    def time(self) -> float:
        return self.wall[self.rank] + self.now


class Run:
    """Ranks that step together: a phase begins when all have begun the one before."""

    def __init__(self, clocks: Clocks):
        self.clocks, store = clocks, Store()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watchdog, "connect_store", lambda world: store)
            for thread in ("_run", "_watch_rank_0"):  # heartbeats are sent below
                patch.setattr(Watchdog, thread, lambda self: None)
            self.dogs = [
                self.of(
                    rank, lambda rank=rank: Watchdog(World(rank, len(clocks.wall), 0, torch.device("cpu")), SECONDS)
                )
                for rank in range(len(clocks.wall))
            ]

    def of(self, rank: int, call: Callable) -> object:
        self.clocks.rank = rank
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watchdog, "time", self.clocks)
            patch.setattr(watchdog.socket, "gethostname", lambda: f"host{rank}")
            return call()

    def go(self, seconds: float, stepping: set[int], beating: set[int], step: int) -> None:
        """Let time pass: 5 s between heartbeats, and a phase each for the ranks that are at work."""
        for _ in range(int(seconds / 5)):
            self.clocks.now += 5
            for rank, dog in enumerate(self.dogs):
                if rank in stepping:
                    self.of(rank, lambda dog=dog: dog.at(step, "forward and backward"))
            for rank in sorted(beating, reverse=True):  # rank 0 looks last
                self.of(rank, self.dogs[rank]._beat)


HOURS = st.floats(-1e6, 1e6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), ranks=st.integers(2, 5), silent=st.booleans())
def test_the_stalled_rank_is_named_with_clocks_that_are_hours_off(data, ranks, silent, caplog):
    clocks = Clocks(*(data.draw(st.lists(HOURS, min_size=ranks, max_size=ranks)) for _ in range(2)))
    stalled = data.draw(st.integers(1, ranks - 1))
    check(clocks, stalled, silent, data.draw(st.lists(st.tuples(st.integers(0, ranks - 1), HOURS), max_size=3)), caplog)


@example(silent=True)
@example(silent=False)
@given(silent=st.booleans())
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_rank_in_the_future_and_a_rank_in_the_past(silent, caplog):
    check(Clocks([0.0, 18000.0, -18000.0], [1e6, 10.0, 5e8]), 2, silent, [(1, -7200.0)], caplog)


def check(clocks: Clocks, stalled: int, silent: bool, adjusted: list[tuple[int, float]], caplog) -> None:
    run, everyone = Run(clocks), set(range(len(clocks.wall)))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dit_ds"):
        run.go(100, everyone, everyone, step=3)
        for rank, by in adjusted:  # someone sets a host's clock while the run goes on
            clocks.wall[rank] += by
        run.go(100, everyone, everyone, step=4)
        assert caplog.messages == []  # nothing is wrong: no false alarm
        run.go(
            5, everyone - {stalled}, everyone - {stalled} if silent else everyone, step=5
        )  # they begin to wait for it
        run.go(SECONDS + 5, set(), everyone - {stalled} if silent else everyone, step=5)
    assert len(caplog.messages) == 1
    line = caplog.messages[0]
    assert f"rank {stalled} on host{stalled} stalled at step 4" in line
    assert ("its process does not answer" if silent else "it is forward and backward") in line
    waited, lasted = (int(n) for n in re.findall(r"for (\d+) s", line))
    assert SECONDS <= waited <= 30 and SECONDS <= lasted <= 40, line


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("phase", ["forward and backward", "saving"])
def test_a_run_that_hangs_is_ended_but_not_while_it_saves(monkeypatch, phase, silent):
    """A disk may take long; a process whose heartbeats stop does not come back."""
    exits: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", exits.append)
    run = Run(Clocks([0.0] * 2, [0.0] * 2))
    run.go(100, {0, 1}, {0, 1}, step=3)
    for rank, dog in enumerate(run.dogs):
        run.of(rank, lambda dog=dog: dog.at(3, phase))
    beating = {0} if silent else {0, 1}
    run.go(2 * SECONDS - 5, set(), beating, step=3)
    assert exits == []
    run.go(2 * SECONDS, set(), beating, step=3)
    assert exits[:1] == ([] if phase == "saving" and not silent else [watchdog.STALLED])


def test_a_rank_that_never_came_is_named(caplog):
    run = Run(Clocks([0.0] * 3, [0.0] * 3))
    with caplog.at_level(logging.WARNING, logger="dit_ds"):
        run.go(30, set(), {0, 1}, step=0)
    assert "rank 2 on an unknown host stalled at step 0" in caplog.messages[0]
