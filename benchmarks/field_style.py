"""A loader as the field's repositories have it: loose JPEGs, a .npy mask a ref, Pillow and torchvision, expression by
expression."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import dit_ds.torchvision_stub  # noqa: F401
from dit_ds.data.directions import mirror_expression
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, JSON, SplitIndex
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.masks import decode_rle


def unpack(index: SplitIndex, out: Path) -> None:
    """Write each image as `IMAGE.jpg` and each ref's mask as `REF.npy`."""
    out.mkdir()
    reader = MemberReader(index)
    for image in range(len(index.images)):
        (out / f"{image}.jpg").write_bytes(reader.read(image, JPG))
        meta = json.loads(reader.read(image, JSON))
        for ref in np.flatnonzero(index.refs[:, 0] == image):
            (ann,) = meta["refs"][index.refs[ref, 1]]["ann_ids"]
            np.save(out / f"{ref}.npy", decode_rle(meta["anns"][str(ann)]["rle"]))


class FieldStyle(Dataset):
    """Items as `ExpressionDataset`'s; expressions are in memory, as from a loaded annotation file."""

    def __init__(self, folder: Path, like: ExpressionDataset):
        from torchvision import transforms as T

        self.folder, self.index, self.unit, self.tokenize = folder, like.index, like.unit, like.tokenize
        self.texts = [
            [s["sent"] for s in json.loads(like.reader.read(int(image), JSON))["refs"][position]["sentences"]]
            for image, position, *_ in like.index.refs
        ]
        self.how, side = like.augmentation, like.image_size
        self.resize = T.Resize((side, side))
        self.resize_mask = T.Resize((side, side), T.InterpolationMode.NEAREST)
        if self.how is not None:
            self.color = T.ColorJitter(*[self.how.color] * 3)
            self.blur = T.RandomApply([T.GaussianBlur(7, (0.1, 1.5))], self.how.blur)
        self.normalize = T.Compose([T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self) -> int:
        return len(self.index.refs if self.unit != "sentence" else self.index.sentences)

    def __getitem__(self, item: tuple[int, int, float]) -> dict[str, torch.Tensor]:
        _, sample, _ = item
        ref = sample if self.unit != "sentence" else int(self.index.sentences[sample])
        nth = torch.randint(len(self.texts[ref]), ()) if self.unit != "sentence" else sample - self.index.refs[ref, 2]
        text = self.texts[ref][int(nth)]
        image = self.resize(Image.open(self.folder / f"{self.index.refs[ref, 0]}.jpg").convert("RGB"))
        mask = self.resize_mask(Image.fromarray(np.load(self.folder / f"{ref}.npy")))
        if self.how is not None:
            image = self.blur(self.color(image))
            mirrored = mirror_expression(text)
            if torch.rand(()) < self.how.flip and mirrored is not None:
                image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
                text = mirrored
        tokens, real = self.tokenize(text)
        return {
            "image": self.normalize(image),
            "mask": torch.from_numpy(np.array(mask)).long(),
            "tokens": torch.from_numpy(tokens),
            "token_mask": torch.from_numpy(real),
        }
