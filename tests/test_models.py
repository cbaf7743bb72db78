"""The model against independent references: segment_anything's own modules, and attention written out naively."""

from __future__ import annotations

import pytest
import torch
from conftest import MINILM, ROOT

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.errors import UserError
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import ImageEncoder, JointBlock
from dit_ds.models.losses import of_samples, segmentation_loss
from dit_ds.models.sam import SIZES, BatchedMaskDecoder, DecoderAttention, TextPromptEncoder, resize_positions
from dit_ds.models.sam_checkpoint import load_sam_checkpoint
from dit_ds.models.text_encoder import TextEncoder, load_tokenizer
from dit_ds.planning.memory.live_tensors import LiveTensors


def sam_encoder(image_size, depth=3, dim=48, heads=4, **windows):
    """segment_anything's encoder, by default with global attention in every block, and random positions."""
    from functools import partial

    from segment_anything.modeling.image_encoder import ImageEncoderViT

    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    sam = ImageEncoderViT(
        image_size, 16, 3, dim, depth, heads, out_chans=32, use_rel_pos=True, norm_layer=norm, **windows
    )
    for name, p in sam.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(p, std=0.3)
    return sam


@pytest.mark.parametrize("window", [0, 3])  # five places a side: windows of three are padded
@pytest.mark.parametrize("backend", ["eager", "sdpa", "chunked"])
def test_without_words_the_encoder_is_segment_anythings(backend, window):
    torch.manual_seed(0)
    sam = sam_encoder(80, window_size=window, global_attn_indexes=(1,))
    ours = ImageEncoder(80, 16, 48, 3, 4, 32, backend, window, global_layers=(1,))
    missing, unexpected = ours.load_state_dict(sam.state_dict(), strict=False)
    assert not unexpected and not missing
    x = torch.randn(2, 3, 80, 80)
    a, b = sam(x), ours(x)
    assert (a - b).abs().max() <= 1e-5
    a.square().sum().backward()
    b.square().sum().backward()
    for name, p in sam.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-4)


def test_at_1024_pixels_with_windows_of_14_the_encoder_is_segment_anythings():
    torch.manual_seed(0)
    sam = sam_encoder(1024, depth=2, dim=32, heads=2, window_size=14, global_attn_indexes=(1,))
    ours = ImageEncoder(1024, 16, 32, 2, 2, 32, "auto", 14, global_layers=(1,))
    ours.load_state_dict(sam.state_dict())
    x = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        assert (ours(x) - sam(x)).abs().max() <= 1e-5


def test_windows_attend_to_themselves_and_to_the_words():
    """A windowed block over one image is a block over each window, of its words; on every backend."""
    torch.manual_seed(0)
    block = JointBlock(48, 4, (6, 6), "eager", window_size=3).double()
    for p in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        torch.nn.init.normal_(p)
    x, words = torch.randn(2, 6, 6, 48).double(), torch.randn(2, 5, 48).double()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    small = JointBlock(48, 4, (3, 3), "eager").double()
    small.load_state_dict(block.state_dict())
    for backend in ("eager", "sdpa", "chunked"):
        block.attn.backend = backend
        whole, _ = block(x, words, mask)
        for i, j in ((0, 0), (0, 3), (3, 0), (3, 3)):
            window, _ = small(x[:, i : i + 3, j : j + 3], words, mask)
            torch.testing.assert_close(whole[:, i : i + 3, j : j + 3], window, rtol=1e-12, atol=1e-12)


def test_a_block_is_sams_over_the_concatenation_of_equation_8():
    """[words; image] through SAM's formulas, written out; the words' rows of the result thrown away."""
    torch.manual_seed(0)
    block = JointBlock(48, 4, (5, 5), "eager").double()
    for p in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        torch.nn.init.normal_(p)
    x, words = torch.randn(2, 5, 5, 48).double(), torch.randn(2, 7, 48).double()

    tokens = torch.cat([words, x.flatten(1, 2)], dim=1)  # F_m = [F_t; F_v]
    q, k, v = block.attn.qkv(block.norm1(tokens))[0].view(2, 32, 3, 4, 12).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / 12**0.5
    for i in range(25):
        for j in range(25):
            rel = block.attn.rel_pos_h[i // 5 - j // 5 + 4] + block.attn.rel_pos_w[i % 5 - j % 5 + 4]
            logits[:, :, 7 + i, 7 + j] += q[:, :, 7 + i] @ rel
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 32, 48)
    tokens = tokens + block.attn.proj(mixed)
    tokens = tokens + block.mlp(block.norm2(tokens))

    for backend in ("eager", "naive"):
        block.attn.backend = backend
        out, none = block(x, words)
        torch.testing.assert_close(out.flatten(1, 2), tokens[:, 7:], rtol=1e-10, atol=1e-10)
        assert none is None
        _, flowing = block(x, words, update_text=True)  # equation 6: the words' rows go on, too
        torch.testing.assert_close(flowing, tokens[:, :7], rtol=1e-10, atol=1e-10)


