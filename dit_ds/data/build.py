"""The training and evaluation datasets that a configuration names: splits of one dataset, or a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.config.schema import DataConfig, RunConfig
from dit_ds.data.loading.dataset import ExpressionDataset, Tokenize
from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.data.shards.manifest import load_manifest
from dit_ds.data.shards.published_counts import shares_by_design
from dit_ds.data.shards.storage import locate
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer, text_config


def train_index(d: DataConfig) -> SplitIndex:
    """The training split, or those of `data.mixture`, without the images that are evaluated on.

    Those are the images of all splits of these datasets and of that to evaluate on, but the one to train on and others
    whose name begins with `train`. An image is the same if it has the same id in one image set, or the same bytes, as
    their length and CRC-32 tell. The index's `notes` say how many are left out. Google's splits of one dataset share
    images by design, and are taken as they are.

    Raises:
        UserError: a dataset is missing or incomplete, or nothing is left of one.
    """
    folders = {name: locate(d.root, *name.split("/")) for name in d.train_sets}
    named = list(dict.fromkeys([*folders.values(), val_folder(d)]))
    manifests = {folder: load_manifest(folder) for folder in named}
    alone = len(named) == 1 and not d.mixture
    held_out = _HeldOut.of({} if alone and shares_by_design(manifests[named[0]]) else manifests, d)
    indices, notes = [], []
    for name, folder in folders.items():
        full = SplitIndex.load(folder, d.train_split)
        by_id, by_content = held_out.among(full, manifests[folder]["image_set"])
        index = full.without_images(by_id | by_content)
        left_out = len(full.refs) - len(index.refs)
        if not len(index.refs):
            raise UserError(f"every image of {name} {d.train_split} is one that is evaluated on: train on another set")
        if left_out:
            notes.append(
                f"{name}: {left_out} of {len(full.refs)} refs left out, their images are evaluated on ({by_id.sum()} "
                f"images by their id, {(by_content & ~by_id).sum()} more by their bytes under another id)"
            )
        indices.append(index)
    index = indices[0] if alone else SplitIndex.chain(indices, list(d.train_sets.values()))
    return replace(index, notes=notes)


def val_folder(d: DataConfig) -> Path | str:
    """The folder or URL of the dataset that a run is evaluated on."""
    return locate(d.root, *d.val_set.split("/"))


@dataclass(frozen=True)
class _HeldOut:
    """The images that are evaluated on.

    Attributes:
        ids: image ids by image set.
        contents: (n,) int64: length and CRC-32 of their JPEGs, see `_contents`.
    """

    ids: dict[str, np.ndarray]
    contents: np.ndarray

    @classmethod
    def of(cls, manifests: dict[Path | str, dict[str, Any]], d: DataConfig) -> _HeldOut:
        """The images of the splits to evaluate on."""
        ids: dict[str, list[np.ndarray]] = {}
        contents = [np.zeros(0, np.int64)]
        for folder, manifest in manifests.items():
            for name, split in manifest["splits"].items():
                evaluated = name == d.val_split and folder == val_folder(d)
                if name == d.train_split or (name.startswith("train") and not evaluated):
                    continue
                samples = [sample[:4] for entry in split["shards"] for sample in entry["samples"]]
                columns = np.array(samples, np.int64).reshape(-1, 4)
                ids.setdefault(manifest["image_set"], []).append(columns[:, 0])
                contents.append(_contents(columns[:, 2], columns[:, 3]))
        return cls({image_set: np.concatenate(x) for image_set, x in ids.items()}, np.concatenate(contents))

    def among(self, index: SplitIndex, image_set: str) -> tuple[np.ndarray, np.ndarray]:
        """Two (images,) bool: which of an index's images are evaluated on, by their id and by their content."""
        size, crc = index.images[:, JPG + 1], index.images[:, JPG + 2]
        by_id = np.isin(index.images[:, 1], self.ids.get(image_set, np.zeros(0, np.int64)))
        return by_id, np.isin(_contents(size, crc), self.contents)


def _contents(size: np.ndarray, crc: np.ndarray) -> np.ndarray:
    """(n,) int64: a JPEG's length, which is below 2 GiB, and its CRC-32 in one number."""
    return size << 32 | crc


def build_train_dataset(config: RunConfig) -> ExpressionDataset:
    """A run's training dataset.

    Raises:
        UserError: as of `train_index`.
    """
    d = config.data
    index = train_index(d)
    require_targets(index, d.train_split, d.prompts)
    return ExpressionDataset(
        index,
        d.unit,
        d.image_size,
        _make_tokenize(config),
        augmentation=Augmentation(d.color_jitter, d.blur, d.flip),
        seed=config.seed,
        resize=d.resize,
        prompts=Prompts.of(d.prompts, d.points),
        mask_rule=d.train_mask_rule,
        scales=d.scales,
        streamed=d.streamed,
        on_vanished_target=d.on_vanished_target,
        skip_bad=d.max_bad_samples > 0,
    )


def require_targets(index: SplitIndex, split: str, kinds: Sequence[str]) -> None:
    """Points and boxes are drawn from masks, which expressions without a target do not have.

    Args:
        split: of the index, for the message.
        kinds: of prompts.
    Raises:
        UserError: the split has such expressions, and a kind is not text.
    """
    drawn = [k for k in kinds if k != "text"]
    if index.generalized and drawn:
        raise UserError(
            f"{', '.join(s.name for s in index.datasets)} {split} has expressions without a target, of which no "
            f"{drawn[0]} can be drawn: prompt with text alone (data.prompts [text]), or take another set"
        )


def _make_tokenize(config: RunConfig) -> Tokenize:
    """The function from text to ids for the configured encoder.

    Raises:
        UserError: the tokenizer is not there, or has ids that the encoder does not know.
    """
    tokenizer = load_tokenizer(config.text.tokenizer or config.text.name)
    known = getattr(text_config(config.text.name), "vocab_size", len(tokenizer))
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer of {config.text.tokenizer or config.text.name} has {len(tokenizer)} tokens, and text.name "
            f"{config.text.name} knows {known}: set text.tokenizer to the encoder's own"
        )
    return make_tokenize(tokenizer, config.data.tokens)


def build_eval_dataset(
    config: RunConfig,
    split: str,
    *,
    kind: str | None = None,
    sentence_shift: int = 0,
    trained: Sequence[str] | None = None,
) -> ExpressionDataset:
    """A split to evaluate on, with prompts of one kind.

    Args:
        split: its name.
        kind: of the prompts: text, point or box; by default `DataConfig.default_prompt`.
        sentence_shift: see `ExpressionDataset`.
        trained: the kinds of prompts that the model was trained with, by default the run's; empty for SAM's weights.
    Raises:
        UserError: no such dataset or split, or it is incomplete.
    """
    d = config.data
    index = SplitIndex.load(val_folder(d), split)
    kind = kind or d.default_prompt
    require_targets(index, split, [kind])
    tokenize = _make_tokenize(config)
    trained = d.prompts if trained is None else trained
    prompts = Prompts.of(trained, d.points, [kind])
    return ExpressionDataset(
        index,
        "sentence",
        d.image_size,
        tokenize,
        sentence_shift=sentence_shift,
        resize=d.resize,
        prompts=prompts,
        streamed=d.streamed,
    )
