"""Training batches that are finished on the device: what loader workers do of them, which is to decode, and to draw.

A worker decodes each picture once for all its expressions in a batch, leaves it as it is, and draws what the workers of an
`ExpressionDataset` draw. `device_pass.finish_batch` makes of it the batch that those make. All that is large is in one
piece of memory, so that it is written once, and sent as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dit_ds.data.loading.batch import stack_rows
from dit_ds.data.loading.dataset import ExpressionDataset, Location
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import JPG, BadSample
from dit_ds.data.loading.packed_layout import ALIGNED, FACTORS, FLIPPED, WEIGHTS
from dit_ds.data.loading.sampler import Item
from dit_ds.data.loading.shared_memory import batch_memory
from dit_ds.data.loading.transforms import (
    SampledAugmentation,
    blur_kernel,
    resize_image_fast,
    resized_shape,
    takes_area_mean,
)
from dit_ds.data.mask_runs import MaskRuns, encode_ones
from dit_ds.data.picture import decode_picture
from dit_ds.errors import UserError

_UNCHANGED = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float64)  # a row of `draws`
_NO_RUNS = np.zeros((0, 2), np.int32)
_UNSEEN = np.zeros((1, 1), np.uint8)  # in place of the mask that a prompt is drawn from, where it is text
_GRAIN = 1 << 22  # bytes: memory is taken in multiples, so that a later batch, a little larger, fits in it


class _Picture(NamedTuple):
    """An image as it is sent.

    Attributes:
        image: its number in the index.
        height, width: of what is sent.
        side: it is resized to this longer side before it is sent; None: it isn't.
    """

    image: int
    height: int
    width: int
    side: int | None = None


class _Meant(NamedTuple):
    """What a sample's expression means: the arguments of `ExpressionDataset._target`."""

    image: DecodedImage
    number: int
    ann_ids: Sequence[int]
    kind: str
    side: int


class _Row(NamedTuple):
    """A sample.

    Attributes:
        picture: None for zeros.
        size: (h, w), resized.
        values: the others, as of `BatchBuilder.put`.
        meant: None for nothing.
        target: (n, 2) int32, runs of ones; or (h, w) float32, the shares of a soft mask. None: not made yet.
        target_size: of the mask that has these runs: the picture's, or `size` where it is resized already.
    """

    picture: _Picture | None
    size: tuple[int, int]
    augmentation: SampledAugmentation
    values: dict[str, Any]
    meant: _Meant | None = None
    target: np.ndarray | None = None
    target_size: tuple[int, int] = (1, 1)


class PackedDataset(ExpressionDataset):
    """An `ExpressionDataset` to train on, with the same arguments, whose batches `device_pass.finish_batch` finishes.

    Workers still resize pictures of which `resize_image_fast` takes the mean of areas: as they are, these would take more
    than four times the memory. They resize masks where a point or a box is drawn from them, where the target may vanish,
    and with every `mask_rule` but `half`.
    """

    def __getitems__(self, items: Sequence[Item]) -> dict[str, Any] | UserError:
        """A batch: `packed`, `layout` and `draws` as of `packed_layout`, and all of an `ExpressionDataset`'s but `image`
        and `mask`; a UserError is returned, not raised, as there.
        """
        locations = [self._locate(epoch, sample) for epoch, sample, _ in items]
        order = sorted(range(len(items)), key=lambda r: locations[r].image)  # an image's rows together
        bad: dict[int, str] = {}

        def unless_bad(row: int, make: Callable[..., _Row], *arguments: Any) -> _Row:
            try:
                return make(*arguments)
            except BadSample as e:
                if not self.skip_bad:
                    raise
                bad[row] = str(e)
                return self._blank_row(*items[row][:2])

        try:
            rows = self._with_targets({r: unless_bad(r, self._row, items[r], locations[r]) for r in order})
            memory = _Memory(list(rows.values()))
            rows = {r: unless_bad(r, self._decode_to, memory, rows[r]) for r in order}
        except UserError as e:
            return e
        batch = memory.collated([rows[r] for r in range(len(items))])
        return batch | ({"bad": [bad[r] for r in order if r in bad]} if self.skip_bad else {})

    def _row(self, item: Item, location: Location) -> _Row:
        """A sample, but for its picture's pixels, and for its target where that is not resized here."""
        epoch, sample, weight = item
        kind, side, prompt_rng = self._draw_kind_and_side(epoch, sample)
        image = self._annotated(location.image)
        ref = image.meta["refs"][self.index.refs[location.ref, 1]]
        shape = image.meta["height"], image.meta["width"]
        size = resized_shape(*shape, side, self.resize)
        shrinks = takes_area_mean(shape, size)
        picture = _Picture(location.image, *size, side) if shrinks else _Picture(location.image, *shape)
        augmentation, text = self._augmentation_and_text(kind, ref, location)
        meant = _Meant(image, location.image, ref["ann_ids"], kind, side)
        row = _Row(picture, size, augmentation, self._values(sample, weight), meant)
        shown = _UNSEEN
        if kind != "text" or self.mask_rule != "half" or shrinks:
            row, shown = self._with_resized_target(row)
        row.values.update(self._prompt(kind, text, augmentation.apply_mask(shown), prompt_rng))
        return row

    def _with_targets(self, rows: dict[int, _Row]) -> dict[int, _Row]:
        """The rows, each with a target: at full size, where it is plain that resizing leaves something of it."""
        waiting = {r: row.meant for r, row in rows.items() if row.target is None and row.meant is not None}
        whole: dict[int, list[np.ndarray]] = {r: [] for r in waiting}
        # at half the size or more, a resized pixel is made of two neighbouring ones in each direction at most
        lasts, empty = dict.fromkeys(waiting, False), dict.fromkeys(waiting, True)
        if of := [(r, a) for r, meant in waiting.items() for a in meant.ann_ids]:
            runs = MaskRuns([waiting[r].image.meta["anns"][str(a)]["rle"] for r, a in of])
            for i, ((r, _), filled, nothing) in enumerate(zip(of, runs.fill_block().tolist(), runs.empty().tolist())):
                whole[r].append(runs[i])
                lasts[r] |= filled
                empty[r] &= nothing
        for r, meant in waiting.items():
            if lasts[r] or empty[r]:
                size = meant.image.meta["height"], meant.image.meta["width"]
                ones = whole[r][0] if len(whole[r]) == 1 else np.concatenate([_NO_RUNS, *whole[r]])
                rows[r] = rows[r]._replace(target=ones, target_size=size)
            else:
                rows[r], _ = self._with_resized_target(rows[r])
        return rows

    def _with_resized_target(self, row: _Row) -> tuple[_Row, np.ndarray]:
        """The row with its target as the workers of an `ExpressionDataset` resize it, and what its prompt is drawn from."""
        meant = row.meant
        assert meant is not None
        target = self._target(meant.image, meant.ann_ids, meant.number, meant.kind, meant.side)
        if not target.counts:
            row.values["weight"] = np.float32(0)
        sent = target.mask if self.mask_rule == "soft" else encode_ones(target.mask)
        return row._replace(target=sent, target_size=row.size), target.shown

    def _blank_row(self, epoch: int, sample: int) -> _Row:
        square = self.image_size, self.image_size
        return _Row(None, square, SampledAugmentation(), self._blank_values(epoch, sample))

    def _annotated(self, image: int) -> DecodedImage:
        """The image without its pixels, for its masks."""
        if self._last is None or self._last[0] != image:
            self._last = image, DecodedImage(self._meta(image), np.empty(0), self.resize, self.mask_rule, fast=True)
        return self._last[1]

    def _decode_to(self, memory: _Memory, row: _Row) -> _Row:
        """The row, once its picture's pixels are in the batch's memory."""
        if row.picture is None or row.picture in memory.decoded:
            return row
        image, _, _, side = row.picture
        jpg, out = self.reader.read(image, JPG), memory.pixels(row.picture)
        try:
            if side is None:
                decode_picture(jpg, fast=True, out=out)
            else:
                out[:] = resize_image_fast(decode_picture(jpg, fast=True), side, self.resize)
        except ValueError:
            raise self.index.damaged(image, JPG) from None
        memory.decoded.add(row.picture)
        return row


