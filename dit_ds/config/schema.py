"""The run configuration: every key, its type, its default and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dit_ds.config.lora import LoraConfig
from dit_ds.config.section import LONGEST as _LONGEST
from dit_ds.config.section import MOST as _MOST
from dit_ds.config.section import Section
from dit_ds.config.train_schema import TrainConfig
from dit_ds.config.yaml_text import RESOLVED, dump_yaml
from dit_ds.files import atomic_write, is_url

# of the grid: the widest for which the kernels of `model.attention triton` were compiled and held to their registers
TRITON_COLUMNS = 64


class DataConfig(Section):
    """The dataset, its prompts, augmentation and loading."""

    root: str = Field(
        "data_shards",
        description="folder that `dit-ds data shard` wrote to; in a file, beside that file or else in the working directory",
    )
    dataset: str = Field("refcoco", description="refcoco, refcoco+, refcocog, ...")
    split_by: str = Field("unc", description="unc, google, umd, ...")
    train_split: str = Field("train", description="split to train on")
    val_split: str = Field("val", description="split to evaluate during training")
    val_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="for a set without a split to evaluate on: this share of the training images, chosen by a hash of "
        "their ids, is not trained on, and is val_split; 0: none",
    )
    val_dataset: str | None = Field(None, description="dataset of val_split, if not the one that is trained on")
    val_split_by: str | None = Field(None, description="split_by of val_split, if not the one that is trained on")
    mixture: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        {},
        description="several sets to train on instead of dataset and split_by, as {refcoco/unc: 1, refcocog/umd: 0.5}: "
        "how often an epoch sees each of its samples; images of their val and test splits are left out",
    )
    reader: Literal["auto", "map", "stream"] = Field(
        "auto",
        description="map: reads samples of local shards where they lie; stream: reads shards from front to back, through "
        "webdataset; auto: stream where root is a URL (https://, s3://, pipe:cat ..)",
    )
    order: Literal["auto", "global", "shards"] = Field(
        "auto",
        description="global: an epoch's samples in any order; shards: as many random shards side by side as a batch has "
        "samples, which streams can follow; auto: what the reader can",
    )
    max_bad_samples: int = Field(
        0, ge=0, le=_MOST, description="damaged samples that a run may skip, named in the log; 0: the first one ends it"
    )
    worker_timeout: float = Field(
        300, gt=0, le=_LONGEST, description="seconds without a batch after which loader workers count as stalled"
    )
    image_size: int = Field(
        512,
        gt=0,
        le=8192,
        multiple_of=16,
        description="longer side after resizing, and side of the padded square, in pixels",
    )
    resize: Literal["pad", "stretch"] = Field(
        "pad", description="pad: keep the aspect ratio and pad, as SAM; stretch: to the square, as LAVT and ReLA"
    )
    tokens: int = Field(
        20, ge=3, le=4096, description="tokens an expression is cut or padded to, [CLS] and [SEP] included"
    )
    unit: Literal["ref", "sentence", "image"] = Field(
        "ref",
        description="what an epoch runs over: one sentence of each ref (the paper's code), every sentence, or images: as "
        "ref, with all refs of an image in one step",
    )
    workers: int = Field(4, ge=0, le=1024, description="loader processes a rank; 0 loads in the training process")
    prompts: list[Literal["text", "point", "box"]] = Field(
        ["text"],
        min_length=1,
        description="what tells the model which object is meant: text, point, box; of several, each sample draws one "
        "(the paper's Table 6)",
    )
    points: int = Field(5, ge=1, le=1000, description="points of a point prompt, drawn on the mask")
    train_mask_rule: Literal["half", "any", "soft"] = Field(
        "half",
        description="what of a pixel counts in the resized mask to train on: half, in where at least half of what it "
        "covers was; any, where any was, and soft, the share that was, as the paper's released code",
    )
    on_vanished_target: Literal["keep", "skip"] = Field(
        "keep",
        description="what is trained on where train_mask_rule leaves nothing of a target at this size: keep, its pixel "
        "that was covered most; skip, the sample counts nothing; `dit-ds data stats --config` counts them",
    )
    scales: list[Annotated[int, Field(ge=16, le=8192)]] = Field(
        [],
        description="training only: the longer side is drawn from these sizes, in pixels, none larger than image_size; "
        "none: always image_size",
    )
    color_jitter: float = Field(
        0.4, ge=0, lt=1, description="brightness, contrast and saturation vary by up to this share"
    )
    blur: float = Field(0.5, ge=0, le=1, description="probability of a Gaussian blur")
    flip: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability of a horizontal flip, left and right swapped in the text; a picture whose text has "
        "other words of direction is not flipped",
    )
    augment_on: Literal["cpu", "device"] = Field(
        "cpu",
        description="where training pictures are resized and augmented: cpu, by the loader's workers; device, a batch at "
        "once on the GPU, the workers only decode (same draws, same masks, pixels to one level of 255); without a GPU as cpu",
    )

    @property
    def default_prompt(self) -> str:
        """The kind of prompt to evaluate with unless another is asked for: text, if the model is trained on it."""
        return "text" if "text" in self.prompts else self.prompts[0]

    @property
    def train_sets(self) -> dict[str, float]:
        """DATASET/SPLIT_BY of each training set, and its weight."""
        return self.mixture or {f"{self.dataset}/{self.split_by}": 1.0}

    @property
    def val_set(self) -> str:
        """DATASET/SPLIT_BY of the evaluation set: by default the first training set, or the first part of a combined one.

        With `val_fraction` it is the training set.
        """
        train_set = next(iter(self.train_sets))
        if self.val_fraction:
            return train_set
        dataset, split_by = (part.split(",")[0] for part in train_set.split("/"))
        return f"{self.val_dataset or dataset}/{self.val_split_by or split_by}"

    @property
    def streamed(self) -> bool:
        """Whether shards are read as streams, from front to back."""
        return self.reader == "stream" or self.reader == "auto" and is_url(self.root)

    @property
    def sample_order(self) -> str:
        """`global` or `shards`, `auto` resolved."""
        return ("shards" if self.streamed else "global") if self.order == "auto" else self.order


class ModelConfig(Section):
    """SAM and how text enters it; or another method, to compare with."""

    name: Literal["dit_sam", "lavt", "rela"] = Field("dit_sam", description="the method; LAVT and ReLA to compare with")
    size: Literal["vit_t", "vit_b", "vit_l", "vit_h", "swin_b", "swin_t_tiny"] = Field(
        "vit_b", description="SAM's sizes, and vit_t for CPUs; of lavt and rela: swin_b, and swin_t_tiny for CPUs"
    )
    scheme: Literal["default", "end_to_end", "layer_wise", "cascade", "cross_attention", "cross_attention_ffn"] = Field(
        "layer_wise",
        description="default: text meets the image in the mask decoder only; end_to_end: E-DIT, equations 4-7; "
        "layer_wise: L-DIT, equation 8; cascade: Table 9's; cross_attention, cross_attention_ffn: Table 4's",
    )
    scheme_form: Literal["paper", "released"] = Field(
        "paper",
        description="the scheme as the paper's text has it, or as its released code, where that is another: "
        "cross_attention's keys are then the text tokens that left the former layer; cross_attention_ffn, and "
        "layer_wise with static tokens, have no projections (but one for all layers, where the text is not as wide as "
        "the ViT); end_to_end's adapters start at zero, with dropout behind each",
    )
    word_init: Literal["auto", "zero", "uniform"] = Field(
        "auto",
        description="initial weights of the text's projections into the ViT, in schemes that have some: zero, much as the "
        "paper's released code, so that all text tokens are equal at first; uniform, PyTorch's; auto: zero where "
        "model.checkpoint is given",
    )
    adapters: Literal["frozen", "always", "never"] = Field(
        "frozen",
        description="end_to_end's linear layer on the text between two layers: where the ViT is frozen (the paper), "
        "always (its released code, but for static tokens), or never",
    )
    static_tokens: int = Field(0, ge=0, le=4096, description="learnable tokens beside the text in each layer (Table 2)")
    static_form: Literal["concat", "add"] = Field(
        "concat",
        description="concat: beside the text tokens; add: onto them, one for each of data.tokens (the released code)",
    )
    decoder_layers: int = Field(2, ge=1, le=64, description="layers of the mask decoder's transformer; SAM has 2")
    checkpoint: str | None = Field(
        None,
        description="file to start from, with all of SAM in it: an official sam_vit_*.pth, a SamModel of transformers "
        "(file or folder), or what dit-ds export wrote; of lavt and rela a folder with a Swin of transformers; in a YAML file "
        "beside it, or else in the working directory; none starts from random weights",
    )
    freeze_image_encoder: bool = Field(False, description="train the projections and the decoder, not SAM's ViT")
    freeze_mask_decoder: bool = Field(False, description="don't train the mask decoder and the prompts' embeddings")
    freeze_projections: bool = Field(
        False,
        description="freeze the text's projections into the ViT together with it, as the paper's released code: with "
        "word_init zero, the text then never enters",
    )
    mask_padding: bool = Field(
        True,
        description="padding is no word: not attended to in the ViT, SAM's not_a_point in the decoder; false: as the "
        "paper's released code",
    )
    align_corners: bool = Field(
        False, description="of the logits' bilinear upsampling; true in the paper's released code; lavt's always are"
    )
    attention: Literal[
        "auto",
        "eager",
        "chunked",
        "sdpa",
        "sdpa_efficient",
        "sdpa_flash",
        "sdpa_cudnn",
        "flash3",
        "flash4",
        "xformers",
        "triton",
        "naive",
    ] = Field(  # fmt: skip
        "auto",
        description="attention backend; auto: the fastest here, on GPUs by measurement; sdpa: on GPUs the fastest of its "
        "three; triton: kernels of our own, not yet run on a GPU; naive: layers over the whole concatenation, as the "
        "paper's released code, to compare with; of lavt and rela: auto, eager or sdpa",
    )
    window_size: int = Field(
        0,
        ge=0,
        le=512,
        description="0: all layers of the ViT attend globally (the paper's code); 14: all but four in windows, as SAM",
    )
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the text that enters the ViT; 0.1 in the paper's released code"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train low-rank updates of linear layers (LoRA); the encoder's own weights are then frozen. none: no LoRA",
    )

    @property
    def image_encoder_frozen(self) -> bool:
        """Whether SAM's ViT keeps its own weights: with `freeze_image_encoder`, or under LoRA."""
        return self.freeze_image_encoder or (self.lora is not None and bool(self.lora.of_vit))

    @property
    def aligns_corners(self) -> bool:
        """Whether the logits' upsampling aligns corners: as `align_corners` says, and always LAVT's."""
        return self.align_corners or self.name == "lavt"

    @property
    def has_no_target_head(self) -> bool:
        """Whether the model has an output that says that there is no target."""
        return self.name == "rela"


