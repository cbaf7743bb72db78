"""Memory that batches travel in comes back when it is no longer used, and not before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dit_ds.data.loading import shared_memory
from dit_ds.data.loading.batch import BatchBuilder
from dit_ds.data.loading.loader import Loader, iterate
from dit_ds.data.loading.shared_memory import _SLOTS, batch_memory, share

_ROWS, _SIDE, _STEPS = 2, 32, 40


class Numbered(torch.utils.data.Dataset):
    """Batch n is filled with n, and tells where it was written."""

    def __len__(self) -> int:
        return _STEPS

    def __getitems__(self, items: list[int]) -> dict:
        batch = BatchBuilder(_ROWS, _SIDE)
        for row in range(_ROWS):
            n, height = items[0], 8 + (items[0] + row) % 20
            batch.put(row, lambda pixels, n=n: pixels.fill(n), np.full((height, 16), n, np.uint8), n=np.int64(n))
        made = batch.collated()
        return made | {"address": [made["image"].data_ptr()]}


def batches(workers: int = 1):
    order = [[n] for n in range(1, _STEPS)]
    return DataLoader(Numbered(), batch_sampler=order, num_workers=workers, collate_fn=share)


def check(batch: dict, n: int) -> None:
    for row, (height, width) in enumerate(batch["size"].tolist()):
        for array in (batch["image"][row].permute(1, 2, 0), batch["mask"][row]):
            assert (array[:height, :width] == n).all() and array.sum() == array[:height, :width].sum()
    assert batch["n"].tolist() == [n] * _ROWS


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_kept_is_never_overwritten(workers):
    """All batches, every third one's mask alone, or a view in numpy of one: the memory is the same."""
    for keep in (
        lambda n, b: b,
        lambda n, b: b["mask"] if n % 3 == 0 else None,
        lambda n, b: b["image"].numpy()[0, 0] if n % 5 == 0 else None,
    ):
        kept = [(n, keep(n, b), b["size"]) for n, b in enumerate(batches(workers), 1)]
        assert len(kept) == _STEPS - 1
        for n, what, size in kept:
            if isinstance(what, dict):
                check(what, n)
            elif what is not None:
                plane = torch.as_tensor(what[0] if what.ndim == 3 else what)
                height, width = size[0].tolist()
                assert (plane[:height, :width] == n).all() and plane.sum() == n * height * width


def test_what_is_dropped_is_used_again_and_clean():
    addresses = set()
    for n, batch in enumerate(batches(), 1):
        check(batch, n)
        addresses.update(batch["address"])
    assert len(addresses) <= _SLOTS


class Ragged(torch.utils.data.Dataset):
    """Batch n is n bytes of a size that changes, and grows."""

    def __len__(self) -> int:
        return _STEPS

    def __getitems__(self, items: list[int]) -> dict:
        n, size = items[0], 1000 * (1 + items[0] % 7) + 100 * items[0]
        memory = torch.empty(0, dtype=torch.uint8).set_(batch_memory(size)[0])[:size]
        memory.fill_(n)
        return {"packed": memory, "kept": memory[: size // 8 * 8].view(torch.int16), "n": np.int64(n)}


@pytest.mark.parametrize("persistent", [True, False])
def test_memory_of_any_size_is_sent_once_and_given_back(persistent):
    """Also over several epochs, some left early, while batches are kept."""
    order = [[n] for n in range(1, _STEPS)]
    loader = DataLoader(
        Ragged(), batch_sampler=order, num_workers=2, collate_fn=share, persistent_workers=persistent
    )  # fmt: skip
    kept = []
    for epoch in range(3):
        batches = iterate(Loader(loader, 1, 60))
        for i, batch in enumerate(batches, 1):
            assert batch["n"] == i and (batch["packed"] == i).all() and (batch["kept"] == i * 257).all()
            kept += [(i, batch["kept"])] if i % 3 == 0 else []
            if epoch == 1 and i == 20:
                batches.close()
                break
        assert bool(shared_memory._pools) == persistent
    assert len(kept) == 13 + 6 + 13 and all((values == n * 257).all() for n, values in kept)
    del loader
    shared_memory._pools.clear()
