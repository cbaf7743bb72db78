"""Pictures for the model, read, cut into tiles and resized by worker processes, each once for all its expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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


class ReadPicture(NamedTuple):
    """A picture with its expressions that are not answered yet.

    Attributes:
        number: of the picture in the source.
        shape: its height and width.
        first: row of its first tile in the chunk; the others follow.
        tiles: their number.
        expressions, prompts: of each expression, see `Source.expressions` and `InputMaker.prompt`.
        error: why it can't be read; it is blank then.
    """

    number: int
    shape: tuple[int, int]
    first: int
    tiles: int
    expressions: list[dict[str, Any]]
    prompts: list[dict[str, np.ndarray]]
    error: str | None


class PictureDataset(Dataset):
    """A map-style dataset of chunks of pictures.

    `dataset[i]` has `image` (tiles, 3, S, S) uint8, `size` (tiles, 2): height and width before padding, and `pictures`:
    a list of `ReadPicture`. A UserError is returned, not raised, for `iterate` to raise.

    Args:
        source: of the pictures.
        inputs: of the model.
        side: S, of the model's square input, in pixels.
        batch_size: of the model; a chunk has about as many expressions, or with tiles a single picture.
        done: so many expressions, from the first picture's on, are left out.
    """

    def __init__(self, source: Source, inputs: InputMaker, side: int, cut: Cut, *, batch_size: int, done: int = 0):
        self._source, self._inputs, self._side, self._cut = source, inputs, side, cut
        ends = np.cumsum(source.counts)
        self._first = int(np.searchsorted(ends, done, side="right"))  # picture
        self._skipped = done - int(ends[self._first - 1] if self._first else 0)  # of its expressions
        left = np.arange(self._first, len(ends))
        starts = (ends - source.counts)[self._first :] // (1 if cut.tile else batch_size)
        self._chunks = np.split(left, np.flatnonzero(np.diff(starts)) + 1)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, i: int) -> dict[str, Any] | UserError:
        pictures: list[ReadPicture] = []
        smalls: list[np.ndarray] = []  # of all tiles, (h, w, 3) each
        for number in self._chunks[i].tolist():
            try:
                picture, tiles = self._read(number, len(smalls))
            except UserError as e:
                return e
            pictures.append(picture)
            smalls += tiles
        length = len(smalls) * 3 * self._side**2
        storage, _ = batch_memory(length)
        images = torch.empty(0, dtype=torch.uint8).set_(storage)[:length].view(-1, 3, self._side, self._side).zero_()
        for image, small in zip(images.numpy(), smalls):
            image[:, : small.shape[0], : small.shape[1]] = small.transpose(2, 0, 1)
        return {"image": images, "size": torch.tensor([size_of(s) for s in smalls]), "pictures": pictures}

    def _read(self, number: int, first: int) -> tuple[ReadPicture, list[np.ndarray]]:
        """A picture, and its tiles as the model sees them."""
        expressions = self._source.expressions(number)[self._skipped if number == self._first else 0 :]
        error = None
        try:
            pixels = self._source.pixels(number)
        except UserError as e:
            if not self._cut.skip_bad:
                raise
            error, pixels = str(e), np.zeros((1, 1, 3), np.uint8)
        shape = size_of(pixels)
        tiling = Tiling(*shape, self._cut.tile, self._cut.overlap)
        smalls = [self._inputs.resized(pixels[t.top : t.bottom, t.left : t.right]) for t in tiling.tiles]
        # words have no place in the picture, so that the sizes say nothing
        prompts = [self._inputs.prompt(e["text"], original=shape, resized=shape) for e in expressions]
        about: dict[str, Any] = {"expressions": expressions, "prompts": prompts, "error": error}
        return ReadPicture(number, shape, first, len(smalls), **about), smalls

    def loader(self, workers: int, timeout: float) -> Loader:
        """A loader of the chunks, in order, for `iterate`; arguments as of `make_loader`."""
        ahead = (1 if self._cut.tile else 4) if workers else None  # a picture's tiles may take a lot of memory
        options: dict[str, Any] = {"prefetch_factor": ahead, "collate_fn": share, "worker_init_fn": worker_init_fn}
        return Loader(DataLoader(self, batch_size=None, num_workers=workers, **options), 1, timeout)
