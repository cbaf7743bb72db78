"""Map a function over a sequence in forked worker processes."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dit_ds.data.progress import progress_bar
from dit_ds.errors import RunFailed
from dit_ds.processes import die_with_parent, usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
_call: Callable[[Any], Any]  # in a worker process: set by `_init_worker`
_items: Sequence[Any]


def forked_map(
    call: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int | None,
    label: str,
    *,
    size: Callable[[Result], int] = lambda _: 1,
    total: int | None = None,
    unit: str = "shard",
) -> Iterator[Result]:
    """Yield `call(item)` for each item, in the items' order, with a progress bar.

    Args:
        call, items: inherited through the fork and never pickled, so they may be large.
        processes: number of workers, by default one a core; with 1 everything runs in this process.
        label: shown before the progress bar.
        size: by how much a result advances the bar.
        total: the bar's total; by default the number of items.
        unit: the bar's unit.
    Raises:
        RunFailed: a worker process was killed.
    """
    workers = min(processes or usable_cores(), len(items))
    results = map(call, items) if workers <= 1 else _map_in_workers(call, items, workers)
    with progress_bar(desc=label, total=len(items) if total is None else total, unit=unit, mininterval=1) as bar:
        for result in results:
            bar.update(size(result))
            yield result


def _map_in_workers(call: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    gc.collect()
    gc.freeze()  # else garbage collection in the workers would write to, and so copy, every inherited page
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _init_worker, (call, items))
    try:
        yield from pool.map(_call_item, range(len(items)))
    except BrokenProcessPool:
        raise RunFailed(
            "a worker process was ended, for want of memory perhaps: run it again, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _init_worker(call: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _call, _items
    _call, _items = call, items
    die_with_parent()
    # Ctrl-C is handled by the parent, which waits for the items that are being worked on
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call_item(i: int) -> Any:
    return _call(_items[i])
