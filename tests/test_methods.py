"""LAVT and ReLA: their sizes, their equations written out, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import dit_ds.torchvision_stub  # noqa: F401  before transformers
from dit_ds.config.load import load_config, validate
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.engine import engine
from dit_ds.engine.batchnorm import SyncedBatchNormStats
from dit_ds.engine.deepspeed_json import deepspeed_config
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import MaskPostprocess, original_probabilities
from dit_ds.models.lavt import LAVT
from dit_ds.models.losses import two_class_loss
from dit_ds.models.rela import Output, ReLA, SinePositions
from dit_ds.models.swin import PWAM, SIZES, TextSwin
from dit_ds.models.text_encoder import TextEncoder
from dit_ds.training.schedule import learning_rate

BERT = str(ROOT / "configs/text/bert_base")
METHODS = {"lavt": LAVT, "rela": ReLA}


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e6


@pytest.fixture(scope="module")
def bert() -> TextEncoder:
    with torch.device("meta"):
        return TextEncoder(BERT, random_init=True, frozen=False)


def test_lavt_has_its_papers_parameters(bert):
    with torch.device("meta"):
        model = LAVT(bert)
    b = model.backbone
    parts = {
        "Swin": (millions(b.embeddings, b.stages, b.norms), 86.88),
        "PWAM": (millions(b.pwams), 8.53),
        "gates": (millions(b.gates), 2.79),
        "decoder": (millions(model.decoder), 20.65),
        "BERT": (millions(model.text_encoder), 108.89),
        "all": (millions(model), 227.74),
    }
    assert {k: round(v, 2) for k, (v, _) in parts.items()} == {k: v for k, (_, v) in parts.items()}


def test_rela_has_its_papers_parameters(bert):
    with torch.device("meta"):
        model = ReLA(bert)
    parts = {
        "backbone": (millions(model.backbone), 96.10),
        "pixel decoder": (millions(model.pixel_decoder), 5.54),
        "predictor": (millions(model.predictor), 14.99),
        "BERT": (millions(model.text_encoder), 108.89),
        "all": (millions(model), 225.52),
    }
    assert {k: round(v, 2) for k, (v, _) in parts.items()} == {k: v for k, (_, v) in parts.items()}
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("text_encoder.")) == 116_629_821


def instance_norm(x: torch.Tensor) -> torch.Tensor:
    mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


def test_pwam_is_its_equations():
    torch.manual_seed(0)
    pwam = PWAM(6, 5).double()
    x, words = torch.randn(2, 9, 6).double(), torch.randn(2, 4, 5).double()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    def linear(conv, y):  # (B, in, N) to (B, out, N)
        return conv.weight[:, :, 0] @ y + conv.bias[:, None]

    def gelu(y):
        return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))

    places, said_words = x.transpose(1, 2), words.transpose(1, 2)
    q = instance_norm(linear(pwam.q[0], places))
    k, v = linear(pwam.k, said_words), linear(pwam.v, said_words)
    said = torch.zeros_like(q)
    for b in range(2):
        n = int(mask[b].sum())  # over the real words alone
        a = (q[b].t() @ k[b, :, :n] / math.sqrt(6)).softmax(1)
        said[b] = v[b, :, :n] @ a.t()
    r = gelu(linear(pwam.mix[0], gelu(linear(pwam.vis[0], places)) * instance_norm(linear(pwam.out[0], said))))
    torch.testing.assert_close(pwam(x, words, mask), r.transpose(1, 2), rtol=1e-10, atol=1e-10)
    other = torch.where(mask[..., None], words, torch.randn(2, 4, 5).double())
    assert torch.equal(pwam(x, other, mask), pwam(x, words, mask))  # padding says nothing


def tiny(name: str, size: int = 64) -> LAVT | ReLA:
    torch.manual_seed(0)
    return METHODS[name](TextEncoder(BERT, layers=1, random_init=True, frozen=False), "swin_t_tiny", size)


def inputs(size: int = 64, words: int = 6) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, 3, size, size), generator=g, dtype=torch.uint8)
    tokens = torch.randint(1000, 3000, (2, 12), generator=g)
    return image, torch.tensor([[size, size]] * 2), tokens, torch.arange(12) < torch.tensor([[words], [12]])


def swin(size: int = 64):
    """transformers' own."""
    from transformers import SwinConfig, SwinModel

    s = SIZES["swin_t_tiny"]
    return SwinModel(
        SwinConfig(image_size=size, embed_dim=s.embed_dim, depths=s.depths, num_heads=s.num_heads, window_size=2),
        add_pooling_layer=False,
    ).eval()


