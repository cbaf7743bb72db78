"""SAM's position tables keep their own lengths and train at any image size, against segment_anything's own encoder."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import MINILM, ROOT, dit_ds, metrics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_ds import torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.checkpointing.weights import load_model
from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.models.build import build_model
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.positions import absolute_positions, relative_positions
from dit_ds.models.sam import SIZES, Size, resize_positions
from dit_ds.models.text_encoder import TextEncoder

NATIVE, WINDOW, DIM, DEPTH, HEADS = 160, 4, 32, 3, 2  # of a small SAM: 10 tokens a side
GLOBAL = (1,)


def small_sam():
    """segment_anything's encoder with random positions, in fp64."""
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    torch.manual_seed(0)
    sam = ImageEncoderViT(NATIVE, 16, 3, DIM, DEPTH, HEADS, out_chans=16, use_rel_pos=True, window_size=WINDOW,
                          norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), global_attn_indexes=GLOBAL)  # fmt: skip
    for name, p in sam.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(p, std=0.3)
    return sam.double()


def by_segment_anything(sam, x, window):
    """SAM's encoder at any size, as the released code has it: `pos_embed` bicubic, relative tables by SAM's get_rel_pos."""
    x = sam.patch_embed(x)
    positions = sam.pos_embed.permute(0, 3, 1, 2)
    if positions.shape[2:] != x.shape[1:3]:
        positions = F.interpolate(positions, size=x.shape[1:3], mode="bicubic", align_corners=False)
    x = x + positions.permute(0, 2, 3, 1)
    for i, block in enumerate(sam.blocks):
        block.window_size = 0 if i in GLOBAL else window
        x = block(x)
    return sam.neck(x.permute(0, 3, 1, 2))


def ours(size, window=0, backend="eager", pretrained=(NATIVE, WINDOW)):
    return ImageEncoder(size, 16, DIM, DEPTH, HEADS, 16, backend, window, GLOBAL, pretrained).double()


def two_steps(encoder, forward, optimizer, size):
    """The losses of two steps on two batches, and the gradients of the first."""
    step = optimizer(encoder.parameters())
    losses, first = [], None
    for seed in (1, 2):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        step.zero_grad()
        out = forward(x)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).mean()
        loss.backward()
        losses.append(loss.item())
        first = first or {n: p.grad.clone() for n, p in encoder.named_parameters()}
        step.step()
    return losses, first


OPTIMIZERS = {"SGD": partial(torch.optim.SGD, lr=1.0), "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size, window, backend", [(80, 0, "eager"), (112, 0, "chunked"), (240, 0, "sdpa"),
                                                   (112, 4, "eager"), (240, 3, "chunked"), (160, 4, "eager"),
                                                   (80, 0, "naive")])  # fmt: skip
