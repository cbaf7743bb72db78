"""LAVT and ReLA: their originals' equations, written out over PyTorch alone."""

from __future__ import annotations

import math

import pytest
import torch
from test_methods import inputs, tiny

import dit_ds.torchvision_stub  # noqa: F401  before transformers
from dit_ds.config.load import validate
from dit_ds.evaluation.postprocess import MaskPostprocess
from dit_ds.models.losses import two_class_loss
from dit_ds.models.rela import Output, SinePositions
from dit_ds.models.swin import PWAM, TextSwin


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
