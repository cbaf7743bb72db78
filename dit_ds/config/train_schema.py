"""The section `train` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dit_ds.config.section import FP32, MOST, Section

ACTIVATION_CHECKPOINTING = "none|block|selective|every_[1-9][0-9]*"  # see `ImageEncoder.checkpoint_activations`

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Scale = Annotated[float, Field(ge=0, le=1000)]


class LRScale(Section):
    """What the learning rate is multiplied by, for each part of the model."""

    image_encoder: _Scale = Field(1.0, description="learning rate of the image encoder, times train.lr")
    text_encoder: _Scale = Field(1.0, description="learning rate of the text encoder, times train.lr")
    mask_decoder: _Scale = Field(
        1.0, description="learning rate of the mask decoder and the prompts' embeddings, times train.lr"
    )
    projections: _Scale = Field(
        1.0,
        description="learning rate of what brings the text to the image (the text's projections and static tokens; of "
        "lavt and rela the fusion with the words), times train.lr",
    )


class TrainConfig(Section):
    """Optimisation. The defaults are the paper's (section 4.2)."""

    batch_size: int = Field(
        64, ge=1, le=MOST, description="global batch; what a rank takes at once is the DeepSpeed JSON's"
    )
    epochs: int = Field(40, ge=1, le=MOST, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, le=MOST, description="stop after so many optimizer steps; none for all epochs"
    )
    lr: float = Field(1e-4, gt=0, le=FP32, description="learning rate of AdamW")
    optimizer: Literal["adamw", "muon", "adamw_8bit"] = Field(
        "adamw",
        description="adamw; muon: DeepSpeed's Muon for the matrices of hidden layers, AdamW for all else, at ZeRO stages 1 "
        "and 2; adamw_8bit: bitsandbytes' AdamW, its two moments in 8 bits (pip install 'dit-ds[8bit]')",
    )
    muon_lr: float = Field(
        0.02,
        gt=0,
        le=FP32,
        description="learning rate of Muon's matrices; it follows the schedule and lr_scale as train.lr",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    lr_scale: LRScale = Field(default_factory=LRScale)
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="the ViT's learning rate falls by this factor from each layer to the one before it, from its neck down to "
        "its embeddings (BEiT's and MAE's rule); 1: the same in all",
    )
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.999), description="Adam's betas")
    eps: float = Field(1e-8, gt=0, le=1, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, le=FP32, description="decoupled weight decay (AdamW); 0 is the paper's Adam")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then evaluated; 0 keeps none"
    )
    on_nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="a step whose gradient is not finite is left out and counted, or ends the run"
    )
    warmup_epochs: float = Field(3.0, ge=0, le=MOST, description="the learning rate rises linearly for so many epochs")
    weight_decay_norms: bool = Field(True, description="false: no weight decay of norms and relative position tables")
    min_lr: float = Field(0.0, ge=0, le=FP32, description="where the schedule cosine ends")
    schedule: Literal["step", "cosine", "poly"] = Field(
        "step", description="step: times decay at each milestone; cosine: to min_lr; poly: (1 - done)^poly_power"
    )
    poly_power: float = Field(0.9, gt=0, le=100, description="of the schedule poly")
    milestones: list[Annotated[float, Field(ge=0, le=MOST)]] = Field(
        [30.0, 35.0], description="epochs at which the learning rate drops"
    )
    lr_decay: float = Field(0.2, gt=0, le=1, description="what it drops by at each milestone")
    gradient_clipping: float = Field(
        0.0, ge=0, le=FP32, description="largest norm of the gradient; 0 leaves it as it is"
    )
    activation_checkpointing: str = Field(
        "none",
        pattern=f"^({ACTIVATION_CHECKPOINTING})$",
        description="what of the ViT is recomputed in backward instead of saved: none, block (each layer), every_K (K "
        "layers at a time), selective (each layer but its attention)",
    )
    compile: bool = Field(False, description="torch.compile the layers of the ViT")
    dice_weight: float = Field(0.0, ge=0, le=FP32, description="weight of a Dice loss beside the paper's BCE")
