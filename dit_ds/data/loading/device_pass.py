"""Batches finished on the device: pictures resized, flipped, coloured and blurred, and masks drawn and resized, in one pass.

The pass does what `transforms` does with OpenCV, in the same arithmetic: resizing in fixed point with 11 bits, colours
with 10, blurring in floats. So its masks are the same, and its pictures to one level of 255, on every device. It has no
shape that depends on tensors' values, so it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_ds.data.loading.packed_layout import (
    FACTORS,
    FLIPPED,
    HEIGHT,
    PICTURE,
    RUNS,
    TARGET,
    TARGET_HEIGHT,
    TARGET_WIDTH,
    WEIGHTS,
    WIDTH,
)
from dit_ds.data.loading.transforms import GREY

_REACH = 3  # pixels: of the widest blur, to either side
_RESIZE_BITS, _COLOR_BITS = 11, 10  # of OpenCV's weights
_PIXELS = 1 << 22  # of all squares that are computed at once; each takes some 60 bytes meanwhile


class Chunk(NamedTuple):
    """Rows of a batch that are computed at once.

    Attributes:
        rows: of the batch.
        runs: of ones, of all their targets.
        pixels: of all their targets, as sent.
    """

    rows: slice
    runs: int
    pixels: int


class _Taps(NamedTuple):
    """Bilinear resizing along one axis: the two source positions of each target position, and their weights.

    Attributes:
        low, high: (n, s) int64.
        low_weight, high_weight: (n, s) int32, in 2048ths.
    """

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor


def finish_batch(batch: dict[str, Any], device: torch.device, image_size: int, soft: bool) -> dict[str, Any]:
    """A batch of a `PackedDataset` as `BatchBuilder.collated` describes it, `image` and `mask` on the device.

    Args:
        batch: one that has no `packed` is returned unchanged.
        image_size: S, the side of the padded square, in pixels.
        soft: the dataset's mask rule is soft.
    """
    if "packed" not in batch:
        return batch
    chunks = _chunks(batch["layout"], image_size)
    packed, layout, draws, size = (
        batch[k].to(device, non_blocking=True) for k in ("packed", "layout", "draws", "size")
    )
    image, mask = augment(packed, layout, draws, size, chunks, image_size=image_size, soft=soft)
    rest = {k: v for k, v in batch.items() if k not in ("packed", "layout", "draws")}
    return {"image": image, "mask": mask} | rest


def chunk_rows(image_size: int) -> int:
    """How many rows are computed at once."""
    return max(1, _PIXELS // (image_size + 2 * _REACH) ** 2)


def _chunks(layout: Tensor, image_size: int) -> list[Chunk]:
    step = chunk_rows(image_size)
    runs, pixels = layout[:, RUNS], layout[:, TARGET_HEIGHT] * layout[:, TARGET_WIDTH]
    rows = [slice(first, min(first + step, len(layout))) for first in range(0, len(layout), step)]
    return [Chunk(r, int(runs[r].sum()), int(pixels[r].sum())) for r in rows]


def augment(
    packed: Tensor,
    layout: Tensor,
    draws: Tensor,
    size: Tensor,
    chunks: Sequence[Chunk],
    *,
    image_size: int,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """The pass itself.

    Args:
        packed, layout, draws: as of `packed_layout`.
        size: (B, 2) int64, h and w of the resized pictures.
        chunks: of the rows.
        image_size, soft: as of `finish_batch`.
    Returns:
        Images (B, 3, S, S) uint8 in channels-last memory format, and masks (B, S, S), uint8, or float32 if soft.
    """
    square = (len(layout), image_size, image_size)
    image = torch.empty((*square, 3), dtype=torch.uint8, device=packed.device)
    mask = torch.empty(square, dtype=torch.float32 if soft else torch.uint8, device=packed.device)
    for chunk in chunks:
        place, drawn, shape = layout[chunk.rows], draws[chunk.rows], size[chunk.rows]
        steps = torch.arange(image_size, device=packed.device)
        inside = (steps < shape[:, :1])[:, :, None] & (steps < shape[:, 1:])[:, None]  # (n, S, S)
        image[chunk.rows] = _pictures(packed, place, drawn, shape, image_size) * inside[..., None]
        if soft:
            target = _soft_targets(packed, place, drawn, shape, image_size)
        else:
            target = _targets(_rasterized(packed, place, chunk), place, drawn, shape, image_size)
        mask[chunk.rows] = target * inside
    return image.permute(0, 3, 1, 2), mask


def _pictures(packed: Tensor, place: Tensor, drawn: Tensor, shape: Tensor, side: int) -> Tensor:
    """(n, S, S, 3) uint8, undefined beyond h and w."""
    height, width = shape[:, :1], shape[:, 1:]
    # resized with a margin as OpenCV's blur continues a picture, reflected at its outermost pixels
    steps = torch.arange(-_REACH, side + _REACH, device=packed.device)
    y, x = _reflected(steps, height), _flipped(_reflected(steps, width), width, drawn)
    down = _taps(y, place[:, HEIGHT, None], height)
    across = _taps(x, place[:, WIDTH, None], width)
    row, pixels = place[:, PICTURE, None] // 3, packed.view(-1, 3)

    def resized_across(y: Tensor) -> Tensor:
        start = (row + y * place[:, WIDTH, None])[:, :, None]
        low, high = (_gather(pixels, start + x[:, None]) for x in (across.low, across.high))
        return low * across.low_weight[:, None, :, None] + high * across.high_weight[:, None, :, None]

    resized = _blend(resized_across, down, lambda weight: weight[:, :, None, None])
    colored = _colored(resized, drawn[:, FACTORS], shape, side)
    return _blurred(colored.float(), drawn[:, WEIGHTS].float(), side)


def _targets(plane: Tensor, place: Tensor, drawn: Tensor, shape: Tensor, side: int) -> Tensor:
    """(n, S, S) bool, undefined beyond h and w: masks resized by the rule half, as by `resize_mask_fast`."""
    height, width = shape[:, :1], shape[:, 1:]
    target_height, target_width = place[:, TARGET_HEIGHT, None], place[:, TARGET_WIDTH, None]
    steps = torch.arange(side, device=plane.device)
    x = _flipped(torch.minimum(steps, width - 1), width, drawn)
    # masks are resized transposed, as they lie in memory
    down = _taps(torch.minimum(steps, height - 1), target_height, height)
    across = _taps(x, target_width, width)
    pixels = place[:, TARGET_HEIGHT] * place[:, TARGET_WIDTH]
    first = (pixels.cumsum(0) - pixels)[:, None]

    def resized_down(x: Tensor) -> Tensor:
        start = (first + x * target_height)[:, None]
        low, high = (_gather(plane, start + y[:, :, None]) for y in (down.low, down.high))
        return 255 * (low * down.low_weight[:, :, None] + high * down.high_weight[:, :, None])

    return _blend(resized_down, across, lambda weight: weight[:, None]) > 127


def _soft_targets(packed: Tensor, place: Tensor, drawn: Tensor, shape: Tensor, side: int) -> Tensor:
    """(n, S, S) float32, undefined beyond h and w: soft masks, which are resized already."""
    target_height, target_width = place[:, TARGET_HEIGHT, None], place[:, TARGET_WIDTH, None]
    steps = torch.arange(side, device=packed.device)
    x = _flipped(torch.minimum(steps, shape[:, 1:] - 1), shape[:, 1:], drawn)
    y, x = torch.minimum(steps, target_height - 1), torch.minimum(x, target_width - 1)  # a blank one has one pixel
    index = (place[:, TARGET, None] + y * target_width)[:, :, None] + x[:, None]
    return packed.view(torch.float32).index_select(0, index.flatten()).view(index.shape)


def _rasterized(packed: Tensor, place: Tensor, chunk: Chunk) -> Tensor:
    """(pixels,) uint8: the rows' masks as sent, one after another, each in column-major order."""
    device, counts = packed.device, place[:, RUNS]
    pixels = place[:, TARGET_HEIGHT] * place[:, TARGET_WIDTH]
    # of each run its row, its number there, and with these the place of its two ends
    row = torch.repeat_interleave(torch.arange(len(place), device=device), counts, output_size=chunk.runs)
    number = torch.arange(chunk.runs, device=device) - (counts.cumsum(0) - counts)[row]
    at, shift = place[:, TARGET][row] + 2 * number, (pixels.cumsum(0) - pixels)[row]
    ends, ones = packed.view(torch.int32), torch.ones(chunk.runs, dtype=torch.int32, device=device)
    # how many runs begin less how many end there; annotations may overlap
    change = torch.zeros(chunk.pixels + 1, dtype=torch.int32, device=device)
    change.index_add_(0, ends[at] + shift, ones).index_add_(0, ends[at + 1] + shift, -ones)
    return (change.cumsum(0, dtype=torch.int32)[:-1] > 0).to(torch.uint8)


