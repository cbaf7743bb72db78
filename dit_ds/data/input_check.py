"""What a run's settings leave of a set's expressions, counted for `data stats` and `data verify`."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.config.schema import RunConfig
from dit_ds.data.directions import mirror_expression
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.loading.decoded_image import DecodedImage
from dit_ds.data.loading.index import JSON, SplitIndex
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.loading.tokenize import TokenCheck, make_token_check
from dit_ds.data.loading.transforms import resized_shape
from dit_ds.data.masks import holds_square, run_lengths
from dit_ds.data.parallel import forked_map
from dit_ds.data.shards.storage import local
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer

_MAX_NAMED = 3  # samples that one line names
# of each count: what it counts, as a line says it
_FACTS = {
    "expressions_swapped": "expressions have left and right swapped when their picture is flipped",
    "expressions_not_flippable": "expressions have a direction whose mirror is not known: their picture is not flipped",
}
_WARNINGS = {
    "targets_vanished": "targets have nothing left at {sizes} pixels (data.train_mask_rule {train_mask_rule}): in training "
    "data.on_vanished_target {on_vanished_target} rules",
    "expressions_rewritten": "expressions are read without their capitals and punctuation",
    "expressions_cut": "expressions are longer than data.tokens {tokens}: the model doesn't read their ends",
    "expressions_unknown": "expressions are mostly [UNK] to {tokenizer}: it was made for other words or another script",
}


@dataclass
class InputLosses:
    """Counts of what a model doesn't read as it is written.

    Attributes:
        counts: by the keys of `_FACTS` and `_WARNINGS`; what can't be counted is not there.
        examples: some of what was counted, as "KEY 'expression'", by the same keys.
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, found: bool, example: str) -> None:
        """Count one expression or target."""
        self.counts[name] += found
        if found and len(self.examples.setdefault(name, [])) < _MAX_NAMED:
            self.examples[name].append(example)

    def merge(self, other: InputLosses) -> None:
        """Add another's counts."""
        self.counts.update(other.counts)
        for name, some in other.examples.items():
            self.examples[name] = (self.examples.get(name, []) + some)[:_MAX_NAMED]


class InputCheck:
    """Compares a set with what a run's settings make of it.

    Args:
        config: the run's, of which `data` and the tokenizer matter. None for the defaults; their tokenizer is not fetched.
    Attributes:
        note: what is not counted, and why; None where everything is.
    Raises:
        UserError: the configuration's tokenizer can't be loaded.
    """

    def __init__(self, config: RunConfig | None = None):
        run = config or RunConfig()
        name = run.text.tokenizer or run.text.name
        self._sides, self._resize = run.data.scales or [run.data.image_size], run.data.resize
        self.settings: dict[str, Any] = {
            "tokens": run.data.tokens,
            "tokenizer": name,
            "sizes": " or ".join(map(str, self._sides)),
            "train_mask_rule": run.data.train_mask_rule,
            "on_vanished_target": run.data.on_vanished_target,
        }
        self.note: str | None = None
        self._check_tokens: Callable[[str], TokenCheck] | None = None
        try:
            self._check_tokens = make_token_check(load_tokenizer(name, local=config is None), run.data.tokens)
        except UserError:
            if config is not None:
                raise
            self.note = f"how many expressions are cut or [UNK] is not counted, {name} is not here: give --config"

    def losses(self, folder: str | Path, split: str, processes: int | None = None) -> InputLosses:
        """Count what is lost of a split.

        Args:
            folder, processes: as for `split_stats`.
        Raises:
            UserError: no such dataset or split, or a damaged sample.
        """
        index, found = SplitIndex.load(local(folder), split), InputLosses()
        shards = list(range(len(index.shards)))
        for of_shard in forked_map(functools.partial(self._of_shard, index), shards, processes, f"{split} as read"):
            found.merge(of_shard)
        return found

    def warnings(self, losses: InputLosses) -> list[str]:
        """A line on each count above zero that may surprise, with examples."""
        return self._lines(losses, _WARNINGS)

    def lines(self, losses: InputLosses) -> list[str]:
        """A line on each count above zero, with examples."""
        return self._lines(losses, _FACTS | _WARNINGS)

    def _lines(self, losses: InputLosses, texts: dict[str, str]) -> list[str]:
        return [
            f"{losses.counts[name]} {text.format(**self.settings)}, as {', '.join(losses.examples[name])}"
            for name, text in texts.items()
            if losses.counts[name]
        ]

    def _of_shard(self, index: SplitIndex, shard: int) -> InputLosses:
        reader, losses = MemberReader(index), InputLosses()
        for image in np.flatnonzero(index.images[:, 0] == shard).tolist():
            meta = index.parse(image, reader.read(image, JSON))
            for ref in meta["refs"]:
                try:
                    losses.add("targets_vanished", self._vanishes(meta, ref), f"{index.key(image)} ref {ref['ref_id']}")
                except ValueError as e:
                    raise UserError(
                        f"{index.shards[shard]}: {index.key(image)}: {e}: see 'dit-ds data verify'"
                    ) from None
                for sentence in ref["sentences"]:
                    self._count_expression(losses, index.key(image), sentence["sent"])
        return losses

    def _vanishes(self, meta: dict[str, Any], ref: dict[str, Any]) -> bool:
        """Whether nothing is left of a ref's target at one of the sizes to train on."""
        height, width = meta["height"], meta["width"]
        for side in self._sides:
            h, w = resized_shape(height, width, side, self._resize)
            # where this holds, the square covers one resized pixel or more; it saves decoding nearly every mask
            square = math.ceil(2 * max(height / h, width / w)) + 1
            runs = (run_lengths(meta["anns"][str(a)]["rle"]) for a in ref["ann_ids"])
            if any(holds_square(r, height, square) for r in runs):
                continue
            image = DecodedImage(meta, np.empty(0), self._resize, self.settings["train_mask_rule"], fast=True)
            if image.vanishes(ref["ann_ids"], side):
                return True
        return False

    def _count_expression(self, losses: InputLosses, key: str, written: str) -> None:
        text, example = normalise_expression(written), f"{key} '{written}'"
        mirrored = mirror_expression(text)
        losses.add("expressions_swapped", mirrored not in (text, None), example)
        losses.add("expressions_not_flippable", mirrored is None, example)
        losses.add("expressions_rewritten", text != written, example)
        if self._check_tokens is not None:
            found = self._check_tokens(text)
            losses.add("expressions_cut", found.cut, example)
            losses.add("expressions_unknown", found.mostly_unknown, example)


def add_losses(
    found: dict[str, Any], folder: str | Path, config: RunConfig | None = None, processes: int | None = None
) -> None:
    """Add what runs lose of a set to the result of `verify_shards`: to `counts`, `warnings`, and `notes`, which this adds.

    Args:
        folder, processes: as for `verify_shards`.
        config: as for `InputCheck`.
    """
    check = InputCheck(config)
    found["notes"] = [check.note] if check.note else []
    for split, counts in found["counts"].items():
        if counts["images"]:  # with --skip-bad a split may have lost all
            losses = check.losses(folder, split, processes)
            counts.update(losses.counts)
            found["warnings"] += [f"split {split}: {line}" for line in check.warnings(losses)]
