"""Where a sample's bytes come from: `read(image, JPG)` and `read(image, JSON)`, checked against the manifest."""

from __future__ import annotations

import concurrent.futures
import os
import resource
import sys
import tarfile
from typing import Any

import numpy as np

from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.errors import UserError

_AHEAD = 24  # micro-batches before the one that needs it, a shard is begun to be read
_TRIES = 3  # of reading a shard that breaks off
_FORGET = 1000  # micro-batches without need of it, after which a shard is read again rather than kept


class MemberReader:
    """Reads members of local tars where they lie, in any order: nothing is unpacked, the page cache does the rest."""

    def __init__(self, index: SplitIndex):
        self.index = index
        self._files: dict[int, int] = {}
        # half of what a process may open: torch's queues take some, too, and wait for ever without
        may_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = sys.maxsize if may_open == resource.RLIM_INFINITY else max(1, may_open // 2)

    def read(self, image: int, member: int) -> bytes:
        """The bytes of one member, JPG or JSON.

        Raises:
            BadSample: they are not those that were written.
            UserError: the shard is gone, or can't be read.
        """
        shard = int(self.index.images[image, 0])
        at, length, _ = (int(x) for x in self.index.images[image, member : member + 3])
        try:
            data = os.pread(self._open(shard), length, at)
        except OSError as e:
            raise UserError(
                f"cannot read {self.index.shards[shard]} ({e.strerror}): see that it can be reached"
            ) from None
        return self.index.check(image, member, data)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._most:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # descriptors belong to one process


class StreamReader:
    """Reads whole shards from front to back with `webdataset`: from object stores, web servers and pipes.

    Given a plan it reads shards before they are needed, in the background, and drops them when they no longer are;
    without one it keeps the last shard.
    """

    def __init__(self, index: SplitIndex):
        self.index = index
        self._shards: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._needs: dict[int, np.ndarray] = {}  # by shard, the micro-batches that need it
        self._upcoming: list[tuple[int, int]] = []  # first need and shard of those not begun, the next one last
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def plan(self, images: list[np.ndarray]) -> None:
        """Announce the images that each micro-batch of this process needs."""
        step = np.repeat(np.arange(len(images)), [len(x) for x in images])
        shard = self.index.images[np.concatenate(images), 0] if len(images) else np.zeros(0, np.int64)
        self._needs = {int(s): np.unique(step[shard == s]) for s in np.unique(shard)}
        self._upcoming = sorted((int(n[0]), s) for s, n in self._needs.items())[::-1]

    def at(self, step: int) -> None:
        """Micro-batch `step` of the plan comes next."""
        for shard in list(self._shards):
            needs = self._needs.get(shard, np.zeros(0, np.int64))
            later = needs[np.searchsorted(needs, step) :]
            if not len(later) or later[0] - step > _FORGET:
                del self._shards[shard]
        while self._upcoming and self._upcoming[-1][0] <= step + _AHEAD:
            self._begin(self._upcoming.pop()[1])

    def read(self, image: int, member: int) -> bytes:
        """As `MemberReader.read`.

        Raises:
            BadSample: they are not those that were written, or not there.
            UserError: the shard can't be reached.
        """
        shard = int(self.index.images[image, 0])
        if shard not in self._shards:
            if not self._needs:
                self._shards.clear()
            self._begin(shard)
        sample = self._shards[shard].result().get(self.index.key(image), {})
        return self.index.check(image, member, sample.get("jpg" if member == JPG else "json", b""))

    def _begin(self, shard: int) -> None:
        self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(4, "shard")
        if shard not in self._shards:
            self._shards[shard] = self._pool.submit(self._fetch, shard)

    def _fetch(self, shard: int) -> dict[str, Any]:
        """The shard's samples by key, as far as it can be read: what is missing is said of the sample that needs it."""
        import webdataset

        url, most, error = str(self.index.shards[shard]), {}, "it ends early"
        whole = np.count_nonzero(self.index.images[:, 0] == shard)
        for _ in range(_TRIES):
            samples: dict[str, Any] = {}
            try:
                shards = webdataset.SimpleShardList([url])
                for sample in webdataset.DataPipeline(shards, webdataset.tarfile_to_samples()):
                    samples[sample["__key__"]] = sample
            except (OSError, EOFError, ValueError, tarfile.TarError) as e:
                error = " ".join(str(e).split())
            most = max(most, samples, key=len)
            if len(most) >= whole:  # webdataset says nothing of a stream that ends between two members
                return most
        if not most:
            raise UserError(f"cannot read {url} ({error}): see that it can be reached")
        return most

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_pool": None}  # threads belong to one process


def make_reader(index: SplitIndex, streamed: bool) -> MemberReader | StreamReader:
    """What reads the samples of an index."""
    return StreamReader(index) if streamed else MemberReader(index)
