"""Checkpoints of other programs as ours: one safetensors file that every command takes, and a configuration beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_ds.checkpointing.weights import save_tensors
from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.config.yaml_text import dump_yaml
from dit_ds.errors import UserError
from dit_ds.files import atomic_write, refuse_overwriting
from dit_ds.models import author_names, authors
from dit_ds.models.build import build_model
from dit_ds.models.checkpoint_file import read_tensors
from dit_ds.models.sam import SIZES
from dit_ds.models.sam_checkpoint import load_sam_checkpoint, sam_size
from dit_ds.models.segmenter import Segmenter

_METHODS = ("dit", "lavt", "rela")
SOURCES = ("auto", *_METHODS, "sam", "transformers")

# What a checkpoint's tensors don't tell: how the authors' code reads images and words, trains, and makes masks.
_SWIN = {
    "data": {"image_size": 480, "resize": "stretch", "color_jitter": 0, "blur": 0, "flip": 0},
    "eval": {"threshold": 0.5},
    "deepspeed": {"precision": "fp32"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dit": {  # configs/paper/released_code.yaml
        "data": {"blur": 0, "scales": [320, 352, 384, 416, 448, 480, 512], "train_mask_rule": "soft"},
        "model": {"scheme_form": "released", "word_init": "zero", "word_dropout": 0.1, "mask_padding": False,
                  "align_corners": True},
        "text": {"layers": 1},
        "train": {"betas": [0.9, 0.98], "eps": 1e-9, "schedule": "cosine", "min_lr": 1e-6, "gradient_clipping": 0.15,
                  "ema_decay": 0.9997},
        "eval": {"mask_rule": "resize_then_any"},
        "deepspeed": {"precision": "fp32"},
    },
    "lavt": merge(_SWIN, {  # configs/paper/table8_lavt.yaml
        "train": {"batch_size": 32, "epochs": 40, "lr": 5e-5, "weight_decay": 0.01, "weight_decay_norms": False,
                  "schedule": "poly", "poly_power": 0.9, "warmup_epochs": 0},
    }),
    "rela": merge(_SWIN, {  # configs/paper/table8_rela.yaml
        "train": {"batch_size": 48, "epochs": 170, "max_steps": 150000, "lr": 1e-5, "weight_decay": 0.05,
                  "schedule": "step", "milestones": [124.43, 158.37], "lr_decay": 0.1, "warmup_epochs": 0,
                  "gradient_clipping": 0.01},
        "eval": {"every_epochs": 5},
    }),
}  # fmt: skip


def import_weights(
    path: str | Path,
    out: str | Path,
    source: str = "auto",
    *,
    scheme: str | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """Write another program's checkpoint as `dit-ds export` would, and a configuration to go on with beside it.

    Args:
        path: as for `read_tensors`.
        out: a .safetensors file; the configuration is the same name with .yaml.
        source: one of `SOURCES`.
        scheme: end_to_end or layer_wise, of a DIT checkpoint whose names both have.
        text: the text encoder's architecture and tokenizer, see `text.name`.
    Returns:
        `file`, `config` (the YAML), `source`, `method`, `scheme`, `size`, `tensors` written, `parameters`, `used` of the
        file's tensors and `left_out`: how many, by the reason; of a SAM `fresh`, the number of tensors that SAM has not.
    Raises:
        UserError: the file is not what `source` says, holds less or more than the network, or can't be written.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: name a .safetensors file")
    beside = out.with_suffix(".yaml")
    refuse_overwriting(out, path)
    refuse_overwriting(beside, path)
    names = read_tensors(path, values=False)
    if "text_projection.weight" in names:
        raise UserError(f"{path} is what dit-ds export wrote, which every command takes as it is")
    found = authors.recognise(names)
    if found is None and source in _METHODS:
        raise UserError(f"{path} is no checkpoint of {author_names.NAMES[source]}: see what it is with --from auto")
    if scheme is not None and found != "dit":
        raise UserError(f"--scheme is of DIT's checkpoints, and {path} is none: leave it out")
    start = {} if text is None else {"text": {"name": text}}
    model, config, report = _authors(path, found, scheme, start) if found else _sam(path, names, start)
    if source not in ("auto", report["source"]):
        raise UserError(f"{path} is of {_said(report['source'])}, not of {_said(source)}: give --from {report['source']}, or "
                        "auto")  # fmt: skip
    _write(model, config, out, beside)
    said = {"file": str(out), "config": str(beside), "source": report.pop("source"), "method": config.model.name}
    said |= {"scheme": config.model.scheme if config.model.name == "dit_sam" else None, "size": config.model.size}
    parameters = sum(p.numel() for p in model.parameters())
    return said | {"tensors": len(model.state_dict()), "parameters": parameters} | report


