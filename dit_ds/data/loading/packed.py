"""Training batches that are finished on the device: what loader workers do of them, which is to decode, and to draw.

A worker decodes each picture once for all its expressions in a batch, leaves it as it is, and draws what the workers of an
`ExpressionDataset` draw. `device_pass.finish_batch` makes of it the batch that those make. All that is large is in one
piece of memory, so that it is written once, and sent as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from dit_ds.data.loading.announce import AnnouncedBatch
from dit_ds.data.loading.batch import stack_rows
from dit_ds.data.loading.dataset import ExpressionDataset, Location
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import JPG, BadSample
from dit_ds.data.loading.packed_layout import ALIGNED
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


@dataclass(slots=True)
class _Row:
    """A sample, made step by step.

    Attributes:
        item, location: which one.
        bad: why it is blank; None: it isn't.
        annotated: its image, without pixels.
        ann_ids: what its expression means.
        kind, side, prompt_rng: as of `ExpressionDataset._draw_kind_and_side`.
        augmentation, text: as drawn.
        weight: in the loss.
        picture: None for zeros.
        size: (h, w), resized.
        target: (n, 2) int32, runs of ones; or (h, w) float32, the shares of a soft mask. None: zeros, or not made yet.
        target_size: of the mask that has these runs: the picture's, or `size` where it is resized already.
        shown: (h, w), what the prompt is drawn from; None where its target is not resized here.
        prompt: as of `ExpressionDataset._prompt`.
    """

    item: Item
    location: Location
    bad: str | None = None
    annotated: DecodedImage | None = None
    ann_ids: Sequence[int] = ()
    kind: str = "text"
    side: int = 0
    prompt_rng: np.random.Generator | None = None
    augmentation: SampledAugmentation = SampledAugmentation()
    text: str = ""
    weight: float = 0.0
    picture: _Picture | None = None
    size: tuple[int, int] = (1, 1)
    target: np.ndarray | None = None
    target_size: tuple[int, int] = (1, 1)
    shown: np.ndarray | None = None
    prompt: dict[str, np.ndarray] = field(default_factory=dict)


class PackedDataset(ExpressionDataset):
    """An `ExpressionDataset` to train on, with the same arguments, whose batches `device_pass.finish_batch` finishes.

    Workers still resize pictures of which `resize_image_fast` takes the mean of areas: as they are, these would take more
    than four times the memory. They resize masks where a point or a box is drawn from them, where the target may vanish,
    and with every `mask_rule` but `half`.

    Everything but pictures is made of several batches at once, where `items` are an `AnnouncedBatch`: decoding leaves
    nothing of that code and its data in the processor's caches.
    """

    _prepared: dict[tuple[Item, ...], _Batch] | None = None  # that were announced

    def __getitems__(self, items: Sequence[Item]) -> dict[str, Any] | UserError:
        """A batch: `packed`, `layout` and `draws` as of `packed_layout`, and all of an `ExpressionDataset`'s but `image`
        and `mask`; a UserError is returned, not raised, as there.
        """
        try:
            batch = self._batch(items)
            memory = _Memory(batch)
            self._for_each(batch.by_image, lambda row: self._decode_to(memory, row.picture))
        except UserError as e:
            return e
        bad = [r.bad for r in batch.by_image if r.bad]
        values = batch.collated() if bad else batch.values
        return {"packed": memory.packed} | values | ({"bad": bad} if self.skip_bad else {})

    def _batch(self, items: Sequence[Item]) -> _Batch:
        """The items' batch, but for pictures."""
        if self._prepared and (batch := self._prepared.pop(tuple(items), None)):
            return batch
        coming: Sequence[Sequence[Item]] = ()
        if isinstance(items, AnnouncedBatch) and self.mask_rule != "soft":  # of which a row takes a megabyte
            coming = items.coming
        try:
            batch, *others = self._prepare([items, *coming])
        except UserError:
            if not coming:
                raise
            return self._prepare([items])[0]  # an error of another batch is raised when that is due
        if coming:
            self._prepared = {tuple(c): other for c, other in zip(coming, others)}
        return batch

    def _prepare(self, batches: Sequence[Sequence[Item]]) -> list[_Batch]:
        """Several batches, but for pictures.

        All rows take a step before any takes the next. Row by row takes twice the time: the steps' code doesn't fit into
        the processor's nearest cache.
        """
        made = [[_Row(item, self._locate(*item[:2])) for item in items] for items in batches]
        rows = _by_image(itertools.chain(*made))
        annotated: dict[int, DecodedImage] = {}
        self._for_each(rows, lambda row: self._annotate(row, annotated))
        self._for_each(rows, self._draw)
        self._make_targets(rows)
        self._for_each(rows, self._make_prompt)
        return [_Batch(r) for r in made]

    def _for_each(self, rows: Sequence[_Row], step: Callable[[_Row], None]) -> None:
        """Take a step of each row that isn't bad; where bad samples are skipped, a `BadSample` makes the row bad."""
        for row in rows:
            if row.bad:
                continue
            try:
                step(row)
            except BadSample as e:
                if not self.skip_bad:
                    raise
                row.bad, row.picture, row.target, row.weight = str(e), None, None, 0.0
                row.augmentation, row.size = SampledAugmentation(), (self.image_size, self.image_size)
                row.prompt = self._blank_prompt(*row.item[:2])

    def _annotate(self, row: _Row, annotated: dict[int, DecodedImage]) -> None:
        image = row.location.image
        if image not in annotated:
            annotated[image] = DecodedImage(self._meta(image), np.empty(0), self.resize, self.mask_rule, fast=True)
        row.annotated = annotated[image]

    def _draw(self, row: _Row) -> None:
        """Everything that is drawn but points, and the sizes."""
        assert row.annotated is not None
        meta, (epoch, sample, row.weight) = row.annotated.meta, row.item
        ref = meta["refs"][self.index.refs[row.location.ref, 1]]
        row.ann_ids = ref["ann_ids"]
        row.kind, row.side, row.prompt_rng = self._draw_kind_and_side(epoch, sample)
        row.augmentation, row.text = self._augmentation_and_text(row.kind, ref, row.location)
        shape = meta["height"], meta["width"]
        row.size = resized_shape(*shape, row.side, self.resize)
        sent = (*row.size, row.side) if takes_area_mean(shape, row.size) else shape
        row.picture = _Picture(row.location.image, *sent)

    def _make_targets(self, rows: Sequence[_Row]) -> None:
        """Each row's target: at full size, where it is plain that resizing leaves something of it."""
        if self.mask_rule == "half":
            # at half the size or more, a resized pixel is made of two neighbouring ones in each direction at most
            self._keep_targets([r for r in rows if r.picture and r.picture.side is None and r.kind == "text"])
        self._for_each([r for r in rows if r.target is None], self._resize_target)

    @staticmethod
    def _keep_targets(rows: Sequence[_Row]) -> None:
        """Set the full-size targets of the rows whose targets don't vanish when they are resized, or are empty."""
        metas = [r.annotated.meta for r in rows if r.annotated is not None]
        of = [(r, meta["anns"][str(a)]["rle"]) for r, meta in enumerate(metas) for a in rows[r].ann_ids]
        runs: list[list[np.ndarray]] = [[] for _ in rows]
        lasts, empty = [False] * len(rows), [True] * len(rows)
        if of:
            masks = MaskRuns([rle for _, rle in of])
            for i, ((r, _), filled, nothing) in enumerate(zip(of, masks.fill_block().tolist(), masks.empty().tolist())):
                runs[r].append(masks[i])
                lasts[r] |= filled
                empty[r] &= nothing
        for r, (row, meta) in enumerate(zip(rows, metas)):
            if lasts[r] or empty[r]:
                row.target = runs[r][0] if len(runs[r]) == 1 else np.concatenate([_NO_RUNS, *runs[r]])
                row.target_size = meta["height"], meta["width"]

    def _resize_target(self, row: _Row) -> None:
        """Set the target as the workers of an `ExpressionDataset` resize it, and what the prompt is drawn from."""
        assert row.annotated is not None
        target = self._target(row.annotated, row.ann_ids, row.location.image, row.kind, row.side)
        if not target.counts:
            row.weight = 0.0
        row.target = target.mask if self.mask_rule == "soft" else encode_ones(target.mask)
        row.target_size, row.shown = row.size, target.shown

    def _make_prompt(self, row: _Row) -> None:
        shown = _UNSEEN if row.shown is None else row.augmentation.apply_mask(row.shown)
        row.prompt = self._prompt(row.kind, row.text, shown, row.prompt_rng)
        row.annotated = row.shown = None  # their memory

    def _decode_to(self, memory: _Memory, picture: _Picture | None) -> None:
        """Decode a picture to the batch's memory, unless it is there."""
        if picture is None or picture in memory.decoded:
            return
        image, _, _, side = picture
        jpg, out = self.reader.read(image, JPG), memory.pixels(picture)
        try:
            if side is None:
                decode_picture(jpg, fast=True, out=out)
            else:
                out[:] = resize_image_fast(decode_picture(jpg, fast=True), side, self.resize)
        except ValueError:
            raise self.index.damaged(image, JPG) from None
        memory.decoded.add(picture)


