"""SAM's weights by segment-anything's names, from official files, `transformers`' SamModel and `dit-ds export`.

That all of SAM is in a file is a contract: a model of which a part stayed random would train and evaluate in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from dit_ds.errors import UserError
from dit_ds.models.checkpoint_file import read_tensors
from dit_ds.models.positions import is_other_length
from dit_ds.models.sam import SIZES

_PARTS = {"image_encoder": "image encoder", "prompt_encoder": "prompt encoder", "mask_decoder": "mask decoder"}
_ADDED = ("text_encoder.", "text_projection.", "image_encoder.instruction.", "image_encoder.static_tokens.")  # to SAM
_PART = re.compile(
    r"(?:^|\.)(image_encoder|vision_encoder|shared_image_embedding|prompt_encoder|mask_decoder|text_encoder|"
    r"text_projection)\."
)
_WRAPPERS = "module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module".split()  # PyTorch's, anywhere in a name
_BESIDE = re.compile(r"(^|[._])(ema|teacher|optim|optimizer)([._]|$)")  # other weights in the file, and moments
_DECODER_LAYER = re.compile(r"mask_decoder\.transformer\.layers\.(\d+)\.")
_SAM_DECODER_LAYERS = 2
_GIVE = "give an official sam_vit_*.pth, a SamModel of transformers, or what dit-ds export wrote"

# transformers' names, and what segment-anything calls the same
_OF_TRANSFORMERS = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),  # the same tensor, tied
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.(\d+)\.(attn|mlp)\.", r"image_encoder.blocks.\1.\2."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm(\d)\.", r"mask_decoder.transformer.layers.\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
))  # fmt: skip
_MLP = re.compile(
    r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(proj_in|proj_out|layers\.(\d+))\."
)

# other networks, by names that only they have
_OTHERS = tuple((re.compile(pattern), network) for pattern, network in (
    (r"(^|\.)mask_decoder\.(hf_|hq_|compress_vit_feat|embedding_encoder|embedding_maskfeature)", "SAM-HQ"),
    (r"(^|\.)(image_encoder\.trunk|sam_mask_decoder|sam_prompt_encoder|memory_attention|vision_encoder\.backbone)\.",
     "SAM 2 or a later one"),
    (r"(^|\.)image_encoder\.(layers\.\d+\.blocks|patch_embed\.seq)\.", "MobileSAM, whose image encoder is a TinyViT"),
    (r"(^|\.)prompt_encoder\.invalid_points\.", "EfficientSAM"),
    (r"(^|\.)image_encoder\.(stages|features|model|backbone)\.", "a SAM with another image encoder"),
    (r"(^|\.)visual_encoder\.", "a checkpoint of the paper's released code, or another method's"),
    (r"(^|\.)relative_position_bias_table$", "a Swin, as LAVT's and ReLA's"),
    (r"(?i)(lora[._][ab]|adapter)s?(\.|$|_)",
     "a SAM with adapters, which have to be merged into its weights first (of a run with model.lora: dit-ds export --merge)"),
))  # fmt: skip


def _is_added(name: str) -> bool:
    """Whether a tensor of ours is one that SAM does not have."""
    return name.startswith(_ADDED) or ".lora." in name


def load_sam_checkpoint(model: nn.Module, path: str | Path) -> dict[str, list[str]]:
    """Load all of SAM into a model; of what `dit-ds export` wrote, the text's parts too.

    Position tables keep the file's lengths, of whatever image size.

    Args:
        path: as for `read_tensors`.
    Returns:
        `loaded`, `missing` (in the model only; what is added to SAM, if the file has any of it) and `unexpected` (in the
        file only) tensor names, and `notes`: how the file was read, if it was not by its own names.
    Raises:
        UserError: the file can't be read, lacks a part of SAM, or is of another size or network.
    """
    target = model.state_dict()
    state, notes = _fitting(path, target, values=True)
    loaded = sorted(state.keys() & target.keys())
    model.load_state_dict({k: state[k] for k in loaded}, strict=False)
    added = any(map(_is_added, loaded))
    missing = [n for n in sorted(target.keys() - state.keys()) if added or not _is_added(n)]
    return {"loaded": loaded, "missing": missing, "unexpected": sorted(state.keys() - target.keys()), "notes": notes}


def check_sam_checkpoint(path: str | Path, target: Mapping[str, Tensor]) -> str:
    """What `load_sam_checkpoint` would refuse, refused from names and shapes alone.

    Args:
        target: a model's tensors by name; only their shapes are looked at.
    Returns:
        What the file holds, in words.
    Raises:
        UserError: as of `load_sam_checkpoint`.
    """
    state, notes = _fitting(path, target, values=False)
    return ", ".join([f"{len(state.keys() & target.keys())} tensors, all of SAM's", *notes])


def describe(report: Mapping[str, list[str]]) -> list[str]:
    """Lines about what `load_sam_checkpoint` loaded, and what it did not."""
    notes = "".join(f", {note}" for note in report.get("notes", []))
    lines = [f"model.checkpoint: {len(report['loaded'])} tensors loaded by name{notes}"]
    for what, names in (
        ("not in the checkpoint, fresh", report["missing"]),
        ("not in the model, ignored", report["unexpected"]),
    ):
        if names:
            lines.append(f"{what}: {_some(names, 12)}")
    return lines


def sam_size(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[int, int, int]:
    """Width, depth and patches a side of the image encoder in a SAM's file, of whatever names and wrappers; 0 where it
    does not say.

    Raises:
        UserError: as of `load_sam_checkpoint`, for names that stand twice.
    """
    state = _of_one_part(_translate(_unwrap(tensors, path)[0]))
    table = state.get("image_encoder.pos_embed")
    return (*_size(state), table.shape[1] if table is not None and table.ndim == 4 else 0)


def _fitting(path: str | Path, target: Mapping[str, Tensor], values: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors with segment-anything's names and shapes that the target takes; how they were found.

    Raises:
        UserError: as of `load_sam_checkpoint`.
    """
    tensors = read_tensors(path, values)
    state, notes = _unwrap(tensors, path)
    names = list(state)
    translated = _translate(state)
    if translated.keys() != state.keys():
        notes.append("translated from transformers' names")
    state = _of_one_part(translated)
    _refuse_others(path, names, state, target)
    _require_size(path, state, target)
    _require_shapes(path, state, target)
    _require_all(path, state, target)
    return state, notes