def small_model(scheme="layer_wise", **options):
    torch.manual_seed(0)
    return DITSAM(TextEncoder(MINILM, layers=1), "vit_t", 64, scheme, **options)


def batch(b=3, size=64, words=6):
    g = torch.Generator().manual_seed(2)
    token_mask = torch.arange(20)[None] < torch.tensor([[words], [words + 3], [2]])[:b]
    return {
        "image": torch.randint(0, 256, (b, 3, size, size), generator=g, dtype=torch.uint8),
        "size": torch.tensor([[size, size], [size, size // 2], [size // 2, size]])[:b],
        "tokens": torch.randint(1000, 3000, (b, 20), generator=g) * token_mask,
        "token_mask": token_mask,
    }


def test_a_batch_is_its_images_one_by_one():
    model = small_model().eval()
    whole = model(**batch())
    for i in range(3):
        alone = model(**{k: v[i : i + 1] for k, v in batch().items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_mask_decoder_is_sams():
    """One image at a time through segment_anything's MaskDecoder with the same weights."""
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    torch.manual_seed(0)
    size = SIZES["vit_t"]
    ours = BatchedMaskDecoder(size, 2)
    sams = MaskDecoder(transformer_dim=64, transformer=TwoWayTransformer(2, 64, 8, size.decoder_mlp_dim))
    sams.load_state_dict(ours.state_dict())
    prompts = TextPromptEncoder(size, 64)
    words, mask = torch.randn(3, 5, 64), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    sparse, dense, positions = prompts(words, mask)
    torch.testing.assert_close(sparse[1, 3:], prompts.not_a_point_embed.weight.expand(2, -1))
    image = torch.randn(3, 64, 4, 4)
    got = ours(image, positions, sparse, dense)
    for i in range(3):
        want, _ = sams(
            image[i : i + 1], positions, sparse[i : i + 1], dense.expand(1, -1, 4, 4), multimask_output=False
        )
        torch.testing.assert_close(got[i], want[0, 0], rtol=1e-4, atol=1e-5)


def test_padding_words_change_nothing():
    model = small_model().eval()
    inputs = batch()
    other = inputs | {"tokens": inputs["tokens"] + 777 * ~inputs["token_mask"]}
    torch.testing.assert_close(model(**inputs), model(**other), rtol=1e-5, atol=1e-6)
    longer = {k: torch.nn.functional.pad(inputs[k], (0, 5)) for k in ("tokens", "token_mask")}
    words = model.text_encoder(inputs["tokens"], inputs["token_mask"])
    x = model.preprocess(inputs["image"], inputs["size"])
    short = model.image_encoder(x, words, inputs["token_mask"])
    long = model.image_encoder(x, model.text_encoder(**{k: v for k, v in longer.items()}), longer["token_mask"])
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


def test_the_text_cache_gives_the_same_features():
    plain, cached = TextEncoder(MINILM, layers=2), TextEncoder(MINILM, layers=2, cache=4)
    inputs = batch()
    want = plain(inputs["tokens"], inputs["token_mask"])
    for _ in range(2):
        torch.testing.assert_close(cached(inputs["tokens"], inputs["token_mask"]), want, rtol=1e-4, atol=1e-5)
    assert len(cached._cache) == 3
    cached(inputs["tokens"] + 1, inputs["token_mask"])
    assert len(cached._cache) == 4  # the oldest went


def gradients(model):
    segmentation_loss(model(**batch()), torch.ones(3, 64, 64), torch.ones(3)).backward()
    return {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", ["layer_wise", "end_to_end"])
def test_the_naive_formulation_computes_the_same(scheme):
    """Logits and gradients of a whole model, padding masked and recomputed layer by layer."""
    model = small_model(scheme).double()
    model.checkpoint_activations("block")
    results = []
    for backend in ("naive", "chunked", "sdpa"):
        for block in model.image_encoder.blocks:
            block.attn.backend = backend
        model.zero_grad()
        logits = model(**batch())
        logits.double().square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "chunked", "naive"])
def test_autocast_trains(backend):
    """`torch_autocast` in the DeepSpeed JSON: fp32 weights, bf16 products."""
    model = small_model(attention=backend)
    exact = model(**batch())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch())
    segmentation_loss(logits, torch.ones(3, 64, 64), torch.ones(3)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_end_to_end_words_flow_through_every_layer():
    """Projected once; where the image encoder is frozen, a linear layer between two layers, the identity at first."""
    free, frozen = small_model("end_to_end"), small_model("end_to_end", freeze_image_encoder=True, adapters=True)
    assert [n for n, _ in free.image_encoder.instruction.named_parameters()] == ["projection.weight", "projection.bias"]
    assert len(frozen.image_encoder.instruction.adapters) == len(frozen.image_encoder.blocks) - 1
    frozen.load_state_dict(free.state_dict(), strict=False)
    torch.testing.assert_close(frozen(**batch()), free(**batch()))
    segmentation_loss(frozen(**batch()), torch.ones(3, 64, 64), torch.ones(3)).backward()
    trained = {n: p for n, p in frozen.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values()), [n for n, p in trained.items() if p.grad is None]
    assert {n.split(".")[1] for n in trained if n.startswith("image_encoder")} == {"instruction"}


def test_a_trained_text_encoder_trains():
    model = DITSAM(TextEncoder(MINILM, layers=1, frozen=False), "vit_t", 64)
    assert "text_encoder.bert.encoder.layer.0.attention.self.query.weight" in gradients(model)
    assert model.train().text_encoder.bert.training
    assert not small_model().train().text_encoder.bert.training  # frozen: dropout stays off


def test_the_loss_is_the_mean_over_real_samples():
    logits, mask = torch.randn(4, 8, 8), torch.rand(4, 32, 32) > 0.5
    for dice in (0.0, 1.0):
        real = segmentation_loss(logits[:3], mask[:3], torch.ones(3), dice)
        filled = segmentation_loss(logits, mask, torch.tensor([4 / 3] * 3 + [0.0]), dice)
        torch.testing.assert_close(real, filled)
    plain = torch.nn.functional.interpolate(logits[:, None], (32, 32), mode="bilinear")
    bce = torch.nn.functional.binary_cross_entropy_with_logits(plain[:, 0], mask.float())
    torch.testing.assert_close(segmentation_loss(logits, mask, torch.ones(4)), bce)


def test_bf16_keeps_the_positions_exact():
    model = small_model()
    exact = model.prompt_encoder.get_dense_pe()
    model = model.bfloat16()
    assert torch.equal(model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.float(),
                       small_model().prompt_encoder.pe_layer.positional_encoding_gaussian_matrix)  # fmt: skip
    torch.testing.assert_close(model.prompt_encoder.get_dense_pe(), exact)
    assert torch.isfinite(model(**batch())).all()


def test_preprocessing_is_sams():
    """Against segment_anything's own Sam.preprocess on an image that isn't square."""
    from segment_anything.modeling import Sam

    model, inputs = small_model(), batch()
    image, size = inputs["image"][1], inputs["size"][1]
    sam = Sam(model.image_encoder, None, None)
    want = sam.preprocess(image[:, : size[0], : size[1]].float())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        got = model.to(dtype).preprocess(inputs["image"], inputs["size"])[1]
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_an_official_checkpoint_loads_by_name(tmp_path):
    """segment_anything's own ViT-B at 1024 px with windows, into ours at 512 px."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    torch.nn.init.normal_(sam.image_encoder.pos_embed)
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    text = TextEncoder(str(ROOT / "configs/text/bert_base"), layers=1, random_init=True)
    model = DITSAM(text, "vit_b", 512, decoder_layers=4, static_tokens=2)
    report = model.load_pretrained(tmp_path / "sam_vit_b.pth")
    assert len(report["loaded"]) + len(report["unexpected"]) == len(sam.state_dict())
    assert report["unexpected"] == []
    beyond = tuple(f"mask_decoder.transformer.layers.{i}." for i in (2, 3))  # SAM's two
    assert report["missing"] and all(n.startswith(beyond) for n in report["missing"])
    for i in (0, 1):
        theirs, ours = (m.mask_decoder.transformer.layers[i].state_dict() for m in (sam, model))
        assert all(torch.equal(ours[n], x) for n, x in theirs.items())
    for name, value in sam.image_encoder.state_dict().items():  # the position tables, too, at their own lengths
        assert torch.equal(model.image_encoder.state_dict()[name], value)
    with pytest.raises(UserError, match="of another size.*model.size"):
        load_sam_checkpoint(DITSAM(text, "vit_l", 64), tmp_path / "sam_vit_b.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "sam_vit_b.pth").read_bytes()[:100000])
    with pytest.raises(UserError, match="not a readable SAM checkpoint"):
        load_sam_checkpoint(model, tmp_path / "cut.pth")
    with pytest.raises(UserError, match="no file "):
        load_sam_checkpoint(model, tmp_path / "none.pth")


def test_positions_resize_as_functions_of_place():
    ramp = torch.linspace(-1, 1, 127)[:, None].expand(127, 4).clone()
    fitted = resize_positions({"blocks.0.attn.rel_pos_h": ramp}, {"blocks.0.attn.rel_pos_h": torch.empty(63, 4)})
    torch.testing.assert_close(fitted["blocks.0.attn.rel_pos_h"][31], torch.zeros(4), atol=1e-6, rtol=0)
    plane = torch.linspace(0, 1, 64)[None, :, None, None].expand(1, 64, 64, 3).clone()
    fitted = resize_positions({"pos_embed": plane}, {"pos_embed": torch.empty(1, 32, 32, 3)})["pos_embed"]
    assert (fitted[0, 1:, 0, 0] > fitted[0, :-1, 0, 0]).all()


def test_a_text_encoder_that_is_not_there_is_one_line(tmp_path):
    for name in ("no-such/encoder", "package:no_such_package", str(tmp_path)):
        for load in (TextEncoder, load_tokenizer):
            with pytest.raises(UserError):
                load(name)
    with pytest.raises(UserError, match="text.layers 9"):
        TextEncoder(MINILM, layers=9)


@pytest.mark.parametrize(
    ("size", "dice", "dtype"), [(64, 0.0, torch.float32), (700, 1.0, torch.float32), (64, 1.0, torch.bfloat16)]
)
def test_the_loss_a_few_samples_at_a_time_is_the_plain_one(size, dice, dtype):
    logits, mask = torch.randn(5, 16, 16).to(dtype), (torch.rand(5, size, size) > 0.6).to(torch.uint8)
    weight = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0])
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = segmentation_loss(x, mask, weight, dice)
    plain = (of_samples(y, mask.double(), dice, False) * weight).mean()
    (ours * 3).backward()
    (plain * 3).backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (x.grad.double() - y.grad).abs().max() <= tolerance * y.grad.abs().max() and x.grad.dtype == dtype
    with torch.no_grad():
        assert segmentation_loss(logits, mask, weight, dice) == ours


def test_the_loss_keeps_no_map_of_the_images_size():
    logits, mask = torch.randn(32, 128, 128, requires_grad=True), torch.zeros(32, 512, 512, dtype=torch.uint8)
    with LiveTensors() as live:
        loss = segmentation_loss(logits, mask, torch.ones(32))
        kept = live.now
        loss.backward()
    assert kept < 2 * logits.nbytes and live.peak < 32 * 512 * 512 * 4  # one map of the batch


@pytest.mark.parametrize("rate", [1, 2])
def test_the_decoders_fused_attention_is_the_plain_one(rate):
    attention = DecoderAttention(64, 8, downsample_rate=rate).double()
    q, k = torch.randn(2, 7, 64, dtype=torch.double), torch.randn(2, 30, 64, dtype=torch.double)
    results = []
    for attend in (attention.forward, attention.fused):
        x, y = q.clone().requires_grad_(), k.clone().requires_grad_()
        out = attend(x, y, y + 1)
        out.square().sum().backward()
        results.append((out, x.grad, y.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
