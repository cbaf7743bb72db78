"""`model.scheme_form released`: each scheme as the paper's released code has it, written out here in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import MINILM
from test_schemes import DEPTH, DIM, GRID, TEXT, affine, batch, gradients, inputs, layer_of_equation_6
from torch import nn

from dit_ds import torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.config.load import load_config
from dit_ds.models.build import build_model
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.instruction import Options, make_instruction, make_static_tokens
from dit_ds.models.text_encoder import TextEncoder

FORMS = ["cross_attention", "cross_attention_ffn", "end_to_end", "end_to_end + static", "layer_wise + static"]


def make_encoder(form, text_dim, **options):
    scheme, _, static = form.partition(" + ")
    torch.manual_seed(0)
    model = ImageEncoder(16 * GRID, 16, DIM, DEPTH, 4, 32, "chunked")
    adapt = form == "end_to_end"
    options = Options(adapt=adapt, released=True, static=bool(static), **options)
    model.instruction = make_instruction(scheme, text_dim, DIM, DEPTH, options)
    if static:
        model.static_tokens = make_static_tokens(scheme, 5, DIM, DEPTH, additive=True, released=True)
    return model.double()


def normed(norm, x):
    """The released code's LayerNorm, whose deviation is unbiased."""
    mean = x.mean(-1, keepdim=True)
    deviation = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    return norm.weight * (x - mean) / (deviation + 1e-6) + norm.bias


def attention(part, text, keys, mask=None):
    """Head by head: 8 of 64."""
    q, kv = affine(part.query, text), affine(part.key_value, keys)
    heads = []
    for h in range(8):
        of = slice(64 * h, 64 * (h + 1))
        logits = q[..., of] @ kv[..., :512][..., of].transpose(1, 2) / 8
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -math.inf)
        heads.append(logits.softmax(-1) @ kv[..., 512:][..., of])
    return affine(part.out, torch.cat(heads, -1))


def tokens_of_a_layer(form, module, static, i, y, rows, image, mask):
    """What facts of the released code say; `rows` are those that left layer i-1."""
    if form == "cross_attention":
        projected = affine(module.projections[i], y)
        if i == 0:
            return projected
        part = module.attend[i - 1]
        return normed(part.norm, projected + attention(part, y, rows, mask))
    if form == "cross_attention_ffn":
        y = y if isinstance(module.shared, nn.Identity) else affine(module.shared, y)
        part, ffn = module.attend[i], module.feed_forward[i]
        q1 = normed(part.norm, y + attention(part, y, image))
        first, *_, last = ffn.layers
        q2 = normed(ffn.norm, q1 + affine(last, affine(first, q1).clamp(min=0)))
        return normed(module.norms[i], y + q2)
    if form == "end_to_end":
        return affine(module.projection, y) if i == 0 else affine(module.adapters[i - 1], rows)
    if form == "end_to_end + static":
        return affine(module.projection, y) if i == 0 else rows + static.tokens[i - 1]
    return (y if isinstance(module.shared, nn.Identity) else affine(module.shared, y)) + static.tokens[i]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("text_dim", [DIM, TEXT])
@pytest.mark.parametrize("form", FORMS)
def test_a_released_form_computes_what_the_released_code_does(form, text_dim, masked):
    model = make_encoder(form, text_dim)
    for name, p in model.named_parameters():
        if "instruction" in name or "static" in name or "rel_pos" in name:
            nn.init.normal_(p, std=0.2)
    x, words, mask = inputs()
    y = torch.randn(2, 5, text_dim, dtype=torch.double)
    every = torch.ones_like(mask)
    image, rows = (model.patch_embed(x) + model.pos_embed).flatten(1, 2), None
    for i, block in enumerate(model.blocks):
        made = tokens_of_a_layer(
            form, model.instruction, model.static_tokens, i, y, rows, image, mask if masked else every
        )
        after = layer_of_equation_6(block, torch.cat([made, image], 1), 5, mask if masked else every)
        rows, image = after[:, :5], after[:, 5:]
    want = model.neck(image.view(2, GRID, GRID, DIM).permute(0, 3, 1, 2))
    for backend in ("chunked", "naive"):
        for block in model.blocks:
            block.attn.backend = backend
        torch.testing.assert_close(model(x, y, mask if masked else None), want, rtol=1e-9, atol=1e-9)
    for policy in ("block", "every_2"):  # what is carried passes from one segment to the next
        model.checkpoint_activations(policy)
        torch.testing.assert_close(model(x, y, mask if masked else None), want, rtol=1e-9, atol=1e-9)


def shapes(model):
    return sorted(tuple(p.shape) for n, p in model.named_parameters() if n.startswith(("instruction.", "static_")))


def linear(inputs, outputs, count=1):
    return [(outputs, inputs), (outputs,)] * count


