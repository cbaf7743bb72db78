"""The checkpoints of the methods' authors: their names of tensors, and ours for the same.

DIT is the paper's released code, LAVT and ReLA are its comparisons' own. Every tensor of a file is used, or left out for a
reason that is given; one that no rule knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_ds.errors import UserError
from dit_ds.models.author_names import NAMES, RULES, some
from dit_ds.models.checkpoint_file import read_tensors
from dit_ds.models.positions import is_other_length

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)(?=\.)")
# a tensor that each method's network has, and no other
_MARKS = {"dit": "visual_encoder.patch_embed.proj.weight", "lavt": "classifier.conv1_4.weight",
          "rela": "sem_seg_head.predictor.query_feat.weight"}  # fmt: skip

_BESIDE = "beside the weights (optimizer, schedule, arguments)"


@dataclass
class Translated:
    """A file's weights by our names.

    Attributes:
        source: a key of `NAMES`.
        model: the keys of `model` in the configuration that names and shapes tell.
        state: tensors by our names.
        left_out: the file's names that are not used, by the reason.
    """

    source: str
    model: dict[str, Any]
    state: dict[str, Tensor]
    left_out: dict[str, list[str]] = field(default_factory=dict)


def recognise(names: Iterable[str]) -> str | None:
    """Whose checkpoint has such names: a key of `NAMES`, or None."""
    bare = [_WRAPPERS.sub("", name) for name in names]
    return next((of for of, mark in _MARKS.items() if any(f".{n}".endswith(f".{mark}") for n in bare)), None)


def translate(tensors: Mapping[str, Tensor], path: str | Path, scheme: str | None = None) -> Translated:
    """A file's tensors by our names.

    Args:
        tensors: of `read_tensors`.
        path: named in messages.
        scheme: of a DIT checkpoint whose names two schemes have: end_to_end or layer_wise.
    Raises:
        UserError: it is no author's checkpoint, has a tensor that no rule knows, lacks one, or is of another size.
    """
    source = recognise(tensors)
    if source is None:
        raise UserError(f"{path} is no checkpoint of {', '.join(NAMES.values())}: see dit-ds import --help")
    weights, beside = _of_network(tensors, source, path)
    rules, model = RULES[source](weights, path, scheme)
    out = Translated(source, model, {}, {_BESIDE: beside} if beside else {})
    pieces: dict[str, dict[str, Tensor]] = {}  # of our tensors that are made of several of theirs
    unknown = []
    for name, value in weights.items():
        rule = next(((to, m) for pattern, to in rules if (m := re.fullmatch(pattern, name))), None)
        if rule is None:
            unknown.append(name)
        elif rule[0].startswith("!"):
            out.left_out.setdefault(rule[0][1:], []).append(name)
        elif "<" in rule[0]:  # TARGET<PIECE
            target, _, piece = rule[1].expand(rule[0]).partition("<")
            pieces.setdefault(target, {})[piece] = value
        else:
            out.state[rule[1].expand(rule[0])] = value
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} tensors that {NAMES[source]} does not have ({some(unknown)}): it is another "
            "network, or a changed one"
        )
    for target, of in pieces.items():
        out.state |= _assemble(target, of, path)
    return out


def load(model: nn.Module, path: str | Path, scheme: str | None) -> dict[str, list[str]] | None:
    """Load an author's checkpoint into our model of the same network; None if the file is none.

    Args:
        scheme: the model's, for names that two schemes have.
    Returns:
        As of `load_sam_checkpoint`.
    Raises:
        UserError: as of `translate`, or the model is another network.
    """
    if recognise(read_tensors(path, values=False)) is None:
        return None
    found = translate(read_tensors(path), path, scheme)
    fill(model, found, path)
    left = [f"{n} ({reason})" for reason, names in found.left_out.items() for n in names]
    note = f"translated from the names of {NAMES[found.source]}"
    return {"loaded": sorted(found.state), "missing": [], "unexpected": left, "notes": [note]}


def check(path: str | Path, target: Mapping[str, Tensor], scheme: str | None) -> str | None:
    """What `load` would refuse, refused from names and shapes alone.

    Args:
        target: the model's tensors by name, or those of some of its parts, which alone are then looked at.
    Returns:
        What the file holds, in words; None if it is no author's.
    Raises:
        UserError: as of `load`.
    """
    tensors = read_tensors(path, values=False)
    if recognise(tensors) is None:
        return None
    found = translate(tensors, path, scheme)
    parts = {n.partition(".")[0] for n in target}
    found.state = {n: x for n, x in found.state.items() if n.partition(".")[0] in parts}
    _require_same(found, target, path)
    return f"{len(found.state)} tensors, all of the model's, translated from the names of {NAMES[found.source]}"


def fill(model: nn.Module, found: Translated, path: str | Path) -> None:
    """Give a model all of its tensors.

    Raises:
        UserError: it has others than the file, or of other shapes.
    """
    _require_same(found, model.state_dict(), path)
    model.load_state_dict(found.state)


def _require_same(found: Translated, target: Mapping[str, Tensor], path: str | Path) -> None:
    state = found.state
    lacks, more = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    if lacks or more:
        what = f"lacks {len(lacks)} of the model's {len(target)} tensors ({some(lacks)})" if lacks else ""
        other = f"has {len(more)} that the model does not have ({some(more)})" if more else ""
        raise UserError(
            f"{path}, of {NAMES[found.source]}, {' and '.join(filter(None, [what, other]))}: set the model.* and text.* "
            "keys that dit-ds import writes beside what it imports"
        )
    wrong = [n for n in target if state[n].shape != target[n].shape and not is_other_length(n, state[n], target[n])]
    if wrong:
        name, text = wrong[0], wrong[0].startswith("text_encoder.")
        remedy = "name the text encoder that it was trained with (dit-ds import --text, text.name)" if text else (
            "set model.size, model.static_tokens and data.image_size to the file's")  # fmt: skip
        raise UserError(f"{path}: {len(wrong)} tensors have another shape ({name} is {tuple(state[name].shape)}, the model's "
                        f"{tuple(target[name].shape)}): {remedy}")  # fmt: skip


def _of_network(tensors: Mapping[str, Tensor], source: str, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The network's tensors by the names in the authors' code, and the names of all that lies beside them."""
    names = {name: _WRAPPERS.sub("", name).lstrip(".") for name in tensors}
    mark = _MARKS[source]
    roots = sorted({n[: -len(mark)] for n in names.values() if f".{n}".endswith(f".{mark}")}, key=len)
    if len(roots) > 1:
        usual = [r for r in roots if r in ("state_dict.", "model.")]
        if len(usual) != 1:
            raise UserError(f"{path} holds the network {len(roots)} times, under {', '.join(map(repr, roots))}: save the one "
                            "that counts in a file of its own")  # fmt: skip
        roots = usual
    root, weights, beside = roots[0], {}, []
    for name, bare in names.items():
        if source == "lavt" and bare.startswith("bert_model."):
            weights["text_encoder." + bare.removeprefix("bert_model.")] = tensors[name]
        elif bare.startswith(root) and not (
            root == "" and bare.startswith(("optimizer.", "scheduler.", "lr_scheduler."))
        ):
            weights[bare.removeprefix(root)] = tensors[name]
        else:
            beside.append(name)
    return weights, beside


def _assemble(target: str, pieces: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Three of our tensors, `A;B;C`, of one of the authors'; or one of their k and v."""
    if list(pieces) == ["thirds"]:
        return dict(zip(target.split(";"), pieces["thirds"].chunk(3)))
    if pieces.keys() == {"k", "v"}:
        return {target: torch.cat([pieces["k"], pieces["v"]])}
    raise UserError(f"{path} lacks a part of what is {target} here: it has only {', '.join(pieces)}")