def test_closed_gates_leave_swin_and_its_folder_loads(tmp_path):
    """Without what words add, the image goes through Swin as transformers has it; its saved parameters load by name."""
    torch.manual_seed(1)
    reference = swin(96)
    reference.save_pretrained(tmp_path / "swin")
    ours = TextSwin("swin_t_tiny", 96, 5, gates=4, attention="sdpa").eval()
    report = ours.load_pretrained(tmp_path / "swin")
    assert not report["missing"] and report["unexpected"] == ["layernorm.bias", "layernorm.weight"]
    for gate in ours.gates:
        torch.nn.init.zeros_(gate[2].weight)
    seen, image, mask = [], torch.randn(2, 3, 96, 96), torch.ones(2, 4, dtype=torch.bool)
    ours.pwams[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    stages = ours(image, torch.randn(2, 4, 5), mask)
    want = reference.encoder(*reference.embeddings(image)).last_hidden_state
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)
    assert [tuple(x.shape[1:]) for x in stages] == [(32, 24, 24), (64, 12, 12), (128, 6, 6), (256, 3, 3)]
    torch.nn.init.normal_(ours.gates[2][2].weight)
    ours(image, torch.randn(2, 4, 5), mask)
    assert (seen[1] - want).abs().max() > 1e-3
    state = reference.state_dict()
    cut = {n: x for n, x in state.items() if not n.startswith("encoder.layers.1.blocks.0.mlp")}
    reference.save_pretrained(tmp_path / "cut", state_dict=cut)
    with pytest.raises(UserError, match=rf"cut lacks {len(state) - len(cut)} of the Swin's"):
        ours.load_pretrained(tmp_path / "cut")
    with pytest.raises(UserError, match="is no folder with a Swin of transformers"):
        ours.load_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of another size"):
        TextSwin("swin_b", 384, 5, gates=4, attention="sdpa").load_pretrained(tmp_path / "swin")


def swin_layer(layer, x: torch.Tensor, side: int, window: int, shift: int) -> torch.Tensor:
    """A layer of Swin written out: each of (side * side, C) tokens attends to those that share its window, in a grid that
    is padded with zeros to whole windows, then moved by `shift` as on a torus; but across no edge of the padded grid."""
    a, whole = layer.attention, -(-side // window) * window
    heads = a.num_attention_heads
    y = torch.zeros(whole, whole, x.shape[1], dtype=x.dtype)
    y[:side, :side] = layer.layernorm_before(x).view(side, side, -1)
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(whole), torch.arange(whole), indexing="ij"))
    moved = [(t - shift) % whole for t in (rows, columns)]
    wrapped = [t < shift for t in (rows, columns)]  # moved across the edge
    label = torch.stack([*(m // window for m in moved), *wrapped], 1)  # (N, 4)
    together = (label[:, None] == label).all(2)  # (N, N)
    offset = [m[:, None] - m + window - 1 for m in moved]
    index = (offset[0] * (2 * window - 1) + offset[1]).clamp(
        0, (2 * window - 1) ** 2 - 1
    )  # that of far ones is not used
    bias = a.relative_position_bias.relative_position_bias_table[index].permute(2, 0, 1)  # (heads, N, N)
    q, k, v = (f(y.flatten(0, 1)).unflatten(1, (heads, -1)).transpose(0, 1) for f in (a.q_proj, a.k_proj, a.v_proj))
    logits = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2]) + bias).masked_fill(~together, -math.inf)
    out = a.o_proj((logits.softmax(2) @ v).transpose(0, 1).flatten(1))
    x = x + out.view(whole, whole, -1)[:side, :side].flatten(0, 1)
    return x + layer.mlp(layer.layernorm_after(x))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_are_shifted_on_grids_of_any_size(side, attention):
    """Also where the grid is one window, as at 384 px, or smaller than one: the originals' Swin, not transformers'."""
    torch.manual_seed(side)
    model = TextSwin("swin_t_tiny", 64, 5, gates=4, attention=attention).double().eval()
    for layer in model.stages[2].blocks:
        torch.nn.init.normal_(layer.attention.relative_position_bias.relative_position_bias_table)
    x = want = torch.randn(side * side, 128, dtype=torch.float64)
    for layer, shift in zip(model.stages[2].blocks, (0, 1)):
        x, want = model._layer(layer, x[None], (side, side))[0], swin_layer(layer, want, side, 2, shift)
    rtol = 1e-6 if attention == "eager" else 1e-12  # its softmax is in fp32
    torch.testing.assert_close(x, want, rtol=rtol, atol=rtol)