class TextConfig(Section):
    """The text encoder."""

    name: str = Field(
        "bert-base-uncased",
        description="a BERT, a CLIP or another text encoder of transformers: hub id, folder, or package:NAME for an "
        "installed package",
    )
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not with the encoder")
    layers: int | None = Field(None, ge=1, le=1000, description="use the first so many layers only; none for all")
    random_init: bool = Field(False, description="the encoder's architecture with fresh weights")
    freeze: bool = Field(False, description="don't train the text encoder")
    cache: int = Field(
        0, ge=0, le=_MOST, description="remember a frozen encoder's features of so many expressions (for CPUs)"
    )


class EvalConfig(Section):
    """Evaluation, in training and by `dit-ds eval`."""

    every_epochs: int = Field(
        1, ge=0, le=_MOST, description="evaluate after so many epochs, and after the last; 0: never"
    )
    batch_size: int = Field(16, ge=1, le=_MOST, description="expressions at once on a rank")
    threshold: float = Field(
        0.35, gt=0, lt=1, description="a pixel is in if its probability exceeds this (paper section 4.2)"
    )
    mask_rule: Literal["probability", "resize_then_any"] = Field(
        "probability",
        description="probability: thresholded at the image's own size; resize_then_any: as the paper's released code, "
        "thresholded before the mask is resized, of which then all above 0 is in",
    )
    no_target_pixels: int = Field(
        50,
        ge=0,
        le=_MOST,
        description="a predicted mask of fewer pixels says that there is no target; in sets with such expressions only "
        "(gRefCOCO); not of rela, whose no-target head says it",
    )


