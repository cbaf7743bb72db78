"""Pictures for the model, read, cut into tiles and resized by worker processes, each once for all its expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dit_ds.data.loading.loader import Loader
from dit_ds.data.loading.shared_memory import batch_memory, share
from dit_ds.data.loading.workers import worker_init_fn
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import InputMaker, size_of
from dit_ds.evaluation.many.sources import Source
from dit_ds.evaluation.many.tiles import Tiling


@dataclass(frozen=True)
class Cut:
    """How pictures are cut.

    Attributes:
        tile: the side of tiles, in pixels of the picture; None takes every picture whole.
        overlap: of tiles beside each other.
        skip_bad: a picture that can't be read is named, and ends nothing.
    """

    tile: int | None = None
    overlap: int = 0
    skip_bad: bool = False


class PictureDataset(Dataset):
    """A map-style dataset of pictures.

    `dataset[i]` has `image` (tiles, 3, S, S) uint8, `size` (tiles, 2): height and width before padding, `shape`: the
    picture's; and of each expression not done yet its `prompts` and `expressions`, see `InputMaker.prompt` and
    `Source.expressions`. `error` says why a picture is blank. A UserError is returned, not raised, for `iterate` to raise.

    Args:
        source: of the pictures.
        inputs: of the model.
        side: S, of the model's square input, in pixels.
        done: so many expressions, from the first picture's on, are left out.
    """

    def __init__(self, source: Source, inputs: InputMaker, side: int, cut: Cut, done: int = 0):
        self._source, self._inputs, self._side, self._cut = source, inputs, side, cut
        ends = np.cumsum(source.counts)
        self.first = int(np.searchsorted(ends, done, side="right"))  # picture
        self._skipped = done - int(ends[self.first - 1] if self.first else 0)  # of its expressions

    def __len__(self) -> int:
        return len(self._source.counts)

    def __getitem__(self, i: int) -> dict[str, Any] | UserError:
        error = None
        try:
            expressions = self._source.expressions(i)
            pixels = self._source.pixels(i)
        except UserError as e:
            if not self._cut.skip_bad:
                return e
            error, pixels = str(e), np.zeros((1, 1, 3), np.uint8)
        tiling = Tiling(*size_of(pixels), self._cut.tile, self._cut.overlap)
        smalls = [self._inputs.resized(pixels[t.top : t.bottom, t.left : t.right]) for t in tiling.tiles]
        storage, _ = batch_memory(len(smalls) * self._side**2 * 3)
        images = torch.empty(0, dtype=torch.uint8).set_(storage)[: len(smalls) * self._side**2 * 3]
        images = images.view(len(smalls), 3, self._side, self._side).zero_()
        for image, small in zip(images.numpy(), smalls):
            image[:, : small.shape[0], : small.shape[1]] = small.transpose(2, 0, 1)
        chosen = expressions[self._skipped if i == self.first else 0 :]
        original, resized = size_of(pixels), size_of(smalls[0])  # words have no place in the picture
        prompts = [self._inputs.prompt(e["text"], original=original, resized=resized) for e in chosen]
        size = torch.tensor([size_of(s) for s in smalls])
        about = {"shape": size_of(pixels), "prompts": prompts, "expressions": chosen, "error": error, "picture": i}
        return {"image": images, "size": size} | about

    def loader(self, workers: int, timeout: float) -> Loader:
        """A loader of the pictures from `first` on, in order, for `iterate`; arguments as of `make_loader`."""
        few: dict[str, Any] = (
            {"prefetch_factor": 1 if self._cut.tile else 4} if workers else {}
        )  # tiles may take a lot of memory
        pictures = range(self.first, len(self))
        loader = DataLoader(
            self, None, sampler=pictures, num_workers=workers, collate_fn=share, worker_init_fn=worker_init_fn, **few
        )
        return Loader(loader, 1, timeout)