def _said(source: str) -> str:
    return author_names.NAMES.get(source) or {"sam": "a SAM by its own names"}.get(source, "a SamModel of transformers")


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    r = result
    scheme = f", {r['scheme']}" if r["scheme"] else ""
    out = [f"{r['used']} tensors of {_said(r['source'])} are {r['tensors']} here: "
           f"{r['method']}{scheme}, {r['size']}, {r['parameters'] / 1e6:.1f} M parameters"]  # fmt: skip
    out += [f"left out: {count} {reason}" for reason, count in r["left_out"].items()]
    if r.get("fresh"):
        out.append(f"not in a SAM, fresh: {r['fresh']} tensors of the text encoder and the text's projection")
    prompt = ""
    if r.get("fresh"):
        out.append(f"to learn words: dit-ds train --config base --model.size {r['size']} "
                   f"--model.checkpoint {r['file']}")  # fmt: skip
        prompt = " --prompt box"
    return [*out, f"written: {r['file']} and {r['config']}; "
            f"next: dit-ds eval {r['file']} --split val{prompt} --data-root data_shards"]  # fmt: skip


def _authors(
    path: str | Path, source: str, scheme: str | None, given: dict[str, Any]
) -> tuple[Segmenter, RunConfig, dict[str, Any]]:
    tensors = read_tensors(path)
    found = authors.translate(tensors, path, scheme)
    config = validate(merge(merge(SETTINGS[source], {"model": found.model}), given))
    model = build_model(config, text_weights=False)
    authors.fill(model, found, path)
    left_out = {reason: len(names) for reason, names in found.left_out.items()}
    return model, config, {"used": len(tensors) - sum(left_out.values()), "left_out": left_out, "source": source}


def _sam(path: str | Path, names: dict[str, Any], given: dict[str, Any]) -> tuple[Segmenter, RunConfig, dict[str, Any]]:
    """A SAM reads points and boxes, at its own size and with its own windows; words it has yet to learn."""
    width, depth, patches = sam_size(names, path)
    size = next((n for n, s in SIZES.items() if (s.embed_dim, s.depth) == (width, depth)), None)
    side, window = (size and SIZES[size].pretrained) or (16 * patches or 1024, 0)
    model_keys = {"size": size or "vit_b", "scheme": "default", "window_size": window}  # another size is refused below
    config = validate(merge({"data": {"image_size": side, "prompts": ["point", "box"]}, "model": model_keys}, given))
    model = build_model(config)
    report = load_sam_checkpoint(model, path)
    translated = any("transformers" in note for note in report["notes"])
    left_out = {"with names that SAM does not have": n} if (n := len(report["unexpected"])) else {}
    used = len(report["loaded"])
    return model, config, {"used": used, "left_out": left_out, "fresh": len(model.state_dict()) - used,
                           "source": "transformers" if translated else "sam"}  # fmt: skip


def _write(model: Segmenter, config: RunConfig, out: Path, beside: Path) -> None:
    header: dict[str, Any] = {"step": 0, "epoch": 0, "config": config.model_dump(mode="json")}
    save_tensors({n: x.contiguous() for n, x in model.state_dict().items()}, out,
                 {"dit_ds": json.dumps(header), "format": "pt"})  # fmt: skip
    changed = _changed(header["config"], RunConfig().model_dump(mode="json"))
    changed = merge(changed, {"run_dir": f"runs/{out.stem}", "model": {"checkpoint": str(out)}})
    with atomic_write(beside) as f:
        f.write(dump_yaml(changed).encode())


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The keys that are not as by default."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            if inner := _changed(value, defaults[key]):
                out[key] = inner
        elif value != defaults.get(key):
            out[key] = value
    return out