def test_tables_train_as_segment_anythings_at_any_image_size(size, window, backend, optimizer):
    sam, encoder = small_sam(), ours(size, window, backend)
    encoder.load_state_dict(sam.state_dict())
    want, want_first = two_steps(sam, lambda x: by_segment_anything(sam, x, window), OPTIMIZERS[optimizer], size)
    got, first = two_steps(encoder, encoder, OPTIMIZERS[optimizer], size)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-13)
    for name, p in sam.named_parameters():
        assert encoder.get_parameter(name).shape == p.shape
        torch.testing.assert_close(first[name], want_first[name], rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(encoder.get_parameter(name), p, rtol=1e-6, atol=1e-9)
    assert all(first[n].abs().sum() > 0 for n in first if "pos" in n)  # else nothing above was about the tables


@pytest.mark.parametrize("policy", ["block", "every_2", "selective"])
def test_recomputed_layers_interpolate_alike(policy):
    encoder = ours(112, backend="chunked")
    encoder.load_state_dict(small_sam().state_dict())
    again = copy.deepcopy(encoder)
    again.checkpoint_activations(policy)
    for a, b in zip(*(two_steps(e, e, OPTIMIZERS["SGD"], 112)[1].values() for e in (encoder, again)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=25)
@given(native=st.integers(1, 12), window=st.integers(1, 6), side=st.integers(1, 9))
def test_a_state_dict_of_any_lengths_is_taken_as_it_is(native, window, side):
    """Whatever image and window size its tables were made for; and what it computes is what the resized tables give."""
    torch.manual_seed(0)
    source = ours(16 * native, window, pretrained=None)
    for name, p in source.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(p)
    model = ours(16 * side, pretrained=None)
    shapes = model.state_dict()
    model.load_state_dict(source.state_dict())
    assert all(torch.equal(model.state_dict()[n], x) for n, x in source.state_dict().items())
    resized = ours(16 * side, pretrained=None)
    resized.load_state_dict(resize_positions(source.state_dict(), shapes))
    assert all(p.shape == shapes[n].shape for n, p in resized.named_parameters())
    x = torch.randn(1, 3, 16 * side, 16 * side, dtype=torch.double)
    torch.testing.assert_close(model(x), resized(x), rtol=1e-9, atol=1e-9)


def test_sams_sizes_have_sams_shapes_at_any_image_size():
    from segment_anything import sam_model_registry

    with FakeTensorMode():  # tensors without data
        text = TextEncoder(str(ROOT / "configs/text/bert_base"), layers=1, random_init=True)
        for name in ("vit_b", "vit_l", "vit_h"):
            want = {n: p.shape for n, p in sam_model_registry[name]().state_dict().items()}
            for size, window in ((512, 0), (320, 14), (1024, 14)):
                model = DITSAM(text, name, size, window_size=window)
                assert {n: p.shape for n, p in model.state_dict().items() if n in want} == want


def test_an_untrained_sam_is_one_at_every_image_size(tmp_path, monkeypatch):
    """An official file at another image size than SAM's: the tables are the file's, and `export` would write them so."""
    monkeypatch.setitem(SIZES, "small", Size(DIM, DEPTH, HEADS, prompt_dim=16, decoder_mlp_dim=32))
    sam = small_sam().float()
    model = DITSAM(TextEncoder(MINILM, layers=1), "small", 112, "default")
    whole = {n: x for n, x in model.state_dict().items() if n.startswith(("prompt_encoder.", "mask_decoder."))}
    whole |= {f"image_encoder.{n}": x for n, x in sam.state_dict().items()}
    torch.save(whole, tmp_path / "sam.pth")
    report = model.load_pretrained(tmp_path / "sam.pth")
    assert len(report["loaded"]) == len(whole) and not report["unexpected"]
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(model.image_encoder(x), by_segment_anything(sam, x, 0), rtol=1e-4, atol=1e-5)
    for name, value in model.image_encoder.state_dict().items():
        assert torch.equal(value, sam.state_dict()[name])
    wider = {"image_encoder.pos_embed": torch.zeros(1, 10, 10, DIM + 1)}
    empty = {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(0, DIM // HEADS)}
    for wrong in (wider, empty):
        torch.save(whole | wrong, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match="of another size"):
            model.load_pretrained(tmp_path / "wrong.pth")
    assert torch.equal(model.image_encoder.pos_embed, sam.pos_embed)  # untouched by what was refused


def test_tables_in_bf16_are_interpolated_in_fp32():
    absolute, relative = torch.randn(1, 8, 8, 6).bfloat16(), torch.randn(15, 6).bfloat16()
    want = absolute_positions(absolute.float(), (5, 7)), relative_positions(relative.float(), 9)
    got = absolute_positions(absolute, (5, 7)), relative_positions(relative, 9)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got, want))


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_evaluated_at_other_image_sizes(config_file, refusal, tmp_path):
    """From a file of 64 px at 96 px under ZeRO-3, in two parts: the tables that train are the file's."""
    run, start = tmp_path / "run", build_model(load_config(config_file)).state_dict()
    tables = {n: x for n, x in start.items() if n.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))}
    assert {x.shape[0] for n, x in tables.items() if "rel_pos" in n} == {7}  # 64 px: 4 tokens a side
    torch.save(start, tmp_path / "start.pth")
    train = ["train", "--config", config_file, "--data.image_size", "96", "--model.checkpoint", tmp_path / "start.pth",
             "--deepspeed.config", ROOT / "configs/deepspeed/zero3.json"]  # fmt: skip
    dit_ds(*train, "--train.max_steps", "1", ranks=2)
    dit_ds(*train, "--train.max_steps", "2", "--resume", ranks=2)
    model = load_model(run).model
    assert model.image_size == 96
    for name, value in tables.items():
        tuned = model.get_parameter(name)
        assert tuned.shape == value.shape and 0 < (tuned - value).abs().max() < 0.1, name

    in_training = metrics_of(run, "eval")[-1]
    larger = json.loads(dit_ds("eval", run, "--image-size", "64", "--json").stdout)
    assert larger["n"] == in_training["n"] and larger["oiou"] != in_training["oiou"]
    assert not (run / "evaluations").exists()  # of what is evaluated as the run is configured
    assert "data.image_size = 100" in refusal("eval", run, "--image-size", "100")
