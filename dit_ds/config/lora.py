"""The section model.lora."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dit_ds.config.section import FP32, Section


class LoraConfig(Section):
    """Low-rank updates (LoRA): y = W x + alpha / rank * B A x, where A and B train and W does not."""

    rank: int = Field(16, ge=1, le=1024, description="rows of A, columns of B")
    alpha: float = Field(16.0, gt=0, le=FP32, description="B A x counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the x that A reads, in training")
    targets: list[Literal["qkv", "proj", "mlp", "text"]] = Field(
        ["qkv", "proj"],
        min_length=1,
        description="qkv, proj, mlp: these linear layers of every layer of the ViT; text: the text encoder's attention",
    )

    @property
    def of_text(self) -> bool:
        """Whether the text encoder has any."""
        return "text" in self.targets

    @property
    def of_vit(self) -> list[str]:
        """The targets in the ViT."""
        return [t for t in self.targets if t != "text"]
