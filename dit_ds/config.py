"""The run configuration: typed, from YAML files that inherit from one another, with dotted overrides.

The run's YAML owns batch size, learning rate, schedule and epochs; the DeepSpeed JSON that it names owns sharding,
precision, offload and the micro-batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dit_ds.combinations import check_combinations
from dit_ds.errors import UserError
from dit_ds.files import atomic_write


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataConfig(_Section):
    """Which expressions, at what size, in what order."""

    root: str = Field("data_shards", description="folder that `dit-ds data shard` wrote to")
    dataset: str = Field("refcoco", description="refcoco, refcoco+, refcocog, ...")
    split_by: str = Field("unc", description="unc, google, umd, ...")
    train_split: str = Field("train", description="split to train on")
    val_split: str = Field("val", description="split to evaluate during training")
    image_size: int = Field(
        512, gt=0, multiple_of=16, description="longer side after resizing, and side of the padded square, in pixels"
    )
    resize: Literal["pad", "stretch"] = Field(
        "pad", description="pad: keep the aspect ratio and pad, as SAM; stretch: to the square, as LAVT and ReLA"
    )
    tokens: int = Field(20, ge=3, description="tokens an expression is cut or padded to, [CLS] and [SEP] included")
    unit: Literal["ref", "sentence"] = Field(
        "ref", description="what an epoch runs over: one sentence of each ref (the paper's code), or every sentence"
    )
    workers: int = Field(4, ge=0, description="loader processes a rank; 0 loads in the training process")
    prompts: list[Literal["text", "point", "box"]] = Field(
        ["text"],
        min_length=1,
        description="what tells the model which object is meant: text, point, box; of several, each sample draws one "
        "(the paper's Table 6)",
    )
    points: int = Field(5, ge=1, description="points of a point prompt, drawn on the mask")
    mask_rule: Literal["half", "any", "soft"] = Field(
        "half",
        description="what of a pixel counts in the resized mask to train on: half, in where at least half of what it "
        "covers was; any, where any was, and soft, the share that was, as the paper's released code",
    )
    scales: list[int] = Field(
        [],
        description="training only: the longer side is drawn from these sizes, in pixels, none larger than image_size; "
        "none: always image_size",
    )
    color: float = Field(0.4, ge=0, lt=1, description="brightness, contrast and saturation vary by up to this share")
    blur: float = Field(0.5, ge=0, le=1, description="probability of a Gaussian blur")
    flip: float = Field(
        0.5, ge=0, le=1, description="probability of a horizontal flip, left and right swapped in the words"
    )


class ModelConfig(_Section):
    """SAM and how words enter it; or another method, to compare with."""

    name: Literal["dit_sam", "lavt", "rela"] = Field("dit_sam", description="the method; LAVT and ReLA to compare with")
    size: Literal["vit_t", "vit_b", "vit_l", "vit_h", "swin_b", "swin_t_tiny"] = Field(
        "vit_b", description="SAM's sizes, and vit_t for CPUs; of lavt and rela: swin_b, and swin_t_tiny for CPUs"
    )
    scheme: str = Field(
        "layer_wise",
        description="default: words meet the image in the mask decoder only; end_to_end: E-DIT, equations 4-7; "
        "layer_wise: L-DIT, equation 8; cascade: Table 9's; cross_attention, cross_attention_ffn: Table 4's",
    )
    word_init: Literal["auto", "zero", "uniform"] = Field(
        "auto",
        description="what the words' projections into the ViT start from: zero weights, much as the paper's released "
        "code, so that all words are one blank token at first; uniform, PyTorch's; auto: zero where model.checkpoint is "
        "given",
    )
    adapters: Literal["frozen", "always", "never"] = Field(
        "frozen",
        description="end_to_end's linear layer on the words between two layers: where the ViT is frozen (the paper), "
        "always (its released code), or never",
    )
    static_tokens: int = Field(0, ge=0, description="learnable tokens beside the words in each layer (Table 2)")
    static_form: Literal["concat", "add"] = Field(
        "concat",
        description="concat: beside the words; add: onto them, one for each of data.tokens (the released code)",
    )
    decoder_layers: int = Field(2, ge=1, description="layers of the mask decoder's transformer; SAM has 2")
    checkpoint: str | None = Field(
        None,
        description="official sam_vit_*.pth to start from, of lavt and rela a folder with a Swin of transformers; none "
        "starts from random weights",
    )
    freeze_image_encoder: bool = Field(False, description="train the projections and the decoder, not SAM's ViT")
    freeze_mask_decoder: bool = Field(False, description="don't train the mask decoder and the prompts' embeddings")
    freeze_projections: bool = Field(
        False,
        description="freeze the words' way into the ViT together with it, as the paper's released code: with "
        "word_init zero, what they say then never enters",
    )
    mask_padding: bool = Field(
        True,
        description="padding is no word: not attended to in the ViT, SAM's not_a_point in the decoder; false: as the "
        "paper's released code",
    )
    align_corners: bool = Field(
        False, description="of the logits' bilinear upsampling; true in the paper's released code"
    )
    attention: Literal[
        "auto", "eager", "chunked", "sdpa", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "xformers", "naive"
    ] = Field(
        "auto",
        description="attention backend; auto: the fastest here; naive: layers over the whole concatenation, as the "
        "paper's released code, to compare with; of lavt and rela: auto, eager or sdpa",
    )
    window_size: int = Field(
        0,
        ge=0,
        description="0: all layers of the ViT attend globally (the paper's code); 14: all but four in windows, as SAM",
    )
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the words that enter the ViT; 0.1 in the paper's released code"
    )


class TextConfig(_Section):
    """The text encoder."""

    name: str = Field(
        "bert-base-uncased",
        description="a BERT or a CLIP of transformers: hub id, folder, or package:NAME for an installed package",
    )
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not with the encoder")
    layers: int | None = Field(None, ge=1, description="use the first so many layers only; none for all")
    random_init: bool = Field(False, description="the encoder's architecture with fresh weights")
    freeze: bool = Field(False, description="don't train the text encoder")
    cache: int = Field(0, ge=0, description="remember a frozen encoder's features of so many expressions (for CPUs)")


class TrainConfig(_Section):
    """Optimisation. The defaults are the paper's (section 4.2)."""

    batch_size: int = Field(64, ge=1, description="global batch; what a rank takes at once is the DeepSpeed JSON's")
    epochs: int = Field(40, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps; none for all epochs")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's betas")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW); 0 is the paper's Adam")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then evaluated; 0 keeps none"
    )
    nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="a step whose gradient is not finite is left out and counted, or ends the run"
    )
    warmup_epochs: float = Field(3.0, ge=0, description="the learning rate rises linearly for so many epochs")
    decay_norms: bool = Field(True, description="false: no weight decay of norms and relative position tables")
    min_lr: float = Field(0.0, ge=0, description="where the schedule cosine ends")
    schedule: Literal["step", "cosine", "poly"] = Field(
        "step", description="step: times decay at each milestone; cosine: to min_lr; poly: (1 - done)^poly_power"
    )
    poly_power: float = Field(0.9, gt=0, description="of the schedule poly")
    milestones: list[float] = Field([30.0, 35.0], description="epochs at which the learning rate drops")
    decay: float = Field(0.2, gt=0, le=1, description="what it drops by at each milestone")
    gradient_clipping: float = Field(0.0, ge=0, description="largest norm of the gradient; 0 leaves it as it is")
    activation_checkpointing: str = Field(
        "none",
        pattern=r"^(none|block|selective|every_[1-9][0-9]*)$",
        description="what of the ViT is computed again instead of kept: none, block (each layer), every_K (K layers at "
        "a time), selective (each layer but its attention)",
    )
    compile: bool = Field(False, description="torch.compile the layers of the ViT")
    dice_weight: float = Field(0.0, ge=0, description="weight of a Dice loss beside the paper's BCE")


