"""`dit-ds memory replay`: a recorded history, the settings that would have done better, and a GPU that would do."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from dit_ds.files import GIB
from dit_ds.planning.memory.allocations import ALLOCATE, EMPTY_CACHE, FAILED, Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.caching_allocator import CachingAllocator
from dit_ds.planning.memory.recorded import segments_plot
from dit_ds.planning.memory.recorded.requests import requests_of
from dit_ds.planning.memory.recorded.snapshot import Start, Trace, read, start_of
from dit_ds.planning.memory.recorded.verify import Verified, verify
from dit_ds.planning.memory.simulate import Simulated, check_capacity, least_capacity, ranked, simulate
from dit_ds.planning.memory.timeline import require

_MOST_REQUESTS = 200_000  # of a record whose alternatives' least capacities are looked for: each takes a dozen replays
_HOLDERS = 12
_SHARE = 0.002  # how far above the least capacity an alternative's may be


def replay(path: str | Path, conf: str | None = None, capacity: int | None = None, plot: str | None = None,
           device: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Replay a snapshot or a trace file.

    Args:
        conf: settings as in PYTORCH_CUDA_ALLOC_CONF, instead of the recorded ones.
        capacity: bytes that segments can take of the GPU; None for what a recorded failure shows, else for no limit.
        plot: picture of segments and blocks at the peak to write.
        device: whose history, where the file has several.
    Returns:
        What `dit-ds memory replay --json` prints; sizes are bytes.
    Raises:
        UserError: a file, a setting or a capacity that can't be used.
    """
    if plot:
        require(plot)
    settings = None if conf is None else AllocatorSettings.parse(conf)
    trace = read(path, device)
    start = start_of(trace)
    found = verify(trace, start)
    requests, numbers = requests_of(trace, start)
    failed = _recorded_capacity(trace, found)
    if capacity is not None:
        check_capacity(requests, settings or trace.settings, capacity)
    wanted = capacity if capacity is not None else failed
    used = settings or trace.settings
    unlimited, _ = simulate(requests, used)
    limited = unlimited if wanted is None else simulate(requests, used, wanted)[0]
    as_recorded = settings is None and capacity is None
    shown: Verified | Simulated = found if as_recorded else limited
    least = least_capacity(requests, used, unlimited)
    sites = _sites(trace, start, requests, numbers)
    result = {
        "events": len(trace.events),
        "allocations": found.allocations,
        "at_recorded_address": found.at_recorded_address,
        "segments": found.segments,
        "segments_foreseen": found.segments_foreseen,
        "exact": found.exact,
        "recorded_peak_reserved": found.recorded_peak_reserved,
        "peak_reserved": shown.peak_reserved,
        "peak_allocated": shown.peak_allocated,
        "least_capacity": least,
        "fragmentation": round(1 - shown.peak_allocated / max(1, shown.peak_reserved), 4),
        "settings": str(used),
        "capacity": wanted,
        "fits": limited.fits,
        "fails": _failure(limited, requests, sites, wanted),
        "notes": _notes(trace, found, requests, failed if capacity is None else None),
    }
    result["ranking"] = _ranking(requests, trace.settings, used, wanted)
    peak_at = limited.peak_at if limited.failed_at is None else limited.failed_at - 1
    allocator = simulate(requests, used, wanted, until=peak_at)[1]
    result["holders"] = _holders(allocator, sites)
    if plot:
        segments_plot.draw(allocator, sites, plot, f"{Path(path).name}: {str(used) or 'default settings'}")
        result["plot"] = plot
    return result


def _recorded_capacity(trace: Trace, found: Verified) -> int | None:
    """What segments could take when an allocation failed: those that there were, and what the GPU had free."""
    reserved = found.recorded_at_start
    for event in trace.events:
        if event.action in ("segment_alloc", "segment_map"):
            reserved += event.size
        elif event.action in ("segment_free", "segment_unmap"):
            reserved -= event.size
        elif event.action == "oom":
            return reserved + event.address
    return None


