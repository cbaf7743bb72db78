"""A rank of `test_checkpointing`: a few steps under each setting asked for; rank 0 prints one JSON object.

torchrun --nproc_per_node 2 tests/zero_worker.py '[{"stage": 2, "policy": "block"}, ..]'
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from conftest import MINILM, ROOT

from dit_ds import engine as ds
from dit_ds.checkpoint import build_model
from dit_ds.config import validate
from dit_ds.distributed import connect, disconnect
from dit_ds.models import attention
from dit_ds.models.dit_sam import segmentation_loss


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


def run(world, calls, stage: int, policy: str, compile: bool = False, bf16: bool = False, steps: int = 2) -> dict:
    """Losses, gradient norms and final weights' sum, with dropout in BERT and of the words."""
    config = validate(
        {
            "model": {"size": "vit_t", "word_dropout": 0.2, "attention": "chunked"},
            "data": {"image_size": 64},
            "text": {"name": MINILM, "layers": 1, "freeze": False},
            "train": {"batch_size": 4, "lr": 1e-3, "gradient_clipping": 1.0, "activation_checkpointing": policy},
            "deepspeed": {
                "config": str(ROOT / f"configs/deepspeed/zero{stage}.json"),
                "override": {"bf16": {"enabled": bf16}, "train_micro_batch_size_per_gpu": 2},
            },
        }
    )
    model = build_model(config)
    model.image_encoder.checkpoint_activations(policy)
    if compile:
        model.image_encoder.compile_blocks()
    engine = ds.initialize(model, config, world)
    engine.train()
    g = torch.Generator().manual_seed(world.rank)
    size, token_mask = torch.tensor([[64, 64], [48, 64]]), torch.arange(20) < torch.tensor([[6], [12]])
    calls[0], losses = 0, []
    for step in range(steps):
        torch.manual_seed(100 * step + world.rank)
        image = torch.randint(0, 256, (2, 3, 64, 64), generator=g, dtype=torch.uint8)
        tokens = torch.randint(1000, 3000, (2, 20), generator=g)
        mask = torch.rand(2, 64, 64, generator=g) > 0.5
        loss = segmentation_loss(engine(image, size, tokens, token_mask), mask, torch.ones(2))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    state = ds.gathered_state(engine, names, main=True)
    weights = {n: state[n].double().norm().item() for n in sorted(names)}
    return {"losses": losses, "weights": weights, "attention_calls": calls[0] / steps}


if __name__ == "__main__":
    world, calls = connect(), count_attention()
    results = [run(world, calls, **setting) for setting in json.loads(sys.argv[1])]
    if world.main:
        print(json.dumps(results))
    disconnect()
