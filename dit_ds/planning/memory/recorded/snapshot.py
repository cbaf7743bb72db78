"""Recorded histories of CUDA's caching allocator: PyTorch's memory snapshots, and trace files of the same events.

A snapshot is the pickle that `torch.cuda.memory._dump_snapshot` and `dit-ds memory measure --snapshot` write; it is read
as data, no code of it is run. A trace file is JSON, also gzipped, with the events as lists:
{"torch_settings": {..}, "segments_at_end": [[address, bytes, stream, "small" or "large", [[bytes, requested, state], ..]],
..], "events": [[action, address, bytes, stream], ..]}.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dit_ds.data.annotations.plain_pickle import load_plain
from dit_ds.errors import UserError
from dit_ds.files import parse_json
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.blocks import DEFAULT_POOL, SMALL_SEGMENT

_ACTIONS = {
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom",
    "snapshot", "user_defined",
}  # fmt: skip


class Event(NamedTuple):
    """What the allocator did.

    Attributes:
        action: PyTorch's word, one of `_ACTIONS`.
        address: of `oom`, bytes that the GPU had free.
        size: bytes; of `alloc`, `free_*` and `oom` the bytes that the program asked for.
        pool: the private pool's id, (0, 0) for none.
        site: the innermost Python frame outside of PyTorch, as "model.py:12 forward"; empty where frames are missing.
        by_user: for `segment_free`: `empty_cache` is among the frames.
    """

    action: str
    address: int
    size: int
    stream: int
    pool: Hashable = DEFAULT_POOL
    site: str = ""
    by_user: bool = False


class BlockAtEnd(NamedTuple):
    """A block of a segment when the snapshot was taken."""

    address: int
    size: int
    requested: int
    state: str
    site: str = ""


@dataclass(frozen=True)
class SegmentAtEnd:
    """A segment when the snapshot was taken; of expandable ones, a range with memory."""

    address: int
    size: int
    stream: int
    small: bool
    blocks: tuple[BlockAtEnd, ...]
    pool: Hashable = DEFAULT_POOL
    expandable: bool = False


@dataclass(frozen=True)
class Trace:
    """The history of one GPU's allocator.

    Attributes:
        settings: under which it was recorded.
        events: from the first recorded to the last.
        segments: at the end, by address.
        notes: what the file leaves open.
    """

    settings: AllocatorSettings
    events: list[Event]
    segments: list[SegmentAtEnd]
    notes: list[str] = field(default_factory=list)


def read(path: str | Path, device: int | None = None) -> Trace:
    """Read a snapshot or a trace file.

    Args:
        device: whose history, where the snapshot has that of several GPUs.
    Raises:
        UserError: the file can't be read, is neither, holds code, has no history, or actions that are not known.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"no snapshot at {path}") from None
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror or e}): if it was copied, copy it again") from None
    except (EOFError, zlib.error) as e:
        raise UserError(f"{path} is cut short or damaged ({e}): copy it again") from None
    try:
        value = parse_json(data) if data.lstrip()[:1] == b"{" else load_plain(data)
    except Exception as e:  # a damaged pickle can raise nearly anything
        why = " ".join(str(e).split())[:80] or type(e).__name__
        raise UserError(f"{path} is no memory snapshot ({why}), nothing of it was run: write one with "
                        "'dit-ds memory measure --snapshot FILE' or torch.cuda.memory._dump_snapshot") from None  # fmt: skip
    try:
        if isinstance(value, dict) and "events" in value:
            if device is not None:
                raise UserError("a trace file is of one GPU: leave out --device")
            return _of_trace(value)
        return _of_snapshot(value, device)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise UserError(f"{path} is not laid out as a memory snapshot ({type(e).__name__}: {e})") from None


def _of_trace(value: dict[str, Any]) -> Trace:
    segments = []
    for address, size, stream, kind, blocks in value["segments_at_end"]:
        at, rows = _whole(address), []
        for length, requested, state in blocks:
            rows.append(BlockAtEnd(at, _whole(length), _whole(requested), str(state)))
            at += length
        segments.append(SegmentAtEnd(_whole(address), _whole(size), _whole(stream), kind == "small", tuple(rows)))
    events = [Event(str(action), _whole(address), _whole(size), _whole(stream)) for action, address, size, stream in
              value["events"]]  # fmt: skip
    return _checked(value.get("torch_settings") or {}, events, segments)


