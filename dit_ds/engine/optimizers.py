"""The optimizers of `train.optimizer`: which parameters each takes, and at which rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_ds.config.train_schema import TrainConfig
from dit_ds.engine.rates import rate_factors

# what ends in the output: the last layers, which Muon's rule leaves to AdamW
_HEADS = (
    "mask_decoder.output_hypernetworks_mlps", "mask_decoder.iou_prediction_head",
    "predictor.mask_embed", "predictor.minimap", "predictor.no_target",
)  # fmt: skip


def no_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares where `train.weight_decay_norms` is false: those of norms, and
    relative position tables."""
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__}
    return {
        n
        for n, _ in model.named_parameters()
        if n.rpartition(".")[0] in norms or "relative_position_bias" in n or ".rel_pos_" in n
    }


def muon_matrices(model: nn.Module, t: TrainConfig) -> set[str]:
    """Names of the trained parameters that `train.optimizer` muon gives to Muon: matrices of hidden layers, none of
    embeddings, tables and heads. None for another optimizer."""
    if t.optimizer != "muon":
        return set()
    embeddings = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return {
        n
        for n, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and n.endswith(".weight")
        if n.rpartition(".")[0] not in embeddings and not n.startswith(_HEADS)
    }  # fmt: skip


def parameter_groups(model: nn.Module, t: TrainConfig) -> list[dict[str, Any]]:
    """The trained parameters by optimizer, rate and weight decay.

    Returns:
        Groups with `lr_scale`, by which the run's rate is multiplied, and of Muon with `use_muon`: AdamW's first, the
        highest rates first, and of one rate those without decay last.
    Raises:
        UserError: as `rate_factors`.
    """
    spared = set() if t.weight_decay_norms else no_decay(model)
    muon = muon_matrices(model, t)
    factors = rate_factors(model, t)
    found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = factors[name] * (t.muon_lr / t.lr if name in muon else 1.0)
            found.setdefault((name in muon, -scale, name in spared), []).append(p)
    groups = []
    for key in sorted(found):
        of_muon, scale, undecayed = key[0], -key[1], key[2]
        group = {"params": found[key], "lr": t.lr * scale, "lr_scale": scale}
        group["weight_decay"] = 0.0 if undecayed else t.weight_decay
        if t.optimizer == "muon":
            group |= {"use_muon": True, "momentum": t.muon_momentum} if of_muon else {"use_muon": False}
        groups.append(group)
    return groups


def make_optimizer(model: nn.Module, t: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over the model's trained parameters.

    Raises:
        UserError: as `parameter_groups`.
    """
    groups, adam = parameter_groups(model, t), {"lr": t.lr, "betas": t.betas, "eps": t.eps}
    if t.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **adam)
    # fused: one pass over the states, no temporaries of their size; torch has it for CUDA and for CPUs
    if t.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)  # type: ignore[arg-type]
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for p in group["params"]:
            p.use_muon = group["use_muon"]  # which ZeRO looks at
        if not group["use_muon"]:
            group |= {"betas": t.betas, "eps": t.eps}
    if device.type != "cuda" and not t.compile:  # DeepSpeed compiles Muon's iteration, which on a CPU takes long
        torch.compiler.set_stance("force_eager")
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam | {"fused": True})
