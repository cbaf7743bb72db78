"""Files to start from, and what the tests ask of them: they load whole, or are refused by all alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MINILM

from dit_ds.errors import UserError
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.sam_checkpoint import check_sam_checkpoint, load_sam_checkpoint
from dit_ds.models.text_encoder import TextEncoder

ADDED = ("text_encoder.", "text_projection.", "image_encoder.instruction.")
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


def make_model(**options) -> DITSAM:
    return DITSAM(TextEncoder(MINILM, layers=1, random_init=True), "vit_t", 64, **options).eval()


def refused(model: DITSAM, path: Path) -> str:
    """The one line with which loading and checking refuse the file, the model unchanged."""
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(UserError) as loading:
        load_sam_checkpoint(model, path)
    with pytest.raises(UserError) as checking:
        check_sam_checkpoint(path, model.state_dict())
    assert str(loading.value) == str(checking.value) and "\n" not in str(loading.value)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    return str(loading.value)


def assert_loads(model: DITSAM, path: Path, sam: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    torch.nn.init.zeros_(model.image_encoder.pos_embed)
    report = load_sam_checkpoint(model, path)
    state = model.state_dict()
    assert all(torch.equal(state[n], x) for n, x in sam.items())
    assert set(report["loaded"]) == sam.keys() and not report["missing"]
    assert f"{len(sam)} tensors, all of SAM's" in check_sam_checkpoint(path, state)
    return report