def _of_snapshot(value: Any, device: int | None) -> Trace:
    if not isinstance(value, dict) or "segments" not in value:
        raise UserError("it is not what torch.cuda.memory._dump_snapshot writes")
    histories = {i: history for i, history in enumerate(value.get("device_traces") or ()) if history}
    if not histories:
        raise UserError("it has no history: call torch.cuda.memory._record_memory_history() before the run")
    if device is None and len(histories) > 1:
        raise UserError(f"it has the history of GPUs {', '.join(map(str, histories))}: choose one with --device")
    device = next(iter(histories)) if device is None else device
    if device not in histories:
        raise UserError(f"it has no history of GPU {device}, but of {', '.join(map(str, histories))}")
    sites: dict[int, tuple[str, bool]] = {}  # frames are shared lists: each is read once
    events = [_event(entry, sites) for entry in histories[device]]
    segments = [_segment(s, sites) for s in value["segments"] if s.get("device", device) == device]
    return _checked(value.get("allocator_settings") or {}, events, segments)


def _event(entry: dict[str, Any], sites: dict[int, tuple[str, bool]]) -> Event:
    site, by_user = _site(entry.get("frames") or (), sites)
    pool = entry.get("pool_id", entry.get("segment_pool_id"))
    return Event(
        action=str(entry["action"]),
        address=_whole(entry.get("addr", entry.get("device_free", 0))),
        size=_whole(entry.get("size", 0)),
        stream=_whole(entry.get("stream", 0)),
        pool=DEFAULT_POOL if pool is None else tuple(pool),
        site=site,
        by_user=by_user,
    )


def _segment(entry: dict[str, Any], sites: dict[int, tuple[str, bool]]) -> SegmentAtEnd:
    at, blocks = _whole(entry["address"]), []
    for block in entry["blocks"]:
        size = _whole(block["size"])
        requested = _whole(block.get("requested_size", size))
        frames = block.get("frames") or next((h.get("frames") for h in block.get("history") or ()), None) or ()
        blocks.append(BlockAtEnd(at, size, requested, str(block["state"]), _site(frames, sites)[0]))
        at += size
    return SegmentAtEnd(
        address=_whole(entry["address"]),
        size=_whole(entry["total_size"]),
        stream=_whole(entry.get("stream", 0)),
        small=entry.get("segment_type") == "small",
        blocks=tuple(blocks),
        pool=tuple(entry.get("segment_pool_id", DEFAULT_POOL)),
        expandable=bool(entry.get("is_expandable", False)),
    )


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"'{str(value)[:40]}' where a whole number stands")
    return value


def _site(frames: Iterable[dict[str, Any]], sites: dict[int, tuple[str, bool]]) -> tuple[str, bool]:
    """The innermost Python frame outside of PyTorch, and whether `empty_cache` is among the frames."""
    key = id(frames)
    if key not in sites:
        python = [f for f in frames if str(f.get("filename", "")).endswith(".py")]
        own = [f for f in python if "/torch/" not in f["filename"].replace("\\", "/")] or python
        name = f"{Path(str(own[0]['filename'])).name}:{own[0].get('line')} {own[0].get('name')}" if own else ""
        sites[key] = name, any(f.get("name") == "empty_cache" for f in python)
    return sites[key]


def _checked(settings: dict[str, Any], events: list[Event], segments: list[SegmentAtEnd]) -> Trace:
    """The trace, if its actions are known and its numbers can be sizes."""
    for i, event in enumerate(events):
        if event.action not in _ACTIONS:
            raise UserError(
                f"event {i} is '{event.action[:40]}', which this version does not know: nothing was replayed"
            )
        if min(event.size, event.address) < 0:
            raise UserError(f"event {i} ({event.action}) has a negative size or address")
    if not events:
        raise UserError("it has no history: call torch.cuda.memory._record_memory_history() before the run")
    for segment in segments:
        if sum(b.size for b in segment.blocks) != segment.size or min((b.size for b in segment.blocks), default=0) < 0:
            raise UserError(f"the blocks of segment {segment.address:#x} are not as long as it: the file is damaged")
    notes: list[str] = []
    segments = sorted(segments, key=lambda s: s.address)
    known = all(e.pool != DEFAULT_POOL for e in events) or all(s.pool == DEFAULT_POOL for s in segments)
    if not known:
        events = _with_pools(events, segments)
    return Trace(_settings(settings, notes), events, segments, notes)


def _with_pools(events: list[Event], segments: list[SegmentAtEnd]) -> list[Event]:
    """Events of snapshots that name no pool: the pool of the segment that lies there at the end."""
    private = [s for s in segments if s.pool != DEFAULT_POOL]

    def pool(event: Event) -> Hashable:
        if event.pool != DEFAULT_POOL:
            return event.pool
        return next((s.pool for s in private if s.address <= event.address < s.address + s.size), DEFAULT_POOL)

    return [event._replace(pool=pool(event)) for event in events]


