"""One function over many things in forked processes."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from dit_ds.errors import RunFailed
from dit_ds.files import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
_call: Callable[[Any], Any]
_items: Sequence[Any]


def forked_map(
    call: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int | None,
    label: str,
    size: Callable[[Result], int] = lambda _: 1,
    total: int | None = None,
    unit: str = "shard",
) -> Iterator[Result]:
    """The results in the items' order, with a progress bar.

    Args:
        call, items: inherited by the processes, so they may hold much and are never pickled.
        processes: one a core by default; with 1 all is done in this process.
        size: what a result adds to the bar.
        total: what the bar counts to; by default the items.
        unit: of the bar.
    Raises:
        RunFailed: a process was ended from outside.
    """
    workers = min(processes or usable_cores(), len(items))
    with tqdm(desc=label, total=len(items) if total is None else total, unit=unit, mininterval=1) as bar:
        for result in map(call, items) if workers <= 1 else _in_processes(call, items, workers):
            bar.update(size(result))
            yield result


def _in_processes(call: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    gc.collect()
    gc.freeze()  # the processes' collectors would write to, and so copy, every page of what they inherit
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (call, items))
    try:
        yield from pool.map(_run, range(len(items)))
    except BrokenProcessPool:
        raise RunFailed(
            "a worker process was ended, for want of memory perhaps: run it again, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _start(call: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _call, _items
    _call, _items = call, items
    # Ctrl-C reaches the parent, which lets what is begun be finished
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(k: int) -> Any:
    return _call(_items[k])