def _by_image(rows: Iterable[_Row]) -> list[_Row]:
    """An image's rows together."""
    return sorted(rows, key=lambda r: r.location.image)


class _Batch:
    """A batch before any picture is decoded, and what lies where in its memory: first targets, then pictures.

    Attributes:
        by_image: the rows, an image's together.
        targets: their bytes, to follow one another from `ALIGNED` on.
        pictures: the first byte of each.
        length: in bytes.
        values: `collated`.
    """

    def __init__(self, rows: Sequence[_Row]):
        self.by_image, self._rows = _by_image(rows), rows
        self.targets = [r.target.reshape(-1).view(np.uint8) for r in rows if r.target is not None]
        starts = list(itertools.accumulate(map(len, self.targets), initial=ALIGNED))
        end, following = starts[-1], iter(starts)
        self._target_starts = [0 if r.target is None else next(following) for r in rows]
        self.pictures: dict[_Picture, int] = {}
        for picture in (r.picture for r in self.by_image):
            if picture is not None and picture not in self.pictures:
                self.pictures[picture] = start = _aligned(end)
                end = start + picture.height * picture.width * 3
        self.length = _aligned(end)
        self.values = self.collated()

    def collated(self) -> dict[str, Any]:
        """All that is sent beside `packed`; rows without a picture or target have zeros."""
        values = {
            "layout": np.array([self._place(r, t) for r, t in zip(self._rows, self._target_starts)], np.int64),
            "draws": np.array([_drawn(r.augmentation) for r in self._rows], np.float64),
            "size": np.array([r.size for r in self._rows], np.int64),
            "weight": np.array([r.weight for r in self._rows], np.float32),
            "sample": np.array([r.item[1] for r in self._rows], np.int64),
        }
        return {k: torch.from_numpy(v) for k, v in values.items()} | stack_rows([r.prompt for r in self._rows])

    def _place(self, row: _Row, target_start: int) -> tuple[int, ...]:
        """A row of `layout`."""
        if row.picture is None:
            return 0, 1, 1, 0, 0, 1, 1
        runs = 0 if row.target is None else len(row.target)
        height, width = row.picture.height, row.picture.width
        return self.pictures[row.picture], height, width, target_start // 4, runs, *row.target_size


