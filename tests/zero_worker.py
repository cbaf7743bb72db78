"""A rank of `test_checkpointing` and `test_zero`: a few steps under each setting asked for; rank 0 prints one JSON object.

torchrun --nproc_per_node 2 tests/zero_worker.py '[{"stage": 2, "policy": "block"}, ..]'
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from conftest import MINILM, ROOT

from dit_ds.config.load import validate
from dit_ds.distributed import connect, disconnect, gather_values
from dit_ds.engine import engine as ds
from dit_ds.engine.zero_state import TrainingState
from dit_ds.models import attention
from dit_ds.models.build import build_model
from dit_ds.models.losses import segmentation_loss
from dit_ds.training.schedule import set_learning_rate


def count_attention() -> list[int]:
    """Count what the operator's forward computes, at its kernel: [calls]."""
    calls, kernels = [0], attention.KERNELS
    attention.require("chunked", "cpu", torch.float32)  # its trial run is not to count
    chunked = kernels["chunked"]("cpu")

    def forward(x):
        calls[0] += 1
        return chunked.forward(x)

    kernels["chunked"] = lambda device: chunked._replace(forward=forward)
    return calls


def configuration(
    world, stage: int | str, policy: str, dropout: bool, freeze_image: bool = False, zero: dict | None = None,
    model: dict | None = None, **train
):  # fmt: skip
    """A tiny model; with dropout in a trained BERT and of the words, or with none anywhere.

    Args:
        stage: names one of configs/deepspeed, as 2 or 2_offload.
        zero: laid over its `zero_optimization`.
        model: over the model's section.
    """
    return validate(
        {
            "model": {
                "size": "vit_t",
                "word_dropout": 0.2 * dropout,
                "attention": "chunked",
                "freeze_image_encoder": freeze_image,
            }
            | (model or {}),
            "data": {"image_size": 64},
            "text": {"name": MINILM, "layers": 1, "freeze": not dropout},
            "train": {"batch_size": 4, "lr": 1e-3, "activation_checkpointing": policy} | train,
            "deepspeed": {
                "config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                "override": {
                    "bf16": {"enabled": False},
                    "train_micro_batch_size_per_gpu": 4 // world.world_size,
                    "zero_optimization": zero or {},
                },
            },
        }
    )


def batch_of(step: int, samples: slice) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """A step's inputs and masks, those samples of the four."""
    g = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (4, 3, 64, 64), generator=g, dtype=torch.uint8)
    tokens = torch.randint(1000, 3000, (4, 20), generator=g)
    mask = torch.rand(4, 64, 64, generator=g) > 0.5
    size = torch.tensor([[64, 64], [48, 64], [64, 40], [64, 64]])
    token_mask = torch.arange(20) < torch.tensor([[6], [12], [3], [20]])
    return tuple(x[samples] for x in (image, size, tokens, token_mask)), mask[samples]


def run(world, calls, stage: int | str, policy: str = "none", compile: bool = False, dropout: bool = True,
        plain: bool = False, steps: int = 3, nan_at: int | None = None, **train) -> dict:  # fmt: skip
    """Losses of this rank, final weights' norms, attention's forwards a step, updates left out.

    Args:
        plain: compare with plain PyTorch's AdamW on the whole batch: `loss_error`, `weight_error` and `ema_error`, the
            largest; and whether the weights are back, to the bit, after the moving average had their place: `back`.
        nan_at: the step in which the last rank's loss is not a number.
        train: keys of the configuration's `train`.
    """
    config = configuration(world, stage, policy, dropout, **train)
    model = build_model(config)
    model.image_encoder.checkpoint_activations(policy)
    if compile:
        model.image_encoder.compile_blocks()
    engine = ds.initialize(model, config, world)
    trained = TrainingState(engine, config.train.ema_decay)
    trained.check_coverage()
    engine.train()
    set_learning_rate(engine, config.train.lr)
    calls[0], losses, norms = 0, [], []
    each = 4 // world.world_size
    for step in range(steps):
        torch.manual_seed(100 * step + world.rank)
        inputs, mask = batch_of(step, slice(world.rank * each, (world.rank + 1) * each))
        weight = torch.ones(each)
        if step == nan_at and world.rank == world.world_size - 1:
            weight = weight * float("nan")
        loss = segmentation_loss(engine(*inputs), mask, weight)
        engine.backward(loss)
        norms.append(ds.step(engine))
        if math.isfinite(norms[-1]):
            trained.update_average()
        losses.append(loss.item())
    attention_calls = calls[0] / steps
    state = {n: trained.full_tensor("master", n) for n in trained.names}
    result = {
        "losses": losses,
        "weights": {n: state[n].double().norm().item() for n in sorted(state)},
        "attention_calls": attention_calls,
        "left_out": [i for i, n in enumerate(norms) if not math.isfinite(n)],
        "counted": engine.skipped_steps,
        "adam_step": trained.adam_step,
    }
    if plain:
        want_losses, want, want_average = plain_adamw(build_model(config), config, steps, nan_at)
        mean_losses = gather_values(losses, world.device).mean(0).tolist()
        result["loss_error"] = max(abs(a - b) / b for a, b in zip(mean_losses, want_losses) if b == b)
        result["weight_error"] = max((state[n] - want[n]).abs().max().item() for n in want)
    if plain and config.train.ema_decay:
        inputs, _ = batch_of(99, slice(world.rank * each, (world.rank + 1) * each))
        engine.eval()
        before = engine(*inputs)
        with ds.averaged(trained):
            averaged = engine(*inputs)
        result["back"] = torch.equal(before, engine(*inputs)) and all(
            torch.equal(state[n], trained.full_tensor("master", n)) for n in state
        )
        other = build_model(config).eval()
        other.load_state_dict(want_average, strict=False)
        with torch.no_grad():
            result["ema_error"] = (averaged - other(*inputs)).abs().max().item()
            result["ema_matters"] = (averaged - before).abs().max().item()
    return result