class _Memory:
    """A batch's `packed`, with the rows' targets.

    Attributes:
        decoded: the pictures whose pixels it has.
    """

    def __init__(self, rows: Sequence[_Row]):
        self.decoded: set[_Picture] = set()
        self._pictures: dict[_Picture, int] = {}  # the first byte of each
        self._targets: dict[int, int] = {}  # by the array's id
        end = ALIGNED
        for picture in (r.picture for r in rows):
            if picture is not None and picture not in self._pictures:
                self._pictures[picture] = end
                end += _aligned(picture.height * picture.width * 3)
        targets = [r.target for r in rows if r.target is not None]
        for target in targets:
            self._targets[id(target)] = end
            end += target.nbytes
        end = _aligned(end)
        storage, _ = batch_memory(-(-end // _GRAIN) * _GRAIN)
        self._packed = torch.empty(0, dtype=torch.uint8).set_(storage)[:end]
        self._bytes = self._packed.numpy()
        self._bytes[:ALIGNED] = 0
        for target in targets:
            start = self._targets[id(target)]
            self._bytes[start : start + target.nbytes] = target.reshape(-1).view(np.uint8)

    def pixels(self, picture: _Picture) -> np.ndarray:
        """(H, W, 3) uint8, contiguous: where a picture's pixels are to be."""
        start, shape = self._pictures[picture], (picture.height, picture.width, 3)
        return self._bytes[start : start + shape[0] * shape[1] * 3].reshape(shape)

    def collated(self, rows: Sequence[_Row]) -> dict[str, Any]:
        """The batch; rows without a picture or target have zeros."""
        layout = np.zeros((len(rows), 7), np.int64)
        draws = np.tile(_UNCHANGED, (len(rows), 1))
        for row, place, drawn in zip(rows, layout, draws):
            if row.picture is None:
                place[:] = 0, 1, 1, 0, 0, 1, 1
            else:
                target = row.target
                place[:3] = self._pictures[row.picture], row.picture.height, row.picture.width
                place[3:] = self._targets[id(target)] // 4, 0 if target is None else len(target), *row.target_size
            how = row.augmentation
            if how.factors is not None:
                drawn[FACTORS] = how.factors
            if how.radius is not None:
                kernel = blur_kernel(how.radius)[:, 0]
                half = kernel[len(kernel) // 2 :]
                drawn[WEIGHTS][: len(half)] = half
            drawn[FLIPPED] = how.flipped
        values = stack_rows([{"size": np.array(row.size)} | row.values for row in rows])
        placed = {"layout": torch.from_numpy(layout), "draws": torch.from_numpy(draws)}
        return {"packed": self._packed} | placed | values


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