def test_an_image_smaller_than_a_window_is_segmented():
    with torch.device("meta"):
        stages = TextSwin("swin_b", 96, 5, gates=4, attention="sdpa")(
            torch.empty(1, 3, 96, 96), torch.empty(1, 4, 5), torch.empty(1, 4, dtype=torch.bool)
        )
    assert [tuple(x.shape[1:]) for x in stages] == [(128, 24, 24), (256, 12, 12), (512, 6, 6), (1024, 3, 3)]


def test_lavts_upsampling_aligns_corners():
    """In its loss and in evaluation: the square's corners are the logits' corners."""
    config = validate(
        {"model": {"name": "lavt", "size": "swin_t_tiny"}, "data": {"image_size": 64, "resize": "stretch"}}
    )
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(1, 2, 16, 16, generator=g), torch.rand(1, 64, 64, generator=g) > 0.6
    position = torch.arange(64) * 15 / 63
    weights = (1 - (position[:, None] - torch.arange(16)).abs()).clamp(min=0)  # (64, 16): linear between neighbours
    large = torch.einsum("ih,bahw,jw->baij", weights, logits, weights)
    p = large.softmax(1).gather(1, mask[:, None].long())
    w = torch.where(mask, 1.1, 0.9)
    torch.testing.assert_close(tiny("lavt").loss(logits, mask, torch.ones(1)), -(p.log()[:, 0] * w).sum() / w.sum())
    difference = (large[:, 1] - large[:, 0])[0]
    postprocess = MaskPostprocess.from_config(config)
    got = postprocess(logits[0, 1] - logits[0, 0], torch.tensor([64, 64]), (64, 64), 64)
    unsure = (difference.sigmoid() - config.eval.threshold).abs() < 1e-5
    assert torch.equal(got | unsure, (difference.sigmoid() > config.eval.threshold) | unsure) and got.any()
    rela = validate({"model": {"name": "rela", "size": "swin_t_tiny"}, "data": {"image_size": 64}})
    assert postprocess.align_corners and not MaskPostprocess.from_config(rela).align_corners


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_gets_a_gradient_and_lavts_padding_has_none(name):
    model = tiny(name, 96)
    image, size, tokens, real = inputs(96)
    loss = model.loss(model(image, size, tokens, real), torch.rand(2, 96, 96) > 0.7, torch.ones(2))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    frozen = {n.rpartition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"backbone.gates.3.0", "backbone.gates.3.2"} if name == "lavt" else set())
    model.eval()
    with torch.no_grad():
        if name == "rela":
            model.predictor.no_target[2].bias[0] = 99  # there is a target
            torch.nn.init.normal_(model.predictor.layers[0].to_words.words.weight)
        logits = model(image, size, tokens, real)
        assert logits.shape == (2, 24, 24) and logits.dtype == torch.float32
        other = model(image, size, torch.where(real, tokens, 7), real)
        assert torch.equal(logits, other) == (name == "lavt")  # ReLA's region queries read padding, as in the original
        assert not torch.equal(logits, model(image, size, torch.where(real, 7, tokens), real))


