"""The training and evaluation datasets that a configuration names: splits of one dataset, or a mixture of several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_ds.config.schema import DataConfig, RunConfig
from dit_ds.data.loading.dataset import ExpressionDataset, Tokenize
from dit_ds.data.loading.index import JPG, NoSplit, SplitIndex
from dit_ds.data.loading.packed import PackedDataset
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.data.shards.manifest import load_manifest
from dit_ds.data.shards.published_counts import shares_by_design
from dit_ds.data.shards.storage import locate
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer, text_config


def train_index(d: DataConfig, evaluates: bool = True) -> SplitIndex:
    """The training split, or those of `data.mixture`, without the images that are evaluated on.

    Those are the images of all splits of these datasets and of that to evaluate on, but the one to train on and others
    whose name begins with `train`; and those of `val_index` with `data.val_fraction`. An image is the same if it has the same id in one image set, or the same bytes, as
    their length and CRC-32 tell. The index's `notes` say how many are left out. Google's splits of one dataset share
    images by design, and are taken as they are.

    Args:
        evaluates: the run evaluates while it trains; if it doesn't, its evaluation set need not be there.
    Raises:
        UserError: a dataset is missing or incomplete, or nothing is left of one.
    """
    folders = {name: locate(d.root, *name.split("/")) for name in d.train_sets}
    named = list(dict.fromkeys([*folders.values(), val_folder(d)]))
    indices, notes = [], []
    manifests = {}
    for folder in named:
        try:
            manifests[folder] = load_manifest(folder)
        except UserError as e:
            if evaluates or folder in folders.values():
                raise
            notes.append(f"nothing of {d.val_set} is left out of training, it can't be read ({e})")
    alone = len(named) == 1 and not d.mixture
    held_out = _HeldOut.of({} if alone and shares_by_design(manifests[named[0]]) else manifests, d)
    for name, folder in folders.items():
        full = SplitIndex.load(folder, d.train_split)
        by_id, by_content = held_out.among(full, manifests[folder]["image_set"])
        if d.val_fraction:
            fraction = _fraction_of(full, d)
            by_id |= fraction
            by_content |= np.isin(_contents_of(full), _contents_of(full)[fraction])
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
        by_id = np.isin(index.images[:, 1], self.ids.get(image_set, np.zeros(0, np.int64)))
        return by_id, np.isin(_contents_of(index), self.contents)


def _contents_of(index: SplitIndex) -> np.ndarray:
    """(images,) int64: `_contents` of an index's images."""
    return _contents(index.images[:, JPG + 1], index.images[:, JPG + 2])


def _contents(size: np.ndarray, crc: np.ndarray) -> np.ndarray:
    """(n,) int64: a picture's length, which is below 2 GiB, and its CRC-32 in one number."""
    return size << 32 | crc


def val_index(d: DataConfig, split: str) -> SplitIndex:
    """A split to evaluate on; with `data.val_fraction`, `data.val_split` is the part of the training split held out.

    Raises:
        UserError: no such dataset or split, it is incomplete, or the set has a split of that name already.
    """
    folder = val_folder(d)
    if not d.val_fraction or split != d.val_split:
        return SplitIndex.load(folder, split)
    if split in load_manifest(folder)["splits"]:
        raise UserError(
            f"{folder} has a split {split}, and data.val_fraction holds one of that name out of {d.train_split}: set "
            "data.val_fraction 0, or data.val_split to another name, as held_out"
        )
    full = SplitIndex.load(folder, d.train_split)
    return full.without_images(~_fraction_of(full, d))


def run_val_index(config: RunConfig) -> SplitIndex | None:
    """`val_index` of the split that a run evaluates on while it trains; None if it doesn't, and there is none.

    Raises:
        UserError: as of `val_index`.
    """
    try:
        return val_index(config.data, config.data.val_split)
    except UserError as e:
        if config.eval.every_epochs == 0:
            return None
        if not isinstance(e, NoSplit):
            raise
        raise UserError(
            f"{e}: choose one with data.val_split, hold a part of the training images out with data.val_fraction 0.05, "
            "or don't evaluate, with eval.every_epochs 0"
        ) from None


def _fraction_of(index: SplitIndex, d: DataConfig) -> np.ndarray:
    """(images,) bool: `data.val_fraction` of a split's images, chosen by a hash of their ids alone.

    Raises:
        UserError: the split has a single image.
    """
    # another hash than that of `data shard`, by which images lie in the shards
    ids = sorted(index.image_ids().tolist(), key=lambda i: hashlib.sha256(f"held out {i}".encode()).digest())
    if len(ids) < 2:
        raise UserError(f"{d.val_set} {d.train_split} has one image, of which data.val_fraction can't hold a part out")
    count = min(len(ids) - 1, max(1, round(d.val_fraction * len(ids))))
    return np.isin(index.images[:, 1], ids[:count])


def build_train_dataset(config: RunConfig) -> ExpressionDataset:
    """A run's training dataset: a `PackedDataset` where its batches are finished on the device.

    Raises:
        UserError: as of `train_index`.
    """
    d = config.data
    index = train_index(d, evaluates=config.eval.every_epochs > 0)
    require_targets(index, d.train_split, d.prompts)
    on_device = d.augment_on == "device" and _has_gpu()
    if d.augment_on == "device" and not on_device:
        note = "data.augment_on is device, and there is no GPU here: loader workers resize and augment, as with cpu"
        index = replace(index, notes=[*index.notes, note])
    kind = PackedDataset if on_device else ExpressionDataset
    return kind(
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


def _has_gpu() -> bool:
    return torch.cuda.is_available()


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
    index: SplitIndex | None = None,
) -> ExpressionDataset:
    """A split to evaluate on, with prompts of one kind.

    Args:
        split: its name.
        kind: of the prompts: text, point or box; by default `DataConfig.default_prompt`.
        sentence_shift: see `ExpressionDataset`.
        trained: the kinds of prompts that the model was trained with, by default the run's; empty for SAM's weights.
        index: of the split, if it is loaded already.
    Raises:
        UserError: no such dataset or split, or it is incomplete.
    """
    d = config.data
    index = index or val_index(d, split)
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


def build_val_dataset(config: RunConfig) -> ExpressionDataset | None:
    """The split that a run evaluates on while it trains; see `run_val_index`."""
    index = run_val_index(config)
    return None if index is None else build_eval_dataset(config, config.data.val_split, index=index)