class EvalConfig(_Section):
    """Evaluation, in training and by `dit-ds eval`."""

    every_epochs: int = Field(1, ge=0, description="evaluate after so many epochs, and after the last; 0: never")
    batch_size: int = Field(16, ge=1, description="expressions at once on a rank")
    threshold: float = Field(
        0.35, gt=0, lt=1, description="a pixel is in if its probability exceeds this (paper section 4.2)"
    )
    mask_rule: Literal["probability", "resize_then_any"] = Field(
        "probability",
        description="probability: thresholded at the image's own size; resize_then_any: as the paper's released code, "
        "thresholded before the mask is resized, of which then all above 0 is in",
    )


class DeepSpeedConfig(_Section):
    """DeepSpeed."""

    config: str = Field(
        "configs/deepspeed/zero2.json", description="DeepSpeed JSON: sharding, precision, offload, micro-batch"
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        None, description="of weights, gradients and communication, over what that JSON says; none leaves it"
    )
    override: dict[str, Any] = Field(
        default_factory=dict,
        description="keys laid over that JSON, e.g. --deepspeed.override.train_micro_batch_size_per_gpu 4",
    )


class CheckpointConfig(_Section):
    """What is saved, when, and what is kept."""

    every_epochs: int = Field(1, ge=1, description="save after so many epochs, and after the last")
    every_steps: int | None = Field(None, ge=1, description="save after so many steps, too")
    every_minutes: float | None = Field(None, gt=0, description="save so many minutes after the last save, too")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best")
    asynchronous: bool = Field(
        True, description="write in the background, from a copy in host memory; false: training waits for the disk"
    )
    frozen: Literal["store", "leave_out"] = Field(
        "store",
        description="weights that don't train: one file a run, by its hash, linked into each checkpoint; or left out, to "
        "be found again in model.checkpoint and text.name",
    )
    on_full_disk: Literal["stop", "go_on"] = Field(
        "stop", description="when a checkpoint can't be written; the former one stays whole either way"
    )