@pytest.mark.parametrize("name", METHODS)
def test_layers_computed_again_give_the_same_gradients(name):
    """In training mode, so that layers are dropped, and the same ones again."""
    gradients = []
    for policy in ("none", "block"):
        model = tiny(name)
        model.checkpoint_activations(policy)
        torch.manual_seed(2)
        model.loss(model(*inputs()), torch.ones(2, 64, 64), torch.ones(2)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with pytest.raises(ValueError, match="'selective' is not none or block"):
        model.checkpoint_activations("selective")


def test_relas_regions_hear_no_words_at_first_and_learn_to():
    predictor = tiny("rela").predictor
    levels = [torch.randn(2, 32, n, n) for n in (2, 4, 8)]
    features, words = torch.randn(2, 32, 16, 16), torch.randn(2, 12, 768)
    out = predictor(levels, features, words)
    assert all(torch.equal(a, b) for a, b in zip(out, predictor(levels, features, torch.randn(2, 12, 768))))
    out.mask.square().mean().backward()
    assert predictor.layers[0].to_words.words.weight.grad.abs().max() > 0
    assert [layer.to_words is not None for layer in predictor.layers] == [True, False, False]


def multihead(attention) -> torch.nn.MultiheadAttention:
    """PyTorch's, with the weights of ours."""
    d = attention.out.in_features
    theirs = torch.nn.MultiheadAttention(d, attention.heads, batch_first=True, dtype=torch.float64)
    projections = (attention.q, attention.k, attention.v)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(attention.out.state_dict())
    return theirs


def test_relas_predictor_is_the_originals():
    """Written out over PyTorch's attention, whose masks say where a query does *not* attend; any weights, in fp64."""
    torch.manual_seed(3)
    p = tiny("rela").predictor.double()
    for x in p.parameters():
        torch.nn.init.normal_(x, std=0.3)
    levels = [torch.randn(2, 32, n, n).double() for n in (2, 4, 8)]
    features, text = torch.randn(2, 32, 16, 16).double(), torch.randn(2, 12, 768).double()
    got = p(levels, features, text)

    def heads(x):
        x = p.norm(x)
        embedded, minimap = p.mask_embed(x), p.minimap(x)
        of_regions = embedded @ features.flatten(2)  # (B, Q, HW)
        target = minimap.transpose(1, 2) @ embedded @ features.flatten(2)  # (B, 2, HW)
        return of_regions.view(2, 100, 16, 16), target.view(2, 2, 16, 16), minimap, p.no_target(x).mean(1)

    x = p.queries.expand(2, -1, -1)
    for i, layer in enumerate(p.layers):
        level = levels[i % 3]
        h, w = level.shape[2:]
        position = p.sine_positions(level.shape, level.device, level.dtype).flatten(2).transpose(1, 2)
        visual = level.flatten(2).transpose(1, 2) + p.levels[i % 3]
        small = torch.nn.functional.interpolate(heads(x)[0], (h, w), mode="bilinear", align_corners=False)
        outside = small.sigmoid().flatten(2) < 0.5
        outside = outside & ~outside.all(2, keepdim=True)
        mask = outside.repeat_interleave(layer.to_image.heads, 0)
        said = multihead(layer.to_image)(x + p.positions, visual + position, visual, attn_mask=mask)[0]
        x = layer.norms[0](x + said)
        if i == 0:
            words = text @ layer.to_words.words.weight.t()
            said = layer.to_words.norm(x + multihead(layer.to_words)(x, words, words)[0])
            x = x + said * layer.to_words.scale.sigmoid() * 0.1
        x = layer.norms[1](x + multihead(layer.to_regions)(x + p.positions, x + p.positions, x)[0])
        x = layer.norms[2](x + layer.ffn(x))
    _, target, minimap, none = heads(x)
    for mine, want in zip(got, (target, minimap.transpose(1, 2).view(2, 2, 10, 10), none)):
        torch.testing.assert_close(mine, want.float(), rtol=1e-6, atol=1e-6)


def test_relas_initial_attention_is_pytorchs():
    """Mask2Former's: one Xavier-uniform matrix for queries, keys and values, no biases; the text's projection is zero."""
    torch.manual_seed(0)
    attention = tiny("rela").predictor.layers[0].to_words
    stacked = torch.cat([p.weight for p in (attention.q, attention.k, attention.v)])
    for weight in (stacked, attention.out.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not any(p.bias.any() for p in (attention.q, attention.k, attention.v, attention.out))
    assert not attention.words.weight.any() and attention.words.bias is None


def test_relas_loss_and_its_no_target():
    g = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.zeros(20, 20), (torch.rand(20, 20, generator=g) > 0.2).float()])
    # a region's centre lies between four pixels: all of them must be of the target
    regions = mask.view(2, 10, 2, 10, 2).amin((2, 4))
    assert (regions[1] != mask[1, ::2, ::2]).any() and regions[1].any()
    sizes = ((2, 2, 20, 20), (2, 2, 10, 10), (2, 2))
    out = Output(*(torch.randn(*s, generator=g, dtype=torch.float64).float() for s in sizes))
    want = 0.0
    for i in range(2):
        for logits, target, share in (
            (out.mask[i], mask[i], 1.0),
            (out.minimap[i], regions[i], 0.1),
            (out.no_target[i][:, None, None], torch.full((1, 1), 1.0 - i), 0.1),
        ):
            p = logits.softmax(0)
            nll = -torch.where(target > 0, p[1], p[0]).log()
            w = torch.where(target > 0, 1.1, 0.9)
            want += 5 * share * (nll * w).sum() / w.sum() / 2
    model = tiny("rela")
    torch.testing.assert_close(model.loss(out, mask, torch.ones(2)), want, rtol=1e-5, atol=1e-6)
    assert (
        two_class_loss(out.mask, mask, torch.tensor([1.0, 0.0]))
        == two_class_loss(out.mask[:1], mask[:1], torch.ones(1)) / 2
    )  # a sample of weight 0 has no say
    model.eval()
    torch.nn.init.zeros_(model.predictor.no_target[2].weight)
    for none, says in ((0.0, False), (9.0, True)):
        torch.nn.init.zeros_(model.predictor.no_target[2].bias)
        model.predictor.no_target[2].bias.data[1] = none
        assert bool((model(*inputs()) == -20).all()) == says


