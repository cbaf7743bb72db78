"""transformers' SamModel: translated to segment-anything's names, it computes the same here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sam_files import ADDED, make_model, refused

from dit_ds.models.dit_sam import DITSAM


@pytest.fixture(scope="module")
def model() -> DITSAM:
    return make_model()


@pytest.fixture(scope="module")
def theirs():
    """transformers' SamModel of the size vit_t, all of it random; LayerNorms of the decoder as segment-anything has them."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(1)
    vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
              "output_channels": 64, "num_pos_feats": 32, "mlp_dim": 512, "global_attn_indexes": [0, 1, 2, 3],
              "window_size": 2}  # fmt: skip
    prompt = {"hidden_size": 64, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 64, "mlp_dim": 256, "layer_norm_eps": 1e-5}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    for p in {id(p): p for p in model.parameters()}.values():
        torch.nn.init.normal_(p, std=0.3)
    return model


def saved_by_transformers(model, kind: str, folder: Path) -> Path:
    """The file or folder to give as model.checkpoint."""
    if kind == "sharded":
        model.save_pretrained(folder, max_shard_size="300KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return folder
    if kind == "index":
        return saved_by_transformers(model, "sharded", folder) / "model.safetensors.index.json"
    if kind == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    model.save_pretrained(folder)
    return folder if kind == "folder" else folder / "model.safetensors"


@pytest.mark.parametrize("kind", ["file", "folder", "bin", "sharded", "index"])
def test_a_sam_of_transformers_computes_the_same_here(theirs, tmp_path, kind):
    ours = make_model(prompts=["point"])
    report = ours.load_pretrained(saved_by_transformers(theirs, kind, tmp_path))
    assert report["notes"] == ["translated from transformers' names"] and not report["missing"]
    assert not report["unexpected"]
    image, points = torch.randn(2, 3, 64, 64), torch.tensor([[[10.0, 40.0]], [[33.0, 5.0]]])
    ours.preprocess = lambda image, size: image  # (B, 3, S, S) normalized
    labels = torch.ones(2, 1, dtype=torch.long)
    padded = torch.cat([points, torch.zeros(2, 1, 2)], 1), torch.tensor([[1, -1]] * 2)  # as SAM pads points
    with torch.no_grad():
        want = theirs(image, points[:, None], labels[:, None], multimask_output=False).pred_masks[:, 0, 0]
        got = ours(image, torch.tensor([[64, 64]] * 2), points=padded[0], labels=padded[1])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        exact = theirs.vision_encoder.double()(image.double()).last_hidden_state
        torch.testing.assert_close(ours.image_encoder.double()(image.double(), None, None), exact, rtol=1e-9, atol=1e-9)
    theirs.float()


def test_a_translated_sam_has_segment_anythings_names(theirs, tmp_path):
    """Strictly, into segment-anything's own modules."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    ours = make_model()
    ours.load_pretrained(saved_by_transformers(theirs, "file", tmp_path))
    vit = ImageEncoderViT(64, 16, 3, 128, 4, 4, out_chans=64, use_rel_pos=True)
    decoder = MaskDecoder(transformer_dim=64, transformer=TwoWayTransformer(2, 64, 8, 256))
    official = Sam(vit, PromptEncoder(64, (4, 4), (64, 64), 16), decoder)
    state = {n: x for n, x in ours.state_dict().items() if not n.startswith(ADDED)}
    assert state.keys() == official.state_dict().keys()
    shared = theirs.shared_image_embedding.positional_embedding
    assert torch.equal(state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"], shared)


@pytest.mark.parametrize("part", ["vision_encoder", "prompt_encoder", "mask_decoder"])
def test_a_part_of_transformers_sam_alone(model, theirs, tmp_path, part):
    torch.save({n: x for n, x in theirs.state_dict().items() if n.startswith(part)}, tmp_path / "part.bin")
    line = refused(model, tmp_path / "part.bin")
    assert f"holds SAM's {part.replace('vision', 'image').replace('_', ' ')} alone" in line


def test_one_file_of_a_sharded_sam(model, theirs, tmp_path):
    folder = saved_by_transformers(theirs, "sharded", tmp_path)
    assert "one file of several" in refused(model, sorted(folder.glob("*.safetensors"))[0])
    index = folder / "model.safetensors.index.json"
    for wrong in ({"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {}}, [], {"weight_map": {"a": "gone.bin"}}):
        index.write_text(json.dumps(wrong))
        refused(model, folder)


def test_a_sam_hq_of_transformers(model, tmp_path):
    from transformers import SamHQConfig, SamHQModel

    vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
              "output_channels": 64, "num_pos_feats": 32, "mlp_dim": 512, "global_attn_indexes": [0, 1, 2, 3]}  # fmt: skip
    decoder = {"hidden_size": 64, "mlp_dim": 256, "vit_dim": 128}
    config = SamHQConfig(vision_config=vision, prompt_encoder_config={"hidden_size": 64}, mask_decoder_config=decoder)
    SamHQModel(config).save_pretrained(tmp_path)
    assert "looks like SAM-HQ" in refused(model, tmp_path)