def test_the_parameters_are_those_of_the_authors_checkpoints():
    """Shapes for text and a ViT of the same width D; keys and values are one layer here, of 1024, and two of 512 there."""
    d = DIM
    mha = [*linear(d, 512), *linear(d, 1024), *linear(512, d)]
    norm = [(d,), (d,)]
    one = [*mha, *linear(d, 2048), *linear(2048, d), *norm * 3]
    want = {
        "cross_attention": linear(d, d, DEPTH) + [*mha, *norm] * (DEPTH - 1),  # probs; cross and ln from layer 1 on
        "cross_attention_ffn": one * DEPTH,
        "end_to_end": linear(d, d, DEPTH),
        "end_to_end + static": [(DEPTH - 1, 5, d), *linear(d, d)],
        "layer_wise + static": [(DEPTH, 5, d)],
    }
    for form in FORMS:
        assert shapes(make_encoder(form, DIM)) == sorted(want[form]), form


def test_released_adapters_start_at_zero():
    """What reaches the second layer says nothing of the text at first."""
    model = make_encoder("end_to_end", TEXT)
    x, words, _ = inputs()
    made = [
        model.instruction(rows, 1, x) for rows in (torch.randn(2, 5, DIM).double(), torch.zeros(2, 5, DIM).double())
    ]
    assert torch.equal(*made)
    assert not torch.allclose(model(x, words), model(x, -3 * words))  # the first layer's does


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_where_the_released_code_has_it(form):
    """At every layer of cross-attention but the first, and of E-DIT; beside static tokens at the first, or nowhere."""
    model = make_encoder(form, DIM, dropout=0.5).train()
    image, y = torch.randn(2, GRID, GRID, DIM).double(), torch.randn(2, 5, DIM).double()
    for p in model.instruction.parameters():
        nn.init.normal_(p, std=0.2)
    with_dropout = []
    for i in range(DEPTH):
        more = (y, None) if model.instruction.reads_former_layer else ()
        with_dropout.append(not torch.equal(*(model.instruction(y, i, image, *more) for _ in range(2))))
    assert (
        with_dropout
        == {
            "cross_attention": [False, True, True],
            "cross_attention_ffn": [True] * 3,
            "end_to_end": [True] * 3,
            "end_to_end + static": [True, False, False],
            "layer_wise + static": [False] * 3,
        }[form]
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_all_that_trains_gets_a_gradient_and_padding_changes_nothing(form, frozen):
    scheme, _, static = form.partition(" + ")
    torch.manual_seed(0)
    model = DITSAM(TextEncoder(MINILM, layers=1, frozen=True), "vit_t", 64, scheme, released=True, word_dropout=0.1,
                   adapters=form == "end_to_end", static_tokens=20 if static else 0, add_static=bool(static),
                   freeze_image_encoder=frozen, zero_words=True)  # fmt: skip
    assert gradients(model) == {n for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    given = batch()
    padded = given | {"tokens": given["tokens"] + 777 * ~given["token_mask"]}
    torch.testing.assert_close(model(**given), model(**padded), rtol=1e-5, atol=1e-6)
    none = given | {"token_mask": torch.zeros_like(given["token_mask"]), "points": torch.full((3, 1, 2), 9.0),
                    "labels": torch.ones(3, 1, dtype=torch.long)}  # fmt: skip
    assert torch.isfinite(model(**none)).all()  # samples without words, beside others in a mixture


def test_the_configuration_builds_the_released_form(config_file):
    """Each row of released_code.yaml, and the default is the paper's."""
    rows = {
        "cross_attention": [],
        "cross_attention_ffn": [],
        "end_to_end": ["--model.adapters", "always"],
        "layer_wise": ["--model.static_tokens", "20", "--model.static_form", "add"],
    }
    for scheme, more in rows.items():
        overrides = ["--model.scheme", scheme, *more]
        plain = build_model(load_config(config_file, overrides))
        model = build_model(load_config(config_file, [*overrides, "--model.scheme_form", "released"]))
        names, other = ({n for n, _ in m.image_encoder.named_parameters()} for m in (model, plain))
        assert (names == other) == (scheme == "end_to_end"), scheme
        assert gradients(model) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "overrides, says",
    [
        ("--model.scheme cascade", "set model.scheme_form paper"),
        ("--model.scheme end_to_end", "set model.adapters always"),
        ("--model.scheme end_to_end --model.adapters always --model.static_tokens 20 --model.static_form add",
         "set model.adapters never"),
        ("--model.static_tokens 20", "set model.static_form add"),
        ("--model.scheme cross_attention --model.static_tokens 20 --model.static_form add", "set model.static_tokens 0"),
    ],
)  # fmt: skip
def test_what_was_not_released_is_refused_in_a_line(config_file, refusal, overrides, says):
    line = refusal("train", "--config", config_file, "--model.scheme_form", "released", *overrides.split())
    assert says in line
