"""A rank's part of a checkpoint: its ranges of the trained parameters as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dit_ds.engine.zero_state import Fragment, TrainingState, digest
from dit_ds.files import sha256_of

CHUNK = 1 << 24  # bytes written, sent and hashed at once
PAGE = 4096  # bytes: memory and places in files that a disk reads and writes directly begin at multiples
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Part = list[tuple[str, Fragment, Tensor]]  # kind, range, its (numel,) values


def live_part(state: TrainingState) -> Part:
    """This rank's part, of the tensors that training updates."""
    return [
        (kind, f, state.tensor(kind, f)) for kind in state.all_kinds() for f in state.saved() if kind in state.kinds(f)
    ]


class HostCopy:
    """A copy of this rank's part in host memory, which is kept from one checkpoint to the next."""

    def __init__(self, state: TrainingState):
        self.state = state
        self._tensors: dict[str, Tensor] = {}

    def take(self) -> Part:
        """Copy the values of now; nobody may read the former ones any more."""
        live = live_part(self.state)
        self._allocate(live)
        part = [(kind, f, self._tensors[_key(kind, f)].copy_(x, non_blocking=True)) for kind, f, x in live]
        if any(x.is_cuda for _, _, x in live):
            torch.cuda.synchronize()
        return part

    def _allocate(self, live: Part) -> None:
        for kind, f, x in live:
            if _key(kind, f) not in self._tensors:
                self._tensors[_key(kind, f)] = torch.empty(f.numel, dtype=x.dtype, pin_memory=x.is_cuda)


class HostImage(HostCopy):
    """A copy that lies in memory as in its file, so that the file is written, and sent, without another copy.

    From host memory it is made behind training's back, by the thread that writes it: forward and backward passes do not
    change what is copied. Before the optimizer does, training copies what is left.

    Attributes:
        image: (bytes,) the file; it begins at a whole page, and so do the values in it.
        waited: seconds for which training has waited for copies since `begin`.
    """

    def __init__(self, state: TrainingState):
        super().__init__(state)
        self.image = torch.empty(0, dtype=torch.uint8)
        self.waited = 0.0
        self._left: deque[tuple[int, Tensor, Tensor]] = deque()  # offset in the image, its tensor, the live one
        self._copying = threading.Lock()
        state.before_change(self._finish)

    def begin(self) -> Part:
        """As `take`, but what lies in host memory is there only after `fill`."""
        start, live = time.perf_counter(), live_part(self.state)
        if any(x.is_cuda for _, _, x in live):
            part = self.take()  # from a GPU a copy is quick
        else:
            self._allocate(live)
            part = [(kind, f, self._tensors[_key(kind, f)]) for kind, f, _ in live]
            left = []
            for (kind, _, to), (_, _, x) in zip(part, live, strict=True):
                if kind in self.state.optimizer.changed_in_backward:
                    _copy(to, x)
                else:
                    left.append((to.data_ptr() - self.image.data_ptr(), to, x))
            self._left.extend(sorted(left, key=lambda c: c[0]))
        self.waited = time.perf_counter() - start
        return part

    def fill(self, end: int | None = None) -> None:
        """Copy all values, or those that begin before this byte of the image, where that is not done."""
        with self._copying:
            while self._left and (end is None or self._left[0][0] < end):
                _copy(*self._left[0][1:])
                self._left.popleft()

    def _finish(self) -> None:
        """Copy what is left, as it is about to change."""
        start = time.perf_counter()
        self.fill()
        self.waited += time.perf_counter() - start

    def _allocate(self, live: Part) -> None:
        if self._tensors.keys() == {_key(kind, f) for kind, f, _ in live}:
            return
        live = sorted(live, key=lambda p: -p[2].element_size())  # stable: values lie at multiples of their size
        head = header(live, PAGE)
        size = len(head) + sum(x.numel() * x.element_size() for _, _, x in live)
        self.image = page_aligned(size, pinned=any(x.is_cuda for _, _, x in live))
        self.image[: len(head)] = torch.frombuffer(head, dtype=torch.uint8)
        at, self._tensors = len(head), {}
        for kind, f, x in live:
            end = at + x.numel() * x.element_size()
            self._tensors[_key(kind, f)] = self.image[at:end].view(x.dtype)
            at = end