def _settings(found: dict[str, Any], notes: list[str]) -> AllocatorSettings:
    """The settings of a snapshot, from its text and its values."""
    try:
        settings = AllocatorSettings.parse(str(found.get("PYTORCH_CUDA_ALLOC_CONF", "")))
    except UserError as e:
        notes.append(f"recorded under settings that are not known: {e}")
        settings = AllocatorSettings()
    if not found:
        notes.append("the allocator's settings were not recorded: the defaults are assumed")
    values = {**vars(settings)}
    if found.get("max_split_size", -1) > 0:
        values["max_split_size"] = found["max_split_size"]
    values["expandable_segments"] |= bool(found.get("expandable_segments", False))
    values["garbage_collection_threshold"] = float(found.get("garbage_collection_threshold") or 0)
    divisions = found.get("roundup_power2_divisions") or {}
    if len(divisions) == len(settings.roundup_power2_divisions):
        values["roundup_power2_divisions"] = tuple(
            int(n) for _, n in sorted(divisions.items(), key=lambda d: int(d[0]))
        )
    return AllocatorSettings(**values)


class SegmentAtStart(NamedTuple):
    """A segment that was there before the first event; of expandable ones, a range with memory."""

    address: int
    size: int
    stream: int
    small: bool
    pool: Hashable
    expandable: bool

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True)
class Start:
    """What there was before the first event.

    Attributes:
        segments: by address.
        blocks: those that were allocated, by address: (requested bytes, waits for other streams, site).
        contradictions: what can't be so, as a block outside of any segment; then the history is not whole.
    """

    segments: list[SegmentAtStart]
    blocks: dict[int, tuple[int, bool, str]]
    contradictions: list[str]


def start_of(trace: Trace) -> Start:
    """Go back from the end: segments over their events; blocks are those that are freed first or never touched."""
    live: set[int] = set()
    blocks: dict[int, tuple[int, bool, str]] = {}
    wrong: list[str] = []
    for event in trace.events:
        if event.action == "alloc":
            if event.address in live:
                wrong.append(f"{event.address:#x} is allocated twice")
            live.add(event.address)
        elif event.action in ("free_requested", "free_completed"):
            if event.address not in live:
                if event.action == "free_requested" or event.address not in blocks:
                    blocks.setdefault(event.address, (event.size, event.action == "free_completed", event.site))
            elif event.action == "free_completed":
                live.discard(event.address)
    touched = {e.address for e in trace.events if e.action in ("alloc", "free_requested", "free_completed")}
    for segment in trace.segments:
        for block in segment.blocks:
            if block.state != "inactive" and block.address not in touched:
                blocks[block.address] = block.requested, block.state == "active_awaiting_free", block.site
            elif block.state != "inactive" and block.address not in live:
                wrong.append(f"{block.address:#x} is allocated at the end, but was freed")
    return Start(_segments_at_start(trace, wrong), blocks, wrong)


def _segments_at_start(trace: Trace, wrong: list[str]) -> list[SegmentAtStart]:
    large_page = trace.settings.large_segment_size
    segments = {s.address: (s.size, s.stream, s.small, s.pool) for s in trace.segments if not s.expandable}
    pages: dict[int, tuple[int, int, bool, Hashable]] = {}  # of expandable segments, by address
    for s in trace.segments:
        if s.expandable:
            page = SMALL_SEGMENT if s.small else large_page
            pages |= {a: (page, s.stream, s.small, s.pool) for a in range(s.address, s.address + s.size, page)}
    for event in reversed(trace.events):
        small = event.size == SMALL_SEGMENT
        if event.action == "segment_alloc":
            if segments.pop(event.address, (0,))[0] != event.size:
                wrong.append(f"segment {event.address:#x} was made, but is not there later")
        elif event.action == "segment_free":
            segments[event.address] = event.size, event.stream, small, event.pool
        elif event.action in ("segment_map", "segment_unmap"):
            small = event.size % large_page != 0
            page = SMALL_SEGMENT if small else large_page
            for address in range(event.address, event.address + event.size, page):
                if event.action == "segment_unmap":
                    pages[address] = page, event.stream, small, event.pool
                elif pages.pop(address, None) is None:
                    wrong.append(f"page {address:#x} was mapped, but is not there later")
    fixed = [SegmentAtStart(address, *rest, False) for address, rest in segments.items()]
    return sorted(fixed + _ranges(pages))


def _ranges(pages: dict[int, tuple[int, int, bool, Hashable]]) -> list[SegmentAtStart]:
    """Mapped pages side by side as one."""
    ranges: list[list[Any]] = []
    for address, (page, stream, small, pool) in sorted(pages.items()):
        if ranges and ranges[-1][0] + ranges[-1][1] == address and ranges[-1][2:5] == [stream, small, pool]:
            ranges[-1][1] += page
        else:
            ranges.append([address, page, stream, small, pool, True])
    return [SegmentAtStart(*r) for r in ranges]
