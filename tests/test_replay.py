"""`dit-ds memory replay`: snapshots of a second model of the allocator, real ones where they are, and files that are none."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
from reference_allocator import MIB, ReferenceAllocator
from test_caching_allocator import random_program

from dit_ds.cli import main
from dit_ds.errors import UserError
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.recorded.replay import lines, replay
from dit_ds.planning.memory.recorded.requests import requests_of
from dit_ds.planning.memory.recorded.snapshot import read
from dit_ds.planning.memory.recorded.verify import verify
from dit_ds.planning.memory.simulate import least_capacity, simulate

KEYS = {
    "events", "allocations", "at_recorded_address", "segments", "segments_foreseen", "recorded_peak_reserved",
    "peak_reserved", "peak_allocated", "least_capacity", "fragmentation", "fits",
}  # fmt: skip
FRAMES = [
    {"filename": "??", "line": 0, "name": "at::native::empty_cuda"},
    {"filename": "/lib/python3.11/site-packages/torch/nn/modules/linear.py", "line": 9, "name": "forward"},
    {"filename": "/home/me/model.py", "line": 12, "name": "forward"},
]


def recorded(seed: int, streams: int = 1, steps: int = 400, holes: int = 0) -> ReferenceAllocator:
    """A random program's run, in which freed blocks of other streams wait for a while."""
    reference, live, waiting = ReferenceAllocator(holes), {}, []
    for what, key, packed in random_program(seed, steps, streams):
        if what == "allocate":
            live[key] = reference.allocate(*divmod(packed, streams), frames=FRAMES)
        elif what == "free" and streams > 1 and key % 3 == 0:
            reference.request_free(live[key])
            waiting.append(live.pop(key))
        elif what == "free":
            reference.free(live.pop(key))
        else:
            waiting.clear()
            reference.empty_cache()
        if len(waiting) > 3:
            reference.complete_free(waiting.pop(0))
    return reference


