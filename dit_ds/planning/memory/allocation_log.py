"""What a tracked run asks of the GPU's allocator, and the sequence of a run's first steps that follows from it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from dit_ds.planning.memory.allocations import ALLOCATE, COMPLETE, EMPTY_CACHE, FREE, FREE_LATER, Request


@dataclass(frozen=True)
class Mark:
    """A point of the log: how many requests there were, and which blocks were allocated, by key."""

    position: int
    alive: dict[int, Request]


@dataclass
class AllocationLog:
    """Requests in their order.

    A block that was used on another stream is freed when that stream has passed. When it has is not known without a GPU:
    here, at the next point at which the host waits for the device, which is the latest.

    Attributes:
        requests: since the start of the process.
        sites: phase and module in which a block was allocated, by its key.
    """

    requests: list[Request] = field(default_factory=list)
    sites: dict[int, str] = field(default_factory=dict)
    _alive: dict[int, Request] = field(default_factory=dict)
    _waiting: list[int] = field(default_factory=list)
    _next: int = 0

    def allocate(self, size: int, stream: int = 0, site: str = "") -> int:
        """Log an allocation of `size` bytes; returns the block's key."""
        key, self._next = self._next, self._next + 1
        request = self._alive[key] = Request(ALLOCATE, key, size, stream)
        self.requests.append(request)
        self.sites[key] = site
        return key

    def free(self, key: int, waits: bool = False) -> None:
        """Log that a block is freed; `waits` for another stream that used it."""
        del self._alive[key]
        self.requests.append(Request(FREE_LATER if waits else FREE, key))
        if waits:
            self._waiting.append(key)

    def synchronize(self) -> None:
        """The host has waited for the device: all streams have passed."""
        self.requests += [Request(COMPLETE, key) for key in self._waiting]
        self._waiting.clear()

    def empty_cache(self) -> None:
        """Log that unused segments are given back, for which the host waits."""
        self.synchronize()
        self.requests.append(Request(EMPTY_CACHE, -1))

    def mark(self) -> Mark:
        """This point of the log."""
        return Mark(len(self.requests), dict(self._alive))

    def run(self, ready: Mark, start: Mark, end: Mark, steps: int = 3) -> tuple[list[Request], dict[int, str]]:
        """A run's start, up to `ready`, and its first steps, each of which is what was logged from `start` to `end`.

        Blocks that the steps between `ready` and `start` left are allocated in between. What a step frees of those and
        what it leaves must be of the same sizes for another step to follow; else there is only one.

        Returns:
            The requests, and the sites by key.
        """
        requests, sites = self.requests[: ready.position], dict(self.sites)
        requests += [Request(FREE, key) for key in ready.alive if key not in start.alive]
        requests += [made for key, made in start.alive.items() if key not in ready.alive]
        step = self.requests[start.position : end.position]
        freed = [key for key in start.alive if key not in end.alive]
        left = [key for key in end.alive if key not in start.alive]
        successor = _matched(start.alive, freed, end.alive, left)
        names = {key: key for key in start.alive}
        following = self._next
        for _ in range(steps if successor is not None else 1):
            mine = dict(names)
            for request in step:
                if request.kind == ALLOCATE:
                    sites[following], mine[request.key] = self.sites[request.key], following
                    following += 1
                if request.kind == EMPTY_CACHE:
                    requests.append(request)
                elif request.key in mine:  # else it waited when the step began
                    requests.append(
                        Request(request.kind, mine[request.key], request.size, request.stream, request.pool)
                    )
            names |= {old: mine[new] for old, new in (successor or {}).items()}
        return requests, sites


def _matched(
    before: dict[int, Request], freed: list[int], after: dict[int, Request], left: list[int]
) -> dict[int, int] | None:
    """Which block that a step left takes the place of one that it freed; None if their sizes differ."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for key in reversed(left):
        places[after[key].size, after[key].stream].append(key)
    matched = {}
    for key in freed:
        found = places[before[key].size, before[key].stream]
        if not found:
            return None
        matched[key] = found.pop()
    return None if any(places.values()) else matched