class DeepSpeedConfig(Section):
    """DeepSpeed."""

    config: str = Field(
        "zero2",
        description="DeepSpeed JSON: sharding, precision, offload, micro-batch; a file, or the name of one that comes with "
        "dit-ds: zero0 to zero3, zero2_offload, zero3_offload, zero3_hpz",
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        None, description="of weights, gradients and communication, overrides that JSON; none leaves it"
    )
    override: dict[str, Any] = Field(
        default_factory=dict,
        description="keys laid over that JSON, e.g. --deepspeed.override.train_micro_batch_size_per_gpu 4",
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, of what, and how many are kept."""

    every_epochs: int = Field(1, ge=1, le=_MOST, description="save after so many epochs, and after the last")
    every_steps: int | None = Field(None, ge=1, le=_MOST, description="save after so many steps, too")
    every_minutes: float | None = Field(
        None, gt=0, le=_LONGEST, description="save so many minutes after the last save, too"
    )
    keep: int = Field(2, ge=1, le=_MOST, description="newest checkpoints to keep, besides the best")
    asynchronous: bool = Field(
        True, description="write in the background, from a copy in host memory; false: training waits for the disk"
    )
    local: str | None = Field(
        None,
        description="folder on each node's own disk (/scratch/$USER, with variables of the environment) where checkpoints are "
        "written first, with a copy of each rank's part on another node; run_dir gets its checkpoints from there, in the "
        "background; none: run_dir alone",
    )
    local_every_minutes: float = Field(
        1.0, gt=0, le=_LONGEST, description="minutes between two saves to checkpoint.local, beside those to run_dir"
    )
    frozen: Literal["store", "leave_out"] = Field(
        "store",
        description="weights that don't train: one file a run, by its hash, linked into each checkpoint; or left out, and "
        "read from model.checkpoint and text.name when the checkpoint is loaded",
    )
    on_full_disk: Literal["stop", "go_on"] = Field(
        "stop",
        description="when a checkpoint, metrics or the log can't be written; the former checkpoint stays whole either way. "
        "go_on: lines wait in memory, and are written when there is room",
    )


class LogConfig(Section):
    """Metrics, logs and the watchdog's limit."""

    every_steps: int = Field(10, ge=1, le=_MOST, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write tensorboard/ in the run's folder")
    samples: bool = Field(False, description="write the sample numbers of every step to samples/rank_*.jsonl")
    stall_seconds: float = Field(
        300,
        gt=0,
        le=_LONGEST,
        description="name the rank for which all others wait after so many seconds without a micro-batch; after twice as "
        "many the run ends with status 76, but while it saves",
    )


class RunConfig(Section):
    """Everything a run depends on. The resolved form is saved as config.yaml in its folder."""

    run_dir: str = Field(
        "runs/dit", description="the run's folder; relative to the working directory, wherever it is written down"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of weights, sample order and augmentation")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    def save(self, path: str | Path) -> None:
        """Write as YAML, atomically. `load_config` reads it back to the same values."""
        with atomic_write(path) as f:
            f.write(RESOLVED.encode() + dump_yaml(self.model_dump(mode="json")).encode())