def _reflected(steps: Tensor, length: Tensor) -> Tensor:
    """(n, s) int64: the pixels that continue n axes of `length`, (n, 1), without repeating the outermost."""
    period = (2 * length - 2).clamp(min=1)
    phase = steps % period
    return torch.minimum(phase, period - phase)


def _flipped(x: Tensor, width: Tensor, drawn: Tensor) -> Tensor:
    return torch.where(drawn[:, FLIPPED, None] > 0, width - 1 - x, x)


def _taps(position: Tensor, source: Tensor, target: Tensor) -> _Taps:
    """The taps of OpenCV's bilinear resizing in bytes; beyond the outermost pixels' centres both are the outermost.

    Args:
        position: (n, s) int64, in the target.
        source, target: (n, 1) int64, pixels along this axis.
    """
    scale = 1 / (target.double() / source.double())
    exact = ((position.double() + 0.5) * scale - 0.5).float()
    whole = exact.floor()
    share, low = exact - whole, whole.long()
    unit = 1 << _RESIZE_BITS
    low_weight, high_weight = ((x * unit).round().int() for x in (1 - share, share))
    low, high = (torch.minimum(x.clamp(min=0), source - 1) for x in (low, low + 1))
    return _Taps(low, high, low_weight, high_weight)


def _gather(source: Tensor, index: Tensor) -> Tensor:
    """int32: `source`, (N,) or (N, 3) uint8, at the positions `index`, (n, s, s)."""
    return source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:]).int()


