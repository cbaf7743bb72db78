"""Parts of checkpoints sent to other nodes in the background, over a process group of their own."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dit_ds.checkpointing.parts import CHUNK, page_aligned

_TIMEOUT = datetime.timedelta(minutes=10)  # the other node may have many parts to write before it receives


class Exchange:
    """This rank's sending to the rank that keeps its copy, and its receiving from those whose copies it keeps.

    All that is sent is begun before anything is waited for, so that ranks never wait for each other in a circle. Made by
    all ranks together; used by one thread at a time. After an error of the network it does nothing any more, and its
    connections are closed, so that the other ranks don't wait for it.

    Args:
        holders: from `copy_holders`.
    Attributes:
        error: what went wrong, or "".
    """

    def __init__(self, rank: int, holders: dict[int, int]):
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._to = holders[rank]
        self.sources = sorted(r for r, holder in holders.items() if holder == rank)
        self.error = ""
        self._sent: list[tuple[dist.Work | None, torch.Tensor]] = []
        self._buffer = page_aligned(CHUNK)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # training goes on without copies
            self.close(f"copies to other nodes failed: {e}")

    def close(self, error: str = "") -> None:
        """Leave the group."""
        self.error = self.error or error or "closed"
        self._sent.clear()
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)

    def send_size(self, size: int) -> None:
        """Begin to send the number of bytes that follow."""
        self._begin(torch.tensor([size]))

    def send(self, piece: torch.Tensor) -> None:
        """Begin to send the next `CHUNK` bytes, or the last ones, uint8, which must stay as they are until `wait`."""
        self._begin(piece)

    def send_record(self, text: bytes) -> None:
        """Begin to send the record of what was sent."""
        self.send_size(len(text))
        self._begin(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def _begin(self, x: torch.Tensor) -> None:
        if self._group is None:
            return
        with self._noting_errors():
            self._sent.append((dist.isend(x, self._to, group=self._group), x))

    def receive(self, rank: int, write: Callable[[memoryview], None]) -> bytes | None:
        """Receive what `rank` sends.

        Args:
            write: called with pieces of `CHUNK` bytes, the last one shorter.
        Returns:
            The record; None after an error.
        """
        if self._group is None:
            return None
        with self._noting_errors():
            size = self._number(rank)
            while size > 0:
                piece = self._buffer[:size]
                dist.recv(piece, rank, group=self._group)
                write(memoryview(piece.numpy().data))
                size -= len(piece)
            text = torch.empty(self._number(rank), dtype=torch.uint8)
            dist.recv(text, rank, group=self._group)
            return text.numpy().tobytes()
        return None

    def _number(self, rank: int) -> int:
        number = torch.empty(1, dtype=torch.int64)
        dist.recv(number, rank, group=self._group)
        return int(number)

    def wait(self) -> None:
        """Wait until all has been sent."""
        with self._noting_errors():
            for work, _ in self._sent:
                if work is not None:
                    work.wait()
            self._sent.clear()
