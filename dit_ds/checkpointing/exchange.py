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
    all ranks together; used by one thread at a time. An error of a connection ends that one at both of its ends; the others
    are used to the end, as ranks wait for what is sent on them. Then `close` it, together.

    Args:
        holders: from `copy_holders`.
    Attributes:
        error: what went wrong first, or "".
    """

    def __init__(self, rank: int, holders: dict[int, int]):
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
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
            self.error = self.error or f"copies to other nodes failed: {e}"

    def close(self) -> None:
        """Leave the group."""
        self._sent.clear()
        with contextlib.suppress(Exception):
            dist.destroy_process_group(self._group)

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
        with self._noting_errors():
            self._sent.append((dist.isend(x, self._to, group=self._group), x))

    def receive(self, rank: int, write: Callable[[memoryview], None]) -> bytes | None:
        """Receive what `rank` sends.

        Args:
            write: called with pieces of `CHUNK` bytes, the last one shorter.
        Returns:
            The record; None after an error.
        """
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
        for work, _ in self._sent:
            with self._noting_errors():
                if work is not None:
                    work.wait()
        self._sent.clear()