def _notes(trace: Trace, found: Verified, requests: list[Request], capacity: int | None) -> list[str]:
    """What a reader has to know about the figures."""
    notes = list(trace.notes)
    if not found.exact:
        missed = found.allocations - found.at_recorded_address
        notes.append(
            f"not exact: {missed} of {found.allocations} allocations lie elsewhere than recorded"
            + (f", {found.contradictions[0]}" if found.contradictions else "")
            + ": the record begins in the middle of a run, or is not whole; its figures are estimates"
        )
    if any(e.pool != (0, 0) for e in trace.events):
        notes.append("it has private pools (CUDA graphs): when a graph gave its pool back is not recorded")
    cleared = sum(r.kind == EMPTY_CACHE for r in requests)
    if cleared:
        notes.append(f"empty_cache was called {cleared} times: the replay calls it there, too")
    if capacity is not None:
        notes.append(
            f"an allocation failed: the GPU had room for {capacity} bytes of segments, which is the capacity here"
        )
    return notes


def _sites(trace: Trace, start: Start, requests: list[Request], numbers: list[int]) -> dict[int, str]:
    """Where each block was allocated, by its key."""
    before = [site for _, (_, _, site) in sorted(start.blocks.items())]
    sites = {}
    for request, number in zip(requests, numbers):
        if request.kind in (ALLOCATE, FAILED):
            site = trace.events[number].site if number >= 0 else before[request.key]
            sites[request.key] = site or ("allocated before the record" if number < 0 else "")
    return sites


def _failure(
    result: Simulated, requests: list[Request], sites: dict[int, str], capacity: int | None
) -> dict[str, Any] | None:
    if result.failed_at is None or result.error is None or capacity is None:
        return None
    request = requests[result.failed_at]
    return {
        "request": result.failed_at,
        "bytes": request.size,
        "site": sites.get(request.key, ""),
        "message": result.error.as_torch_words_it(capacity),
    }


def _holders(allocator: CachingAllocator, sites: dict[int, str]) -> list[dict[str, Any]]:
    """Who holds most of what is allocated."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for block in allocator.blocks():
        if block.allocated:
            at = sums[sites.get(block.key, "")]
            at[0], at[1] = at[0] + block.size, at[1] + 1
    largest = sorted(sums.items(), key=lambda item: -item[1][0])[:_HOLDERS]
    return [{"site": site, "bytes": size, "blocks": count} for site, (size, count) in largest]


def _ranking(requests: list[Request], recorded: AllocatorSettings, used: AllocatorSettings,
             capacity: int | None) -> list[dict[str, Any]]:  # fmt: skip
    """Settings by what they reserve; `saves` is against the recorded ones."""
    results = ranked(requests, (recorded, used))
    before = next(r for r in results if r.settings == recorded)
    return [
        {
            "settings": str(r.settings),
            "peak_reserved": r.peak_reserved,
            "least_capacity": least_capacity(requests, r.settings, r, _SHARE)
            if len(requests) <= _MOST_REQUESTS
            else None,
            "saves": before.peak_reserved - r.peak_reserved,
            "fits": True if capacity is None else simulate(requests, r.settings, capacity)[0].fits,
        }
        for r in results
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """`replay`'s result for people."""
    r = result
    out = [
        f"{r['events']} events, {r['at_recorded_address']} of {r['allocations']} allocations at the recorded address, "
        f"{r['segments_foreseen']} of {r['segments']} segments foreseen: {'exact' if r['exact'] else 'not exact'}",
        f"recorded  {_gib(r['recorded_peak_reserved'])} reserved",
        f"replayed  {_gib(r['peak_reserved'])} reserved, {_gib(r['peak_allocated'])} allocated, fragmentation "
        f"{r['fragmentation']:.1%}, with {r['settings'] or 'the default settings'}",
        f"needs     {_gib(r['least_capacity'])} for segments at least",
    ]
    if r["capacity"] is not None:
        verdict = "fits" if r["fits"] else f"does not fit: {r['fails']['message']}"
        out.append(f"capacity  {_gib(r['capacity'])}: {verdict}")
        if r["fails"] and r["fails"]["site"]:
            out.append(f"fails at  {r['fails']['site']}")
    for row in r["ranking"]:
        least = "" if row["least_capacity"] is None else f", needs {_gib(row['least_capacity'])}"
        unfit = "" if row["fits"] else ", does not fit"
        out.append(f"setting   {_gib(row['peak_reserved'])} reserved{least}{unfit}: {row['settings'] or 'default'}")
    named = [h for h in r["holders"] if h["site"]]
    out += [f"holds     {_gib(h['bytes'])} in {h['blocks']} blocks: {h['site']}" for h in named]
    return out + [f"note      {note}" for note in r["notes"]] + ([f"drawn in  {r['plot']}"] if "plot" in r else [])


def _gib(size: int) -> str:
    return f"{size / GIB:.3f} GiB"
