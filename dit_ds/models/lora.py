"""LoRA: low-rank updates of linear layers, y = W x + alpha / rank * B A x, of which A and B train and W does not.

Own, as the ViT's `qkv` gives text its keys and values from a part of its rows, and its second MLP layer includes the
activation, which wrappers of whole modules, as `peft`'s, do not see. On a plain ViT it computes what `peft` computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_ds.config.lora import LoraConfig
from dit_ds.errors import UserError
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import linear_of_gelu


class LoRA(nn.Module):
    """The update of a linear layer's output, zero at first.

    Attributes:
        A: (rank, in_features).
        B: (out_features, rank).
    """

    def __init__(self, weight: Tensor, options: LoraConfig):
        super().__init__()
        out_features, in_features = weight.shape
        self.scale, self.dropout = options.alpha / options.rank, options.dropout
        self.A = nn.Parameter(torch.empty(options.rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, options.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as peft, and as linear layers are

    def forward(self, x: Tensor, first: int = 0, of_gelu: bool = False) -> Tensor:
        """(.., in_features) to (.., out_features - first).

        Args:
            first: only the outputs from this one on.
            of_gelu: the layer's input is gelu(x).
        """
        dropout = self.dropout if self.training else 0.0
        if of_gelu and not dropout:
            low = linear_of_gelu(x, self.A)
        else:
            low = F.linear(F.dropout(F.gelu(x) if of_gelu else x, dropout), self.A)
        return F.linear(low * self.scale, self.B[first:])

    def update(self) -> Tensor:
        """(out_features, in_features), what is added to W."""
        return self.scale * (self.B.double() @ self.A.double())


class LoRALinear(nn.Linear):
    """A linear layer with its `lora`; None once that is merged."""

    lora: LoRA | None

    @classmethod
    def of(cls, linear: nn.Linear, options: LoraConfig) -> LoRALinear:
        """With the parameters of a plain linear layer."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.lora = LoRA(linear.weight, options)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(.., in_features) to (.., out_features)."""
        out = super().forward(x)
        return out if self.lora is None else out.add_(self.lora(x))


def add_lora(model: DITSAM, options: LoraConfig) -> None:
    """Give the targets their updates, and freeze the text encoder's own weights where it has any.

    The ViT's own weights are frozen by `DITSAM`'s `freeze_image_encoder`. Random numbers are drawn for the updates
    alone, so that all else is initialised as without them.

    Raises:
        UserError: a rank larger than a layer's width, or a text encoder without linear layers of attention.
    """
    blocks: Iterable[Any] = model.image_encoder.blocks
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        if "qkv" in options.targets:
            attn.qkv.lora = LoRA(attn.qkv.weight, options)
        if "proj" in options.targets:
            attn.proj = LoRALinear.of(attn.proj, options)
        if "mlp" in options.targets:
            mlp.lin1, mlp.lin2.lora = LoRALinear.of(mlp.lin1, options), LoRA(mlp.lin2.weight, options)
    if options.of_text:
        _add_to_text(model.text_encoder.bert, options)
    width = min((min(m.weight.shape) for m, _ in updated_layers(model)), default=options.rank)
    if options.rank > width:
        raise UserError(
            f"model.lora.rank {options.rank}: a layer of {options.targets} is {width} wide: set {width} or less"
        )


def _add_to_text(encoder: nn.Module, options: LoraConfig) -> None:
    """To the linear layers of an encoder's attention that have a part in its features."""
    attentions = [m for m in encoder.modules() if "Attention" in type(m).__name__]
    found = {  # modules within one another have the same
        (parent, name): linear
        for attention in attentions
        for parent in attention.modules()
        for name, linear in parent.named_children()
        if isinstance(linear, nn.Linear) and linear.weight.requires_grad
    }
    encoder.requires_grad_(False)
    for (parent, name), linear in found.items():
        setattr(parent, name, LoRALinear.of(linear, options))
    if not found:
        kind = type(encoder).__name__
        raise UserError(
            f"model.lora.targets text: a {kind} has no linear layers of attention: leave text out, or set text.name"
        )


def updated_layers(model: nn.Module) -> Iterator[tuple[Any, LoRA]]:
    """The linear layers with an update, and it."""
    for module in model.modules():
        lora = getattr(module, "lora", None)
        if isinstance(lora, LoRA):
            yield module, lora


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Add each update to its layer's weight, and take it away; how many there were."""
    layers = list(updated_layers(model))
    for layer, lora in layers:
        layer.weight.copy_(layer.weight.double() + lora.update())
        layer.lora = None
    return len(layers)
