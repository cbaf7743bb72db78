"""Where a sample's bytes come from: `read(image, JPG)` and `read(image, JSON)`, checked against the manifest."""

from __future__ import annotations

import os
from typing import Any

from dit_ds.data.index import SplitIndex


class MemberReader:
    """Reads members of local tars where they lie, in any order: nothing is unpacked, the page cache does the rest."""

    def __init__(self, index: SplitIndex):
        self.index = index
        self._files: dict[int, int] = {}

    def read(self, image: int, member: int) -> bytes:
        """The bytes of one member, JPG or JSON.

        Raises:
            BadSample: they are not those that were written.
        """
        shard = int(self.index.images[image, 0])
        at, length, _ = (int(x) for x in self.index.images[image, member : member + 3])
        if shard not in self._files:
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        return self.index.check(image, member, os.pread(self._files[shard], length, at))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # descriptors belong to one process