def write(path: Path, snapshot: dict) -> Path:
    path.write_bytes(pickle.dumps(snapshot))
    return path


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("streams", [1, 2])
def test_a_record_is_followed_to_the_address(tmp_path, seed, streams):
    """Also one that begins in the middle of the run: what there was before follows from the end."""
    reference = recorded(seed, streams, holes=seed % 2 * 4 * MIB)
    for first in (0, len(reference.events) // 2):
        trace = read(write(tmp_path / "s.pickle", reference.snapshot(first)))
        found = verify(trace)
        assert found.exact, (found, first)
        assert found.allocations == sum(e["action"] == "alloc" for e in reference.events[first:])
    assert found.segments == sum(e["action"] == "segment_alloc" for e in reference.events[first:])
    whole = verify(read(write(tmp_path / "s.pickle", reference.snapshot())))
    assert whole.recorded_peak_reserved == whole.peak_reserved == reference.peak_reserved


def test_what_other_settings_and_gpus_would_do(tmp_path):
    reference = recorded(3, steps=600)
    path = write(tmp_path / "s.pickle", reference.snapshot())
    result = replay(path)
    assert result.keys() >= KEYS and result["exact"] and result["fits"] and result["fails"] is None
    assert result["peak_reserved"] == result["recorded_peak_reserved"] == reference.peak_reserved
    assert result["fragmentation"] == pytest.approx(1 - result["peak_allocated"] / result["peak_reserved"], abs=1e-4)
    least = result["least_capacity"]
    assert result["peak_allocated"] <= least <= result["peak_reserved"]
    assert replay(path, capacity=least)["fits"]
    below = replay(path, capacity=least - 2 * MIB)
    assert not below["fits"] and below["fails"]["message"].startswith("CUDA out of memory. Tried to allocate")
    assert below["fails"]["site"] == "model.py:12 forward"
    assert any("does not fit: CUDA out of memory" in line for line in lines(below))
    ranking = result["ranking"]
    assert [r["peak_reserved"] for r in ranking] == sorted(r["peak_reserved"] for r in ranking)
    expandable = replay(path, conf="expandable_segments:True")
    assert expandable["settings"] == "expandable_segments:True"
    (row,) = [r for r in ranking if r["settings"] == "expandable_segments:True"]
    assert expandable["peak_reserved"] == row["peak_reserved"] < result["peak_reserved"]
    assert row["saves"] == result["peak_reserved"] - row["peak_reserved"]
    assert result["holders"][0]["site"] == "model.py:12 forward"


def test_the_least_capacity_fits_and_two_mib_less_does_not(tmp_path):
    for seed in range(4):
        requests, _ = requests_of(read(write(tmp_path / "s.pickle", recorded(seed).snapshot())))
        for text in ("", "expandable_segments:True"):
            settings = AllocatorSettings.parse(text)
            least = least_capacity(requests, settings)
            assert simulate(requests, settings, least)[0].fits
            assert not simulate(requests, settings, least - 2 * MIB)[0].fits


def test_a_failed_allocation_gives_the_capacity(tmp_path):
    """A GPU of 100 MiB, on which 60 + 30 are reserved and 40 more are asked for."""
    reference = ReferenceAllocator()
    first, second = reference.allocate(60 * MIB), reference.allocate(30 * MIB)
    reference.events.append({"action": "oom", "device_free": 10 * MIB, "size": 40 * MIB, "stream": 0, "frames": FRAMES})
    reference.free(first)
    reference.free(second)
    result = replay(write(tmp_path / "s.pickle", reference.snapshot()))
    assert result["capacity"] == 100 * MIB and not result["fits"] and result["exact"]
    assert result["least_capacity"] == 130 * MIB and result["fails"]["bytes"] == 40 * MIB
    assert any("the GPU had room for 104857600 bytes" in note for note in result["notes"])
    assert replay(tmp_path / "s.pickle", capacity=130 * MIB)["fits"]


def test_a_record_that_is_not_whole_is_not_called_exact(tmp_path):
    reference = recorded(1)
    snapshot = reference.snapshot()
    del snapshot["device_traces"][0][50:90]
    result = replay(write(tmp_path / "s.pickle", snapshot))
    assert not result["exact"] and any(note.startswith("not exact: ") for note in result["notes"])
    reference = recorded(2)
    snapshot = reference.snapshot(len(reference.events) // 2)
    free = next(
        b for s in snapshot["segments"] for b in s["blocks"] if b["state"] == "inactive" and b["size"] > 4 * MIB
    )
    free |= {"state": "active_allocated", "requested_size": free["size"]}  # nobody saw it come or go
    assert not replay(write(tmp_path / "s.pickle", snapshot))["exact"]


def test_expandable_segments_are_followed(tmp_path):
    """By hand: pages of 20 MiB at 1 GiB; 30 MiB take two, the next 15 MiB a third.

    The 15 MiB that are free at the end can grow, so they count as larger than the 30 that were freed.
    """
    at, page = 1 << 30, 20 * MIB

    def event(action, address, size):
        return {"action": action, "addr": address, "size": size, "stream": 0}

    events = [
        event("segment_map", at, 2 * page), event("alloc", at, 30 * MIB),
        event("segment_map", at + 2 * page, page), event("alloc", at + 30 * MIB, 15 * MIB),
        event("free_requested", at, 30 * MIB), event("free_completed", at, 30 * MIB),
        event("alloc", at, 15 * MIB), event("alloc", at + 15 * MIB, 8 * MIB),
    ]  # fmt: skip
    held, free = "active_allocated", "inactive"
    sizes = [(15, held), (8, held), (7, free), (15, held), (15, free)]
    blocks = [{"size": n * MIB, "requested_size": n * MIB, "state": state} for n, state in sizes]
    segment = {"address": at, "total_size": 3 * page, "stream": 0, "segment_type": "large", "is_expandable": True,
               "blocks": blocks}  # fmt: skip
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "expandable_segments": True}
    for first in (0, 2, 4):
        snapshot = {"segments": [segment], "device_traces": [events[first:]], "allocator_settings": settings}
        found = verify(read(write(tmp_path / "s.pickle", snapshot)))
        assert found.exact and found.recorded_peak_reserved == 60 * MIB, (first, found)


def test_the_picture_is_drawn(tmp_path):
    path = write(tmp_path / "s.pickle", recorded(5, 2).snapshot())
    out = tmp_path / "out.png"
    assert main(["memory", "replay", str(path), "--plot", str(out), "--conf", "expandable_segments:True"]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def snapshot_of_two() -> dict:
    one, two = recorded(1).snapshot(), recorded(2).snapshot(device=1)
    return one | {"segments": one["segments"] + two["segments"],
                  "device_traces": [one["device_traces"][0], two["device_traces"][1]]}  # fmt: skip


def with_event(**changes) -> dict:
    snapshot = recorded(1, steps=20).snapshot()
    snapshot["device_traces"][0][3] |= changes
    return snapshot


BAD = {
    "code": (pickle.dumps({"segments": Code()}), "nothing of it was run"),
    "no snapshot": (pickle.dumps([1, 2]), "not what torch.cuda.memory._dump_snapshot writes"),
    "text": (b"hello", "is no memory snapshot"),
    "empty": (b"", "is no memory snapshot"),
    "no history": (pickle.dumps(recorded(1).snapshot() | {"device_traces": [[], []]}), "it has no history"),
    "two GPUs": (pickle.dumps(snapshot_of_two()), "history of GPUs 0, 1: choose one with --device"),
    "unknown action": (pickle.dumps(with_event(action="segment_teleport")), "event 3 is 'segment_teleport'"),
    "no number": (pickle.dumps(with_event(size="big")), "not laid out as a memory snapshot"),
    "negative": (pickle.dumps(with_event(size=-5)), "negative size"),
    "cut short": (gzip.compress(json.dumps({"events": [["alloc", 0, 1, 0]] * 2000}).encode())[:40], "cut short"),
    "cut pickle": (pickle.dumps(recorded(1).snapshot())[:-200], "is no memory snapshot"),
    "cut JSON": (b'{"events": [["alloc", 0', "is no memory snapshot"),
    "no events": (json.dumps({"events": [], "segments_at_end": []}).encode(), "it has no history"),
    "short event": (json.dumps({"events": [["alloc", 0]], "segments_at_end": []}).encode(), "not laid out"),
    "torn segment": (json.dumps({"events": [["alloc", 0, 4, 0]],
                                 "segments_at_end": [[0, 99, 0, "small", [[4, 4, "inactive"]]]]}).encode(), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_snapshot_is_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data, said = BAD[kind]
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        replay("file")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_one_of_two_gpus_is_chosen(tmp_path):
    path = write(tmp_path / "s.pickle", snapshot_of_two())
    assert [replay(path, device=d)["exact"] for d in (0, 1)] == [True, True]
    with pytest.raises(UserError, match="no history of GPU 2, but of 0, 1"):
        replay(path, device=2)
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"events": [["alloc", 0, 4, 0]], "segments_at_end": []}))
    with pytest.raises(UserError, match="of one GPU: leave out --device"):
        replay(trace, device=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--capacity", "1MiB"], "less than the first segment, of 2097152 bytes"),
        (["--capacity", "much"], "is no amount of memory"),
        (["--conf", "expandable:True"], "did you mean expandable_segments"),
        (["--plot", "out.txt"], "no picture is called .txt"),
        (["--device", "3"], "no history of GPU 3"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path, capsys, options, said):
    reference = ReferenceAllocator()
    reference.allocate(100)
    path = write(tmp_path / "s.pickle", reference.snapshot())
    assert main(["memory", "replay", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_missing_file_is_refused():
    with pytest.raises(UserError, match="no snapshot at nowhere.pickle"):
        replay("nowhere.pickle")


TRACES = Path(os.environ.get("DIT_DS_ALLOCATOR_TRACES", "nowhere"))
NOT_WHOLE = "a_medium_512_training"


@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded traces: name their folder in DIT_DS_ALLOCATOR_TRACES")
def test_recorded_gpus_are_followed_to_the_address():
    files = sorted(TRACES.glob("*.json.gz"))
    assert files
    for file in files:
        found = verify(read(file))
        assert found.exact == (not file.name.startswith(NOT_WHOLE)), (file.name, found)