class _Memory:
    """A batch's memory, with its targets.

    Attributes:
        packed: as it is sent.
        decoded: the pictures whose pixels it has.
    """

    def __init__(self, batch: _Batch):
        self.decoded, self._pictures = set[_Picture](), batch.pictures
        storage, _ = batch_memory(-(-batch.length // _GRAIN) * _GRAIN)
        self.packed = torch.empty(0, dtype=torch.uint8).set_(storage)[: batch.length]
        self._bytes = self.packed.numpy()
        self._bytes[:ALIGNED] = 0
        if batch.targets:
            np.concatenate(batch.targets, out=self._bytes[ALIGNED : ALIGNED + sum(map(len, batch.targets))])

    def pixels(self, picture: _Picture) -> np.ndarray:
        """(H, W, 3) uint8, contiguous: where a picture's pixels are to be."""
        start, shape = self._pictures[picture], (picture.height, picture.width, 3)
        return self._bytes[start : start + shape[0] * shape[1] * 3].reshape(shape)


def _drawn(how: SampledAugmentation) -> list[float]:
    """A row of `draws`."""
    weights = [1.0, 0.0, 0.0, 0.0]
    if how.radius is not None:
        kernel = blur_kernel(how.radius)[:, 0].tolist()
        half = kernel[len(kernel) // 2 :]
        weights[: len(half)] = half
    return [*((1.0, 1.0, 1.0) if how.factors is None else how.factors), *weights, float(how.flipped)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
