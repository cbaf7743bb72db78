"""One function over many things in forked processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from dit_ds.files import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
_call: Callable[[Any], Any]


def forked_map(
    call: Callable[[Item], Result], items: Sequence[Item], processes: int | None, label: str
) -> Iterator[Result]:
    """The results in the items' order, with a progress bar.

    Args:
        call: inherited by the processes, so it may hold much and is never pickled.
        processes: one a core by default; with 1 all is done in this process.
    """
    workers = min(processes or usable_cores(), len(items))
    bar = {"desc": label, "total": len(items), "mininterval": 1, "disable": None}
    if workers <= 1:
        yield from tqdm(map(call, items), **bar)
        return
    with multiprocessing.get_context("fork").Pool(workers, _start, (call,)) as pool:
        yield from tqdm(pool.imap(_run, items), **bar)


def _start(call: Callable[[Any], Any]) -> None:
    global _call
    _call = call
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool


def _run(item: Any) -> Any:
    return _call(item)