def _blend(at: Callable[[Tensor], Tensor], taps: _Taps, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """int32 in 0 to 255: OpenCV's second step of a bilinear resizing in bytes (`VResizeLinear`), which rounds as it does.

    Args:
        at: from positions along the second axis to what the first step makes there.
        taps: along the second axis.
        spread: from (n, s) to a shape that broadcasts with it.
    """
    low = ((at(taps.low) >> 4) * spread(taps.low_weight)) >> 16
    high = ((at(taps.high) >> 4) * spread(taps.high_weight)) >> 16
    return (low + high + 2) >> 2


def _colored(pixels: Tensor, factors: Tensor, shape: Tensor, side: int) -> Tensor:
    """(n, s, s, 3) int32: pixels with the factors (n, 3) of `color_matrix`, which has the equations."""
    device = pixels.device
    brightness, contrast, saturation = factors.unbind(1)
    steps = torch.arange(side, device=device)
    height, width = shape[:, :1], shape[:, 1:]
    inside = (steps[::4] < height)[:, :, None] & (steps < width)[:, None]
    sampled = pixels[:, _REACH : _REACH + side : 4, _REACH : _REACH + side]
    mean = (sampled * inside[..., None]).sum((1, 2)) / ((height + 3) // 4 * width).double()
    grey = brightness * sum(weight * mean[:, k] for k, weight in enumerate(GREY))
    faded = torch.stack([(1 - saturation) * weight for weight in GREY], 1)
    kept = saturation[:, None, None] * torch.eye(3, dtype=torch.float64, device=device)
    matrix = (brightness * contrast)[:, None, None] * (kept + faded[:, None])
    unit = 1 << _COLOR_BITS
    matrix, shift = ((x.float() * unit).round().int() for x in (matrix, (1 - contrast) * grey))
    red, green, blue = pixels.unbind(-1)
    matrix, shift = matrix[..., None, None], shift[:, None, None] + unit // 2
    channels = [red * matrix[:, c, 0] + green * matrix[:, c, 1] + blue * matrix[:, c, 2] + shift for c in range(3)]
    return (torch.stack(channels, -1) >> _COLOR_BITS).clamp_(0, 255)


def _blurred(pixels: Tensor, weights: Tensor, side: int) -> Tensor:
    """(n, side, side, 3) uint8: pixels (n, s, s, 3), with a margin of `_REACH`, blurred in both directions.

    Args:
        weights: (n, 4), from the middle on.
    """
    middle, *others = weights[:, :, None, None, None].unbind(1)
    for axis in (2, 1):
        blurred = middle * pixels.narrow(axis, _REACH, side)
        for reach, weight in enumerate(others, 1):
            pair = pixels.narrow(axis, _REACH - reach, side) + pixels.narrow(axis, _REACH + reach, side)
            blurred = blurred.addcmul_(weight, pair)
        pixels = blurred
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
