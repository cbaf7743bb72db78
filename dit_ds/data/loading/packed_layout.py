"""What lies where in a batch that is finished on the device, as loader workers send it.

`packed` (N,) uint8 holds pictures of any size, (H, W, 3) each, and targets: runs of ones, (n, 2) int32 as of
`runs_of_ones`, or of soft masks shares, (h, w) float32. `layout` (B, 7) int64 and `draws` (B, 8) float64 have a row for
each sample; samples may share a picture. N is a multiple of `ALIGNED`, and so is where each picture begins. The first
`ALIGNED` bytes are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# columns of `layout`: the picture's first byte and its size; where the target begins, in units of 4 bytes, how many runs
# of ones it has, and the size of the mask that they make
PICTURE, HEIGHT, WIDTH, TARGET, RUNS, TARGET_HEIGHT, TARGET_WIDTH = range(7)
# columns of `draws`: factors of brightness, contrast and saturation; a blur's weights from the middle on; 1 if flipped
FACTORS, WEIGHTS, FLIPPED = slice(0, 3), slice(3, 7), 7
ALIGNED = 192  # bytes: a multiple of a pixel's 3, of 4, and of a cache line


def shift_layouts(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches whose `layout` tells where everything is once their `packed` are concatenated."""
    shifted, start = [], 0
    for batch in batches:
        layout = batch["layout"].clone()
        layout[:, PICTURE] += start
        layout[:, TARGET] += start // 4
        shifted.append(batch | {"layout": layout})
        start += len(batch["packed"])
    return shifted
