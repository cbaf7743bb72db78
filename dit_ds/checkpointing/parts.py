"""A rank's part of a checkpoint: its ranges of the trained parameters as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from dit_ds.engine.zero_state import Fragment, TrainingState, digest
from dit_ds.files import sha256_of

CHUNK = 1 << 24  # bytes written, sent and hashed at once
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Part = list[tuple[str, Fragment, Tensor]]  # kind, range, its (numel,) values


def live_part(state: TrainingState) -> Part:
    """This rank's part, of the tensors that training updates."""
    return [(kind, f, state.tensor(kind, f)) for kind, f in _saved(state)]


def _saved(state: TrainingState) -> Iterator[tuple[str, Fragment]]:
    return ((kind, f) for kind in state.all_kinds() for f in state.saved() if kind in state.kinds(f))


class HostCopy:
    """A copy of this rank's part in host memory, which is kept from one checkpoint to the next."""

    def __init__(self, state: TrainingState):
        self.state = state
        self._tensors: dict[str, Tensor] = {}

    def take(self) -> Part:
        """Copy the values of now; nobody may read the former ones any more."""
        part = [(kind, f, self._copy(kind, f)) for kind, f in _saved(self.state)]
        if any(x.is_pinned() for _, _, x in part[:1]):
            torch.cuda.synchronize()
        return part

    def _copy(self, kind: str, f: Fragment) -> Tensor:
        live = self.state.tensor(kind, f)
        key = f"{kind}/{f.name}"
        if key not in self._tensors:
            self._tensors[key] = torch.empty(f.numel, dtype=live.dtype, pin_memory=live.is_cuda)
        return self._tensors[key].copy_(live, non_blocking=True)


def part_name(rank: int) -> str:
    """The file's name in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def header(part: Part) -> bytearray:
    """What the file begins with: its length and names, types, shapes and places of the values."""
    head: dict[str, Any] = {"__metadata__": {"ranges": json.dumps({f.name: [f.start, f.numel] for _, f, _ in part})}}
    end = 0
    for kind, f, x in part:
        size = x.numel() * x.element_size()
        head[f"{kind}/{f.name}"] = {"dtype": _DTYPES[x.dtype], "shape": [f.numel], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
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
        `bytes`, `sha256` and `crc32`.
    """
    crc = 0
    with open(path, "wb") as file:
        out = _Hashed(file)
        while data := source.read(CHUNK):
            out.write(data)
            crc = zlib.crc32(data, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": out.sha.hexdigest(), "crc32": crc}


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
