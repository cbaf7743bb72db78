"""Parts of checkpoints sent to other nodes in the background, over a process group of their own."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist

from dit_ds.checkpointing.parts import CHUNK, page_aligned

_TIMEOUT = datetime.timedelta(minutes=10)  # the other node may have many parts to write before it receives


class Exchange:
    """This rank's sending to the rank that keeps its copy, and its receiving from those whose copies it keeps.

    All that is sent is begun before anything is waited for, so that ranks never wait for each other in a circle. Made by
    all ranks together; used by one thread at a time.

    Args:
        holders: from `copy_holders`.
    """

    def __init__(self, rank: int, holders: dict[int, int]):
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._to = holders[rank]
        self.sources = sorted(r for r, holder in holders.items() if holder == rank)
        self._sent: list[tuple[dist.Work | None, torch.Tensor]] = []
        self._buffer = page_aligned(CHUNK)

    def send(self, image: torch.Tensor) -> None:
        """Begin to send (bytes,) uint8, which must stay as they are until `wait`."""
        self._begin(torch.tensor([len(image)]))
        for piece in image.split(CHUNK):
            self._begin(piece)

    def send_record(self, text: bytes) -> None:
        """Begin to send the record of what was sent."""
        self._begin(torch.tensor([len(text)]))
        self._begin(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def _begin(self, x: torch.Tensor) -> None:
        self._sent.append((dist.isend(x, self._to, group=self._group), x))

    def receive(self, rank: int, write: Callable[[memoryview], None]) -> bytes:
        """Receive what `rank` sends.

        Args:
            write: called with pieces of `CHUNK` bytes, the last one shorter.
        Returns:
            The record.
        """
        size = self._number(rank)
        while size > 0:
            piece = self._buffer[:size]
            dist.recv(piece, rank, group=self._group)
            write(memoryview(piece.numpy().data))
            size -= len(piece)
        length = self._number(rank)
        text = torch.empty(length, dtype=torch.uint8)
        dist.recv(text, rank, group=self._group)
        return text.numpy().tobytes()

    def _number(self, rank: int) -> int:
        number = torch.empty(1, dtype=torch.int64)
        dist.recv(number, rank, group=self._group)
        return int(number)

    def wait(self) -> None:
        """Wait until all has been sent."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()
