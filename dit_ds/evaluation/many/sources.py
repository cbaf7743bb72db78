"""Where pictures and their expressions come from: files and a list of texts, or the shards of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, JSON
from dit_ds.data.picture import decode_picture, read_picture
from dit_ds.data.picture_texts import PictureTexts


class Source(Protocol):
    """Pictures with expressions; it goes to the loader's processes.

    Attributes:
        counts: (pictures,) int64, the expressions of each.
        request: what tells it from another.
        generalized: there may be expressions without a target.
    """

    counts: np.ndarray
    request: dict[str, Any]
    generalized: bool

    def pixels(self, picture: int) -> np.ndarray:
        """(H, W, 3) uint8.

        Raises:
            UserError: it can't be read.
        """

    def expressions(self, picture: int) -> list[dict[str, Any]]:
        """What a result says of each of its expressions: `image_id`, `image`, its file's name, `text`, and ids."""


class FileSource:
    """Pictures in files."""

    generalized = False

    def __init__(self, wanted: PictureTexts):
        self._wanted = wanted
        self.counts = np.array([len(x) for x in wanted.texts], np.int64)
        self.request = {"pictures_and_texts": wanted.digest()}

    def pixels(self, picture: int) -> np.ndarray:
        """As of `Source`."""
        return read_picture(self._wanted.paths[picture])

    def expressions(self, picture: int) -> list[dict[str, Any]]:
        """As of `Source`; images are numbered from 1 on."""
        image = {"image_id": picture + 1, "image": self._wanted.names[picture]}
        return [
            image | {"text": w.text} | ({} if w.sent_id is None else {"sent_id": w.sent_id})
            for w in self._wanted.texts[picture]
        ]


class SplitSource:
    """The pictures of a split, in the order of its shards.

    Args:
        dataset: of the split, as `build_eval_dataset` makes it.
    """

    def __init__(self, dataset: ExpressionDataset):
        index = dataset.index
        self._index, self._reader = index, dataset.reader
        images, first = np.unique(index.refs[:, 0], return_index=True)
        self._images = images
        self.counts = np.add.reduceat(index.refs[:, 3], first)
        self.request = {"manifest_sha": index.manifest_sha, "refs": len(index.refs), "set": index.datasets[0].name}
        self.generalized = index.generalized

    def pixels(self, picture: int) -> np.ndarray:
        """As of `Source`."""
        image = int(self._images[picture])
        try:
            return decode_picture(self._reader.read(image, JPG))
        except ValueError:
            raise self._index.damaged(image, JPG) from None

    def expressions(self, picture: int) -> list[dict[str, Any]]:
        """As of `Source`, with `ref_id` and `sent_id`."""
        image = int(self._images[picture])
        meta = self._index.parse(image, self._reader.read(image, JSON))
        about = {"image_id": meta["image_id"], "image": Path(meta["file_name"]).name}
        return [
            about | {"text": normalise_expression(s["sent"]), "ref_id": ref["ref_id"], "sent_id": s["sent_id"]}
            for ref in meta["refs"]
            for s in ref["sentences"]
        ]