def _unwrap(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """Names that begin with a part's, whatever the part was wrapped in; in words, which of several wrappers was taken."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        bare = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
        match = _PART.search(bare)
        start = match.start(1) if match else 0
        groups.setdefault(bare[:start], {})[bare[start:]] = value
    beside = {prefix for prefix in groups if _BESIDE.search(prefix)}
    taken = {prefix: g for prefix, g in groups.items() if prefix not in beside} if beside < groups.keys() else groups
    if not any(_PART.match(n) for g in taken.values() for n in g):  # the average alone
        taken = groups
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for prefix, group in taken.items():
        for name, value in group.items():
            if name in state:
                raise UserError(
                    f"{path} holds {name} more than once, under '{origin[name]}' and '{prefix}': save the weights to "
                    "start from in a file of their own"
                )
            state[name], origin[name] = value, prefix
    left = sorted(p.rstrip(".") for p in groups.keys() - taken.keys())
    return state, [f"without those under {', '.join(left)}"] if left else []


def names_of_transformers(names: Iterable[str]) -> dict[str, str]:
    """For each name of transformers' SamModel what segment-anything calls the same; other names as they are.

    Args:
        names: all of the model's, as the decoder's MLPs are numbered by their depth.
    """
    names = list(names)
    depth: dict[str, int] = {}  # hidden layers of each of the decoder's MLPs
    for name in names:
        if (match := _MLP.match(name)) and match[2] == "proj_in":
            depth.setdefault(match[1], 0)
    for name in names:
        if (match := _MLP.match(name)) and match[3] and match[1] in depth:
            depth[match[1]] = max(depth[match[1]], int(match[3]) + 1)
    ours: dict[str, str] = {}
    for name in names:
        if (match := _MLP.match(name)) and match[1] in depth:
            layer = {"proj_in": 0, "proj_out": depth[match[1]] + 1}.get(match[2], int(match[3] or 0) + 1)
            ours[name] = f"{match[1]}.layers.{layer}.{name[match.end() :]}"
        else:
            ours[name] = next((p.sub(to, name) for p, to in _OF_TRANSFORMERS if p.match(name)), name)
    return ours


def _translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to segment-anything's; of tied tensors the first."""
    ours = names_of_transformers(state)
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        out.setdefault(ours[name], value)
    return out


def _of_one_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the part's name where the file has one part alone, saved as a module of its own."""
    if any(_PART.match(n) for n in state):
        return state
    only = {
        "neck.0.weight": "image_encoder",
        "iou_token.weight": "mask_decoder",
        "no_mask_embed.weight": "prompt_encoder",
    }
    part = next((part for name, part in only.items() if name in state), None)
    return {f"{part}.{n}": x for n, x in state.items()} if part else state


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _needed(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """By part, the names that a file has to have: SAM's, and of a longer mask decoder what the file has of it."""
    layers = max([_SAM_DECODER_LAYERS, *(int(m[1]) + 1 for n in state if (m := _DECODER_LAYER.match(n)))])
    needed: dict[str, list[str]] = {part: [] for part in _PARTS}
    for name in target:
        part, layer = name.partition(".")[0], _DECODER_LAYER.match(name)
        if part in _PARTS and not _is_added(name) and not (layer and int(layer[1]) >= layers):
            needed[part].append(name)
    return needed


def _lacking(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Iterator[str]:
    """In words, what of each part is not in the file."""
    for part, names in _needed(state, target).items():
        if absent := [n for n in names if n not in state]:
            yield f"{len(absent)} of {len(names)} of the {_PARTS[part]} ({_some(absent)})"


def _refuse_others(
    path: str | Path, names: list[str], state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> None:
    """Refuse a file without any of SAM's names, or with names of another network."""
    found = {n for n in target if n in state and not _is_added(n)}
    for pattern, network in _OTHERS:
        if of_it := [n for n in names if pattern.search(n) and not n.startswith(_ADDED) and n not in target]:
            lacking = ", ".join(_lacking(state, target)) if found else ""
            lacks = f"; of SAM's tensors it lacks {lacking}" if lacking else ""
            raise UserError(f"{path} looks like {network} ({_some(of_it)}){lacks}: {_GIVE}")
    if not found:
        raise UserError(f"{path} holds no tensor with a name of SAM's (it has {_some(names)}): {_GIVE}")


def _size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and depth of an image encoder; 0 where its tensors don't say."""
    table = state.get("image_encoder.pos_embed")
    layers = [int(m[1]) + 1 for n in state if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", n))]
    return (table.shape[-1] if table is not None and table.ndim else 0), max(layers, default=0)


def _require_size(path: str | Path, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    (width, depth), (want, layers) = _size(state), _size(target)
    if width in (0, want) and depth <= layers:
        return
    known = {size.embed_dim: name for name, size in SIZES.items()}
    of_file, of_model = known.get(width), known.get(want, f"a ViT {want} wide")
    what = of_file if of_file and width != want else "none of SAM's"
    remedy = f"set model.size {of_file}" if of_file and width != want else _GIVE
    raise UserError(
        f"{path} is of another size: it is {what}, {width} wide with {depth} layers, model.size is {of_model} with "
        f"{layers} layers: {remedy}"
    )


def _require_shapes(path: str | Path, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Equal shapes but for the lengths of position tables, and weights in floating point."""
    both = sorted(state.keys() & target.keys())
    differ = [n for n in both if state[n].shape != target[n].shape and not is_other_length(n, state[n], target[n])]
    if differ:
        name, of_text = differ[0], differ[0].startswith(_ADDED)
        keys = "text.name, model.scheme and model.static_tokens" if of_text else "model.size"
        keys = "model.lora.rank" if ".lora." in name else keys
        raise UserError(
            f"{path} is of another size: {len(differ)} tensors have another shape ({name} is "
            f"{tuple(state[name].shape)}, the model's {tuple(target[name].shape)}): set {keys} to match"
        )
    whole = [n for n in both if not state[n].is_floating_point() and target[n].is_floating_point()]
    if whole:
        raise UserError(
            f"{path} holds {len(whole)} weights that are no floating-point numbers, as of a quantized model "
            f"({_some(whole)}): {_GIVE}"
        )


def _require_all(path: str | Path, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Every tensor of SAM's, and none in its parts that the model would not compute with."""
    if lacking := list(_lacking(state, target)):
        needed = _needed(state, target)
        there = [_PARTS[part] for part, names in needed.items() if any(n in state for n in names)]
        alone = f"holds SAM's {' and '.join(there)} alone: it " if len(there) < len(_PARTS) else ""
        shard = re.search(r"-\d{5}-of-\d{5}\.", Path(path).name)
        remedy = "it is one file of several: give their folder" if shard else _GIVE
        count, total = (
            sum(n not in state for names in needed.values() for n in names), sum(map(len, needed.values()))
        )  # fmt: skip
        raise UserError(f"{path} {alone}lacks {count} of SAM's {total} tensors, {', '.join(lacking)}: {remedy}")
    parts = tuple(f"{part}." for part in _PARTS)
    foreign = [n for n in state if n.startswith(parts) and n not in target and not _is_added(n)]
    foreign = [n for n in foreign if _DECODER_LAYER.sub("mask_decoder.transformer.layers.0.", n) not in target]
    if foreign:
        raise UserError(
            f"{path} has {len(foreign)} tensors in SAM's parts that SAM does not have ({_some(foreign)}), so it is "
            f"another network: {_GIVE}"
        )