def rate_by_hand(name: str, t) -> float:
    """A parameter's rate as a factor, of the tiny ViT of four layers: spelt out, not by the package's rules."""
    if name.startswith(("image_encoder.instruction.", "image_encoder.static_tokens.", "text_projection.")):
        return t.lr_scale.projections
    if name.startswith(("mask_decoder.", "prompt_encoder.")):
        return t.lr_scale.mask_decoder
    if name.startswith("text_encoder."):
        return t.lr_scale.text_encoder
    layer = {"patch_embed": 0, "pos_embed": 0, "neck": 5}.get(name.split(".")[1])
    if layer is None:
        layer = int(name.split(".")[2]) + 1
    factor = t.lr_scale.image_encoder
    for _ in range(layer, 5):
        factor *= t.layer_decay
    return factor


def muon_by_hand(name: str, p: torch.Tensor) -> bool:
    """Whether Muon takes a parameter of the tiny model: weights of linear layers but the mask's last ones."""
    tables = ("rel_pos", "embed", "iou_token", "mask_tokens", "hypernetworks")
    return p.dim() == 2 and not any(x in name for x in tables)


def take_muons_step(p: torch.Tensor, momentum: torch.Tensor, t, lr: float) -> None:
    """Muon's step of a matrix in fp64: Newton-Schulz's polynomial applied to the singular values."""
    momentum.mul_(t.muon_momentum).add_(p.grad, alpha=1 - t.muon_momentum)
    blend = (1 - t.muon_momentum) * p.grad + t.muon_momentum * momentum
    u, s, v = torch.linalg.svd(blend.double(), full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
    with torch.no_grad():
        p.mul_(1 - lr * t.weight_decay).add_((u * s @ v).float(), alpha=-lr * scale)
    p.grad = None


def plain_adamw(model, config, steps: int, nan_at: int | None) -> tuple[list[float], dict, dict]:
    """Losses, final weights and their moving average of PyTorch's own AdamW in one process, no DeepSpeed."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    average = {n: p.detach().clone() for n, p in trained.items()}
    t = config.train
    spared = [p for n, p in trained.items() if not t.weight_decay_norms and ("norm" in n or "rel_pos" in n or "neck.1" in n
              or "neck.3" in n or "output_upscaling.1." in n or "LayerNorm" in n)]  # fmt: skip
    groups = [
        {"params": [p], "lr": t.lr * rate_by_hand(n, t),
         "weight_decay": 0.0 if any(p is q for q in spared) else t.weight_decay}
        for n, p in trained.items()
    ]  # fmt: skip
    matrices = {n: torch.zeros_like(p) for n, p in trained.items() if t.optimizer == "muon" and muon_by_hand(n, p)}
    groups = [g for g, n in zip(groups, trained) if n not in matrices]
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, eps=t.eps)
    losses = []
    for step in range(steps):
        if step == nan_at:
            losses.append(float("nan"))
            continue
        inputs, mask = batch_of(step, slice(0, 4))
        loss = segmentation_loss(model.train()(*inputs), mask, torch.ones(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for n, momentum in matrices.items():
            take_muons_step(trained[n], momentum, t, t.muon_lr * rate_by_hand(n, t))
        for n, p in trained.items():
            average[n] = t.ema_decay * average[n] + (1 - t.ema_decay) * p.detach()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in trained.items()}, average


if __name__ == "__main__":
    world, calls = connect(), count_attention()
    results = [run(world, calls, **setting) for setting in json.loads(sys.argv[1])]
    if world.main:
        print(json.dumps(results))
    disconnect()