def test_sine_positions_are_mask2formers():
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

    where = ((2, 3, 5, 7), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(SinePositions(32)(*where), Mask2FormerSinePositionEmbedding(16, normalize=True)(*where))


def test_running_statistics_stay_fp32_and_forget_a_step_left_out(world):
    config = {"model": {"name": "lavt", "size": "swin_t_tiny"}, "data": {"image_size": 64}, "train": {"batch_size": 2}}
    config = validate(config | {"deepspeed": {"config": str(ROOT / "configs/deepspeed/zero0.json")}})
    wrapped = engine.initialize(tiny("lavt"), config, world)
    norm = wrapped.module.decoder.steps[2][4]
    assert norm.weight.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    statistics = SyncedBatchNormStats(wrapped.module)
    for taken in (True, False):
        before = norm.running_mean.clone()
        wrapped(*inputs())
        assert not torch.equal(norm.running_mean, before)
        statistics.stepped(taken)
        assert torch.equal(norm.running_mean, before) != taken


def test_norms_and_position_tables_are_spared_weight_decay():
    config = validate({"train": {"weight_decay": 0.1, "weight_decay_norms": False}}).train
    model = tiny("lavt")
    spared = engine.no_decay(model)
    assert {"backbone.norms.3.bias", "decoder.steps.0.1.weight", "backbone.embeddings.norm.weight"} <= spared
    assert "backbone.stages.2.blocks.1.attention.relative_position_bias.relative_position_bias_table" in spared
    assert not any(".mlp." in n or "pwams" in n or "embeddings.word" in n for n in spared)
    groups = engine.parameter_groups(model, config)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and len(groups[1]["params"]) == len(spared)
    assert len(engine.parameter_groups(model, config.model_copy(update={"weight_decay_norms": True}))) == 1


def test_poly_goes_to_zero():
    t = validate({"train": {"schedule": "poly", "warmup_epochs": 0, "epochs": 2, "lr": 1.0}}).train
    assert [learning_rate(s, 10, t) for s in (0, 10, 20)] == pytest.approx([1.0, 0.5**0.9, 0.0])


def test_stretched_samples_fill_the_square_and_predictions_go_back(shards):
    index = SplitIndex.load(shards / "refcoco/unc", "val")
    words = lambda text: (np.zeros(4, np.int64), np.ones(4, bool))  # noqa: E731
    sets = {r: ExpressionDataset(index, "sentence", 64, words, resize=r) for r in ("pad", "stretch")}
    stretched, padded = (sets[r][0, 0, 1.0] for r in ("stretch", "pad"))
    height, width = stretched["original"].shape
    assert height != width and min(padded["size"]) < 64 == max(padded["size"])
    assert stretched["size"].tolist() == [64, 64] and stretched["mask"].shape == (64, 64)
    share = stretched["original"].mean()
    assert stretched["mask"].mean() == pytest.approx(share, abs=0.02) and share > 0.01
    batch = sets["stretch"].__getitems__([(0, 0, 1.0)])
    logits = (batch["mask"].float() * 2 - 1) * 9
    back = original_probabilities(logits[0], batch["size"][0], (height, width), 64).numpy() > 0.5
    overlap = np.logical_and(back, stretched["original"]).sum() / np.logical_or(back, stretched["original"]).sum()
    assert overlap > 0.8


def test_mixes_without_a_meaning_are_refused():
    def line(name, size, *more):
        with pytest.raises(UserError) as e:
            load_config(ROOT / "configs/base.yaml", ["--model.name", name, "--model.size", size, *more])
        return str(e.value)

    assert "has no size vit_b: set model.size swin_b or swin_t_tiny" in line("lavt", "vit_b")
    assert "has no size swin_b: set model.size vit_t, vit_b" in line("dit_sam", "swin_b")
    assert "knows no model.scheme" in line("rela", "swin_b", "--model.scheme", "default")
    assert "knows no train.dice_weight" in line("lavt", "swin_b", "--train.dice_weight", "1")
    assert "has no attention xformers" in line("lavt", "swin_b", "--model.attention", "xformers")
    assert "can't recompute every_2" in line("lavt", "swin_b", "--train.activation_checkpointing", "every_2")
    assert "did you mean 'lavt'?" in line("lavd", "swin_b")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/paper").glob("table8_*.yaml")), ids=lambda p: p.stem)
def test_table_8s_configurations(path):
    config = load_config(path)
    gpus = 8 if config.model.name == "rela" else 4
    ds = deepspeed_config(config, gpus)
    assert ds["gradient_accumulation_steps"] == 1 and config.run_dir == f"runs/{path.stem}"
    if config.model.name == "rela":  # the rate drops at 110,000 and 140,000 steps over RefCOCO's 42,404 refs
        steps = math.ceil(42404 / config.train.batch_size)
        drops = [s for s in range(105000, 145000, 100) if learning_rate(s, steps, config.train)
                 < 0.5 * learning_rate(s - 100, steps, config.train)]  # fmt: skip
        assert drops == [110000, 140000]
