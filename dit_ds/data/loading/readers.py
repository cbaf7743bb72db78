"""Readers of a sample's members, `read(image, JPG)` and `read(image, JSON)`, checked against the manifest."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import resource
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.data.loading.index import SplitIndex
from dit_ds.errors import UserError
from dit_ds.files import patiently

_PREFETCH = 24  # micro-batches: how early a shard's download starts
_ATTEMPTS = 3  # to read a shard whose stream breaks off
_MAX_IDLE = 1000  # micro-batches: a shard that isn't needed for longer is dropped and downloaded anew


class MemberReader:
    """Reads members of local tars by offset, in any order; nothing is unpacked, and the page cache serves repetitions."""

    def __init__(self, index: SplitIndex):
        self.index = index
        self._files: dict[int, int] = {}
        # half of the process's limit: PyTorch's queues need descriptors, too, and block forever without
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 2)

    def read(self, image: int, member: int) -> bytes:
        """The bytes of one member, JPG or JSON.

        Raises:
            BadSample: they are damaged.
            UserError: the shard is missing, or can't be read; a file system that is away is waited for.
        """
        shard = int(self.index.images[image, 0])
        offset, length, _ = self.index.images[image, member : member + 3].tolist()
        try:
            data = self._pread(shard, length, offset)
        except OSError:
            data = self._pread_patiently(shard, length, offset)
        return self.index.check(image, member, data)

    def _pread_patiently(self, shard: int, length: int, offset: int) -> bytes:
        file = Path(self.index.shards[shard])
        try:
            return patiently(lambda: self._pread(shard, length, offset), file.parent)
        except OSError as e:
            raise UserError(f"cannot read {file} ({e.strerror}): see that it can be reached") from None

    def _pread(self, shard: int, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._open(shard), length, offset)
        except OSError:
            with contextlib.suppress(OSError, KeyError):  # a descriptor can be of no use any more
                os.close(self._files.pop(shard))
            raise

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._max_open:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # file descriptors belong to one process


class StreamReader:
    """Reads whole shards sequentially with `webdataset`: from object stores, web servers and pipes.

    With a plan it downloads shards ahead of time, in threads, and drops them once they aren't needed; without a plan it
    keeps the last shard only.
    """

    def __init__(self, index: SplitIndex):
        self.index = index
        self._shards: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._uses: dict[int, np.ndarray] = {}  # by shard, the micro-batches that need it
        self._pending: list[tuple[int, int]] = []  # (first use, shard) of downloads to start, the next one last
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def plan(self, images: list[np.ndarray]) -> None:
        """Set the images of each micro-batch that this process will read."""
        step = np.repeat(np.arange(len(images)), [len(x) for x in images])
        shard = self.index.images[np.concatenate(images), 0] if len(images) else np.zeros(0, np.int64)
        self._uses = {int(s): np.unique(step[shard == s]) for s in np.unique(shard)}
        self._pending = sorted((int(n[0]), s) for s, n in self._uses.items())[::-1]

    def advance(self, step: int) -> None:
        """Prepare for micro-batch `step` of the plan: drop shards and start downloads."""
        for shard in list(self._shards):
            uses = self._uses.get(shard, np.zeros(0, np.int64))
            later = uses[np.searchsorted(uses, step) :]
            if not len(later) or later[0] - step > _MAX_IDLE:
                del self._shards[shard]
        while self._pending and self._pending[-1][0] <= step + _PREFETCH:
            self._start(self._pending.pop()[1])

    def read(self, image: int, member: int) -> bytes:
        """As `MemberReader.read`.

        Raises:
            BadSample: they are damaged or missing.
            UserError: the shard can't be reached.
        """
        shard = int(self.index.images[image, 0])
        if shard not in self._shards:
            if not self._uses:
                self._shards.clear()
            self._start(shard)
        sample = self._shards[shard].result().get(self.index.key(image), {})
        return self.index.check(image, member, sample.get(self.index.extension(image, member), b""))

    def _start(self, shard: int) -> None:
        self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(4, "shard")
        if shard not in self._shards:
            self._shards[shard] = self._pool.submit(self._fetch, shard)

    def _fetch(self, shard: int) -> dict[str, Any]:
        """The shard's samples by key, as many as can be read; `read` raises for a missing one.

        Raises:
            UserError: not one can be read.
        """
        import webdataset

        file, error = self.index.shards[shard], "it ends early"
        url = str(file.absolute() if isinstance(file, Path) else file)  # webdataset takes "pipe:.." for a command
        most: dict[str, Any] = {}
        expected = np.count_nonzero(self.index.images[:, 0] == shard)
        for _ in range(_ATTEMPTS):
            samples: dict[str, Any] = {}
            try:
                shards = webdataset.SimpleShardList([url])
                for sample in webdataset.DataPipeline(shards, webdataset.tarfile_to_samples()):
                    samples[sample["__key__"]] = sample
            except (OSError, EOFError, ValueError, tarfile.TarError) as e:
                error = " ".join(str(e).split())
            most = max(most, samples, key=len)
            if len(most) >= expected:  # webdataset doesn't report a stream that ends between two members
                return most
        if not most:
            raise UserError(f"cannot read {url} ({error}): see that it can be reached")
        return most

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_pool": None}  # threads belong to one process


def make_reader(index: SplitIndex, streamed: bool) -> MemberReader | StreamReader:
    """The reader for an index's shards."""
    return StreamReader(index) if streamed else MemberReader(index)