class LogConfig(_Section):
    """What is reported."""

    every_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write tensorboard/ in the run's folder")
    samples: bool = Field(False, description="write the sample numbers of every step to samples/rank_*.jsonl")
    stall_seconds: float = Field(
        300, gt=0, description="name the rank for which all others wait after so many seconds without a micro-batch"
    )


class RunConfig(_Section):
    """Everything a run depends on. The resolved form is saved as config.yaml in its folder."""

    run_dir: str = Field("runs/dit", description="the run's folder")
    seed: int = Field(0, ge=0, description="of weights, sample order and augmentation")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    def save(self, path: str | Path) -> None:
        """Write as YAML, atomically."""
        with atomic_write(path) as f:
            f.write(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False).encode())


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, the files it is based on (`base: other.yaml`), and overrides `--a.b value` or `--a.b=value`.

    Raises:
        UserError: a missing or malformed file, an unknown key (with the nearest one), a value of the wrong type.
    """
    values = _read_yaml(Path(path), seen=())
    for key, value in _parse_overrides(overrides or []):
        _set(values, key, value)
    return validate(values)


def validate(values: dict[str, Any]) -> RunConfig:
    """Check a nested dict against the schema; the first thing wrong becomes a one-line `UserError`."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(str(p) for p in error["loc"])
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, field_names(), 1, cutoff=0.5)
            hint = f": did you mean '{near[0]}'?" if near else ": see 'dit-ds train --help'"
            raise UserError(f"unknown key '{key}'{hint}") from None
        hint = ""
        if error["type"] == "literal_error":
            options = [o.strip(" '") for o in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
            near = difflib.get_close_matches(str(error["input"]), options, 1)
            hint = f": did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}{hint}") from None
    check_combinations(config)
    return config


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path} is based on itself: remove the 'base' that closes the circle")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as e:
        raise UserError(f"cannot read the configuration {path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, as configs/base.yaml does")
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(_read_yaml(path.parent / base, (*seen, path)), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def _parse_overrides(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise UserError(f"'{option}' has no key before it: overrides read --section.key value")
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{option} has no value: overrides read --section.key value")
            text = rest.pop(0)
        try:
            yield key, yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{option}: '{text}' is not a YAML value") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"unknown key '{key}': '{section}' has no keys of its own")
        values = inner
    values[last] = value


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(dotted name, default, type, meaning) of every field."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True)
            label = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            yield f"{prefix}{name}", default, label.replace("typing.", ""), info.description or ""


def field_names() -> list[str]:
    """All dotted names, and those of the sections."""
    names = [name for name, *_ in fields()]
    return names + sorted({n.rpartition(".")[0] for n in names if "." in n})


def help_text() -> str:
    """Every field with its meaning and default, for `--help`."""
    lines = ["configuration keys (in YAML, or as --key value):"]
    for name, default, kind, meaning in fields():
        lines.append(f"  --{name}  [{kind}; default {default}]\n        {meaning}")
    return "\n".join(lines)