def _copy(to: Tensor, x: Tensor) -> None:
    """In this thread alone: PyTorch would start others beside those that train."""
    np.copyto(to.view(torch.uint8).numpy(), x.detach().view(torch.uint8).numpy())


def _key(kind: str, f: Fragment) -> str:
    return f"{kind}/{f.name}"


def page_aligned(size: int, pinned: bool = False) -> Tensor:
    """(size,) uint8 in host memory, not set, from the beginning of a page on."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]


def part_name(rank: int) -> str:
    """The file's name in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def header(part: Part, multiple: int = 8) -> bytearray:
    """What the file begins with: its length and names, types, shapes and places of the values.

    Args:
        multiple: of bytes, which it fills up.
    """
    head: dict[str, Any] = {"__metadata__": {"ranges": json.dumps({f.name: [f.start, f.numel] for _, f, _ in part})}}
    end = 0
    for kind, f, x in part:
        size = x.numel() * x.element_size()
        head[f"{kind}/{f.name}"] = {"dtype": _DTYPES[x.dtype], "shape": [f.numel], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return bytearray(len(text).to_bytes(8, "little") + text)


def chunks(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """`data` in pieces of at most `CHUNK` bytes."""
    return (memoryview(data)[at : at + CHUNK] for at in range(0, len(data), CHUNK))


def values_of(x: Tensor) -> memoryview:
    """The bytes of a tensor in host memory."""
    return memoryview(x.view(torch.uint8).numpy().data)


def write_part(path: Path, part: Part) -> dict[str, Any]:
    """Stream a part to its file, hashed on the way: no copy of all tensors is made.

    Returns:
        `bytes`, `sha256`, and by kind the `digest` of the values.
    """
    digests: dict[str, int] = {}
    with open(path, "wb") as file:
        out = _Hashed(file)
        out.write(header(part))
        for kind, f, x in part:
            x = x.cpu()
            digests[kind] = digests.get(kind, 0) + digest(f.name, f.start, x)
            out.write(values_of(x))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": out.sha.hexdigest(), "digest": digests}


def copy_part(source: BinaryIO, path: Path) -> dict[str, Any]:
    """Copy a part's file.

    Returns:
        `bytes`, `sha256` and `checksum`, see `Checksum`.
    """
    checksum = Checksum()
    with open(path, "wb") as file:
        out = _Hashed(file)
        while data := source.read(CHUNK):
            out.write(data)
            checksum.add(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": out.sha.hexdigest(), "checksum": checksum.value}


class Checksum:
    """A checksum of a file that takes a fraction of the time of a CRC: one of the sums of each page's 8-byte words.

    It changes with any changed word, and with pages that are lost, exchanged or zero.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: bytes | memoryview) -> None:
        """The next `CHUNK` bytes, or the last ones."""
        whole = len(data) // PAGE * PAGE
        words = np.frombuffer(data, dtype=np.uint64, count=whole // 8).reshape(-1, PAGE // 8)
        self.value = zlib.crc32(np.add.reduce(words, axis=1), self.value)  # sums wrap around
        self.value = zlib.crc32(data[whole:], self.value)


class _Hashed:
    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        for piece in chunks(data):
            self.file.write(piece)
            self.sha.update(piece)


def digests_of(path: Path) -> dict[str, int]:
    """By kind the `digest` of the values in a part's file."""
    digests: dict[str, int] = {}
    with safe_open(path, "pt") as file:
        ranges = json.loads(file.metadata()["ranges"])
        for key in file.keys():
            kind, _, name = key.partition("/")
            digests[kind] = digests.get(kind, 0) + digest(name, ranges[name][0], file.get_tensor(key))
    return digests
