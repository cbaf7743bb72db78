"""`dit-ds export --format transformers`: a SamModel that segments what the run's model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MINILM, dit_ds
from sam_files import make_model

from dit_ds.checkpointing.export import header
from dit_ds.checkpointing.export_transformers import export_transformers
from dit_ds.checkpointing.weights import load_model, save_tensors
from dit_ds.config.load import validate


def exported(folder: Path, **model) -> Path:
    """What `dit-ds export` writes of a model with random weights."""
    prompts = {"prompts": ["text", "point"], "image_size": model.pop("image_size", 64)}
    config = validate({"model": {"size": "vit_t"} | model, "text": {"name": MINILM, "layers": 1}, "data": prompts})
    torch.manual_seed(3)
    options = {"scheme": config.model.scheme, "decoder_layers": config.model.decoder_layers}
    made = make_model(window_size=config.model.window_size, **options)
    for name, p in made.named_parameters():
        if "rel_pos" in name or "embed" in name:
            torch.nn.init.normal_(p, std=0.3)
    about = {"dit_ds": header(config, {"step": 1, "epoch": 1}), "format": "pt"}
    save_tensors(made.state_dict(), folder / "run.safetensors", about)
    return folder / "run.safetensors"


@pytest.mark.parametrize(
    "model", [{}, {"window_size": 2}, {"decoder_layers": 4}, {"image_size": 96}, {"image_size": 96, "window_size": 4}],
    ids=lambda m: "-".join(m) or "plain",
)  # fmt: skip
def test_a_sam_of_transformers_segments_as_the_run(model, tmp_path):
    from transformers import SamModel

    path = exported(tmp_path, scheme="default", **model)
    report = export_transformers(path, tmp_path / "sam")
    theirs, ours = SamModel.from_pretrained(tmp_path / "sam").eval(), load_model(path).model
    side = ours.image_size
    ours.preprocess = lambda image, size: image
    image, points = torch.randn(2, 3, side, side), torch.tensor([[[10.0, 40.0]], [[33.0, 5.0]]])
    padded = torch.cat([points, torch.zeros(2, 1, 2)], 1), torch.tensor([[1, -1]] * 2)
    with torch.no_grad():
        want = ours(image, torch.tensor([[side, side]] * 2), points=padded[0], labels=padded[1])
        labels = torch.ones(2, 1, 1, dtype=torch.long)
        got = theirs(image, points[:, None], labels, multimask_output=False).pred_masks[:, 0, 0]
    assert want.std() > 0.01 and (got - want).abs().max() <= 1e-4 * max(1, want.abs().max())
    assert report["left_out"] == {"text_encoder": 21, "text_projection": 2} and report["image_size"] == side
    settings = json.loads((tmp_path / "sam/preprocessor_config.json").read_text())
    assert settings["size"] == {"longest_edge": side}


def test_the_command_and_a_trip_back(tmp_path):
    """The folder is imported again, with the same SAM in it."""
    path = exported(tmp_path, scheme="default")
    done = dit_ds("export", path, "--format", "transformers", "--out", tmp_path / "sam", "--json")
    said = json.loads(done.stdout)
    assert "no text" in said["next"] and said["folder"] == str(tmp_path / "sam")
    back = json.loads(dit_ds("import", tmp_path / "sam", "--from", "transformers", "--out",
                             tmp_path / "back.safetensors", "--text", MINILM, "--json").stdout)  # fmt: skip
    assert (back["source"], back["size"]) == ("transformers", "vit_t")
    first, second = (load_model(p).model.state_dict() for p in (path, tmp_path / "back.safetensors"))
    sam = [n for n in first if n.startswith(("image_encoder.", "prompt_encoder.", "mask_decoder."))]
    assert all(torch.equal(first[n], second[n]) for n in sam) and back["fresh"] == len(second) - len(sam)


def test_what_is_no_sam_is_refused(tmp_path, refusal):
    path = exported(tmp_path, scheme="layer_wise")
    line = refusal("export", path, "--format", "transformers", "--out", tmp_path / "sam")
    assert "text enters its ViT" in line and not (tmp_path / "sam").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    path = exported(tmp_path, scheme="default")
    assert "no empty folder" in refusal("export", path, "--format", "transformers", "--out", tmp_path / "full")
