"""A second model of CUDA's caching allocator, as plain as can be: a list of blocks, searched from end to end.

It knows the default rules (streams, two pools, best fit, splitting, merging, empty_cache), and records what it does as
PyTorch's memory snapshots do.
"""

from __future__ import annotations

MIB = 1 << 20


class ReferenceAllocator:
    """`events` and `snapshot()` are as `torch.cuda.memory._snapshot` gives them.

    Args:
        holes: bytes between one segment and the next.
    """

    def __init__(self, holes: int = 0):
        self.blocks: list[dict] = []  # address, size, requested, segment, stream, small, state
        self.segments: dict[int, tuple[int, int, bool]] = {}
        self.events: list[dict] = []
        self.address, self.holes = 0x7F0000000000, holes
        self.peak_reserved = 0

    def _log(self, action: str, address: int, size: int, stream: int, frames: list | None = None) -> None:
        self.events.append({"action": action, "addr": address, "size": size, "stream": stream, "frames": frames or []})

    def allocate(self, requested: int, stream: int = 0, frames: list | None = None) -> int:
        size = max(512, (requested + 511) // 512 * 512)
        small = size <= MIB
        fitting = [b for b in self.blocks if b["state"] == "inactive" and b["stream"] == stream and b["small"] == small
                   and b["size"] >= size]  # fmt: skip
        if not fitting:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            self.segments[self.address] = (segment, stream, small)
            fitting = [{"address": self.address, "size": segment, "segment": self.address, "stream": stream,
                        "small": small, "state": "inactive", "requested": 0}]  # fmt: skip
            self.blocks += fitting
            self._log("segment_alloc", self.address, segment, stream)
            self.address += segment + self.holes
            self.peak_reserved = max(self.peak_reserved, sum(s[0] for s in self.segments.values()))
        best = min(fitting, key=lambda b: (b["size"], b["address"]))
        rest = best["size"] - size
        if rest >= 512 if small else rest > MIB:
            self.blocks.append(best | {"address": best["address"] + size, "size": rest})
            best["size"] = size
        best |= {"state": "active_allocated", "requested": requested, "frames": frames or []}
        self._log("alloc", best["address"], requested, stream, frames)
        return best["address"]

    def request_free(self, address: int) -> None:
        block = next(b for b in self.blocks if b["address"] == address)
        block["state"] = "active_awaiting_free"
        self._log("free_requested", address, block["requested"], block["stream"])

    def complete_free(self, address: int) -> None:
        block = next(b for b in self.blocks if b["address"] == address)
        self._log("free_completed", address, block["requested"], block["stream"])
        block["state"] = "inactive"
        for other in [b for b in self.blocks if b["segment"] == block["segment"] and b["state"] == "inactive"]:
            if other["address"] + other["size"] == block["address"]:
                block["address"], block["size"] = other["address"], other["size"] + block["size"]
                self.blocks.remove(other)
            elif block["address"] + block["size"] == other["address"]:
                block["size"] += other["size"]
                self.blocks.remove(other)

    def free(self, address: int) -> None:
        self.request_free(address)
        self.complete_free(address)

    def empty_cache(self) -> None:
        for block in [b for b in self.blocks if b["state"] == "active_awaiting_free"]:
            self.complete_free(block["address"])
        for block in list(self.blocks):
            size, stream, _ = self.segments[block["segment"]]
            if block["state"] == "inactive" and block["size"] == size:
                self.blocks.remove(block)
                del self.segments[block["segment"]]
                frames = [{"filename": "torch/cuda/memory.py", "line": 1, "name": "empty_cache"}]
                self._log("segment_free", block["segment"], size, stream, frames)

    def snapshot(self, first: int = 0, device: int = 0) -> dict:
        """A memory snapshot whose history begins at the event of this number."""
        segments = []
        for address, (size, stream, small) in sorted(self.segments.items()):
            inside = sorted((b for b in self.blocks if b["segment"] == address), key=lambda b: b["address"])
            blocks = [{"address": b["address"], "size": b["size"], "requested_size": b["requested"], "state": b["state"],
                       "frames": b.get("frames", [])} for b in inside]  # fmt: skip
            segments.append({"device": device, "address": address, "total_size": size, "stream": stream,
                             "segment_type": "small" if small else "large", "segment_pool_id": (0, 0),
                             "is_expandable": False, "blocks": blocks})  # fmt: skip
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False}
        return {"segments": segments, "allocator_settings": settings,
                "device_traces": [[]] * device + [self.events[first:]]}  # fmt: skip
