"""Streams of the simulated GPU: operators and allocations belong to one, and what was used on another waits for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class Tracker(Protocol):
    """What is told about streams."""

    stream: int

    def synchronize(self) -> None:
        """The host waits for all streams."""

    def empty_cache(self) -> None:
        """Unused segments are given back."""


class SimulatedStream:
    """Stands for `torch.cuda.Stream`. That streams wait for each other has no effect: only the host's waiting does.

    Attributes:
        number: 0 for the default stream.
    """

    def __init__(self, number: int, synchronize: Callable[[], None]):
        self.number, self._synchronize = number, synchronize

    def synchronize(self) -> None:
        """The host waits."""
        self._synchronize()

    def wait_stream(self, stream: Any) -> None:
        """Nothing."""

    def wait_event(self, event: Any) -> None:
        """Nothing."""

    def record_event(self, event: Any = None) -> SimulatedEvent:
        """An event; nothing is recorded."""
        return event or SimulatedEvent(self._synchronize)

    def query(self) -> bool:
        """Whether all work is done: the host does not know without waiting."""
        return False


class SimulatedEvent:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize

    def record(self, stream: Any = None) -> None:
        """Nothing."""

    def wait(self, stream: Any = None) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """The host waits."""
        self._synchronize()

    def query(self) -> bool:
        """Whether it has passed: the host does not know without waiting."""
        return False

    def elapsed_time(self, other: Any) -> float:
        """No time passes."""
        return 0.0


class Streams:
    """The streams of one simulated GPU, as an accelerator of DeepSpeed offers them.

    Attributes:
        tracker: is told on which stream operators run; None while nothing is tracked.
    """

    def __init__(self) -> None:
        self.tracker: Tracker | None = None
        self._numbers = itertools.count()
        self._default = self._current = self.make()

    def make(self, *_: Any, **__: Any) -> SimulatedStream:
        """A new stream."""
        return SimulatedStream(next(self._numbers), self.synchronize)

    def event(self, *_: Any, **__: Any) -> SimulatedEvent:
        """A new event."""
        return SimulatedEvent(self.synchronize)

    def current(self, device: Any = None) -> SimulatedStream:
        """On which operators run now."""
        return self._current

    def default(self, device: Any = None) -> SimulatedStream:
        """On which they run otherwise."""
        return self._default

    @contextlib.contextmanager
    def on(self, stream: SimulatedStream | None) -> Iterator[None]:
        """A context in which operators run on a stream."""
        before, self._current = self._current, stream or self._current
        self._tell()
        try:
            yield
        finally:
            self._current = before
            self._tell()

    def synchronize(self, device: Any = None) -> None:
        """The host waits for all streams."""
        if self.tracker is not None:
            self.tracker.synchronize()

    def empty_cache(self) -> None:
        """The allocator gives unused segments back."""
        if self.tracker is not None:
            self.tracker.empty_cache()

    def _tell(self) -> None:
        if self.tracker is not None:
            self.tracker.stream = self._current.number
