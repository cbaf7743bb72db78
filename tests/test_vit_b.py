"""The real thing on a CPU: ViT-B at 512 px with BERT-base's shape, under ZeRO-2."""

import math

import pytest
import torch
from conftest import ROOT

from dit_ds.config.load import validate
from dit_ds.engine import engine as ds
from dit_ds.models.build import build_model
from dit_ds.models.losses import segmentation_loss


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_vit_b_with_bert_base_learns_one_batch(world):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    config = validate(
        {
            "model": {"size": "vit_b"},
            "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True},
            "train": {"batch_size": 2},
            "deepspeed": {
                "config": str(ROOT / "configs/deepspeed/zero2.json"),
                "override": {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 2},
            },
        }
    )
    try:
        engine = ds.initialize(build_model(config), config, world)
        trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        assert trained > 200e6  # both encoders train, as in the paper's last rows
        g = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (2, 3, 512, 512), generator=g, dtype=torch.uint8)
        tokens = torch.randint(1000, 30000, (2, 20), generator=g)
        token_mask = torch.arange(20).expand(2, -1) < torch.tensor([[6], [12]])
        mask = torch.zeros(2, 512, 512)
        mask[0, 100:300, 50:200] = 1
        mask[1, 300:400, 200:450] = 1
        losses = []
        for step in range(2):
            torch.manual_seed(step)
            loss = segmentation_loss(
                engine(image, torch.tensor([[384, 512], [512, 512]]), tokens, token_mask), mask, torch.ones(2)
            )
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert all(map(math.isfinite, losses)) and losses[1] < losses[0], losses
    finally:
        torch.set_num_threads(threads)
