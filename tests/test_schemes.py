"""Every scheme against its equations, written out here in float64; what starts at zero; what trains; a scheme of one's own."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from conftest import MINILM, ROOT
from torch import nn

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.config.schema import ModelConfig
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.instruction import SCHEMES, Instruction, Options, StaticTokens, make_instruction, projection
from dit_ds.models.losses import segmentation_loss
from dit_ds.models.text_encoder import TextEncoder

DIM, DEPTH, HEADS, TEXT, GRID = 48, 3, 4, 24, 4
INSIDE = [name for name in SCHEMES if name != "default"]  # those that put words into the ViT


def make_encoder(scheme, static=0, additive=False, **options):
    torch.manual_seed(0)
    model = ImageEncoder(16 * GRID, 16, DIM, DEPTH, HEADS, 32, "chunked").double()
    model.instruction = make_instruction(scheme, TEXT, DIM, DEPTH, Options(**options))
    if static:
        model.static_tokens = StaticTokens(static, DIM, DEPTH, additive)
    for name, p in model.named_parameters():
        if "rel_pos" in name or "static" in name:
            nn.init.normal_(p)
    return model.double()


def inputs(t=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16 * GRID, 16 * GRID, generator=g, dtype=torch.double)
    words = torch.randn(2, t, TEXT, generator=g, dtype=torch.double)
    return x, words, torch.tensor([[True] * t, [True] * 2 + [False] * (t - 2)])


# --- the equations ------------------------------------------------------------------------------------------------


def layer_of_equation_6(block, tokens, t, mask):
    """L_i: SAM's layer over [F_t; F_v], with the positions of F_v only; nothing here is shared with the package."""
    n, d, length = GRID * GRID, DIM // HEADS, tokens.shape[1]

    def norm(z, of):
        return (z - z.mean(-1, keepdim=True)) / (
            z.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt() * of.weight + of.bias

    z = norm(tokens, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = z.view(2, length, 3, HEADS, d).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / d**0.5
    for i in range(n):
        for j in range(n):
            row, column = i // GRID - j // GRID + GRID - 1, i % GRID - j % GRID + GRID - 1
            logits[:, :, t + i, t + j] += q[:, :, t + i] @ (block.attn.rel_pos_h[row] + block.attn.rel_pos_w[column])
    logits[:, :, :, :t] = logits[:, :, :, :t].masked_fill(~mask[:, None, None], float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(2, length, DIM)
    tokens = tokens + out @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = norm(tokens, block.norm2) @ block.mlp.lin1.weight.T + block.mlp.lin1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return tokens + hidden @ block.mlp.lin2.weight.T + block.mlp.lin2.bias


def affine(linear, z):
    return z @ linear.weight.T + linear.bias


def attended(part, words, image):
    """Table 4's cross-attention of one layer, head by head."""
    q, kv = affine(part.query, words), affine(part.key_value, image)
    k, v = kv[..., :512], kv[..., 512:]
    heads = []
    for h in range(8):
        of = slice(64 * h, 64 * (h + 1))
        heads.append((q[..., of] @ k[..., of].transpose(1, 2) / 8).softmax(-1) @ v[..., of])
    return part.norm(affine(part.project, words) + affine(part.out, torch.cat(heads, -1)))


def words_of_a_layer(scheme, module, i, text, before_made, before_out, image):
    """F_t^i by the scheme's equation: from the text, from F_t^(i-1), or from what left layer i-1."""
    if scheme == "layer_wise":  # equation 8
        return affine(module.projections[i], text)
    if scheme == "end_to_end":  # equations 4 and 6
        out = affine(module.projection, text) if i == 0 else before_out
        return affine(module.adapters[i - 1], out) if i and module.adapters else out
    if scheme == "cascade":  # Table 9
        return affine(module.chain[i], text if i == 0 else before_made)
    z = attended(module.attend[i], text, image)
    if scheme == "cross_attention_ffn":
        first, _, second = module.feed_forward[i].layers
        z = module.feed_forward[i].norm(z + affine(second, affine(first, z).clamp(min=0)))
    return z


def by_the_equations(model, scheme, x, text, mask):
    image = (model.patch_embed(x) + model.pos_embed).flatten(1, 2)
    made = out = None
    for i, block in enumerate(model.blocks):
        made = words_of_a_layer(scheme, model.instruction, i, text, made, out, image)
        tokens, m, static = made, mask, model.static_tokens
        if static is not None:
            s = static.tokens[i].expand(2, -1, -1)
            tokens = made + s if static.additive else torch.cat([made, s], 1)
            m = mask if static.additive else torch.cat([mask, torch.ones(2, s.shape[1], dtype=torch.bool)], 1)
        t = tokens.shape[1]
        after = layer_of_equation_6(block, torch.cat([tokens, image], 1), t, m)
        out, image = after[:, : made.shape[1]], after[:, t:]
    return model.neck(image.view(2, GRID, GRID, DIM).permute(0, 3, 1, 2))


@pytest.mark.parametrize("static", ["none", "concat", "add"])
@pytest.mark.parametrize("scheme", INSIDE)
def test_a_scheme_computes_its_equations(scheme, static):
    model = make_encoder(scheme, {"none": 0, "concat": 3, "add": 5}[static], static == "add", adapt=static != "none")
    for p in model.instruction.parameters():  # away from identity and zero
        nn.init.normal_(p, std=0.2)
    x, words, mask = inputs()
    want = by_the_equations(model, scheme, x, words, mask)
    for backend in ("eager", "chunked", "sdpa", "naive"):
        for block in model.blocks:
            block.attn.backend = backend
        torch.testing.assert_close(model(x, words, mask), want, rtol=1e-9, atol=1e-9)
    model.checkpoint_activations("every_2")  # what is carried passes from one segment to the next
    torch.testing.assert_close(model(x, words, mask), want, rtol=1e-9, atol=1e-9)


def test_default_has_no_words_in_the_encoder():
    x, words, mask = inputs()
    model = make_encoder("default")
    assert model.instruction is None and torch.equal(model(x, words, mask), model(x))


# --- step 0 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", INSIDE)
def test_zero_words_say_nothing_at_first_and_learn(scheme):
    """At step 0 all words are one blank token, whatever they are; from the next step on what they say matters."""
    x, words, _ = inputs()
    model = make_encoder(scheme, zero=True)
    torch.testing.assert_close(model(x, words), model(x, -3 * words), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x, words), model(x), atol=1e-3)  # blank tokens take a share of the attention
    uniform = make_encoder(scheme)
    assert not torch.allclose(uniform(x, words), uniform(x, -3 * words), atol=1e-3)

    optimizer = torch.optim.Adam(model.instruction.parameters(), 1e-3)
    first = gradient_of(model, x, words)
    optimizer.step()
    assert not torch.allclose(model(x, words), model(x, -3 * words), atol=1e-3)
    later = gradient_of(model, x, words)
    usual = gradient_of(uniform, x, words)
    # none that Adam's second moment would keep for long
    assert 0 < first < 10 * max(later, usual), (first, later, usual)


def gradient_of(model, x, words):
    """The norm of the gradient of all that makes tokens of the words."""
    model.zero_grad()
    out = model(x, words)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).mean().backward()
    return sum(p.grad.square().sum() for p in model.instruction.parameters()).sqrt().item()


def test_adapters_and_added_static_tokens_change_nothing_at_first():
    x, words, mask = inputs()
    plain, adapted = make_encoder("end_to_end"), make_encoder("end_to_end", adapt=True)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    plain_out = plain(x, words, mask)
    torch.testing.assert_close(adapted(x, words, mask), plain_out)
    plain.static_tokens = StaticTokens(5, DIM, DEPTH, additive=True).double()
    torch.testing.assert_close(plain(x, words, mask), plain_out)


# --- what trains --------------------------------------------------------------------------------------------------


def small_model(scheme="layer_wise", frozen_text=True, **options):
    torch.manual_seed(0)
    return DITSAM(TextEncoder(MINILM, layers=1, frozen=frozen_text), "vit_t", 64, scheme, **options)


def batch():
    g = torch.Generator().manual_seed(2)
    token_mask = torch.arange(20)[None] < torch.tensor([[6], [9], [2]])
    return {
        "image": torch.randint(0, 256, (3, 3, 64, 64), generator=g, dtype=torch.uint8),
        "size": torch.tensor([[64, 64], [64, 32], [32, 64]]),
        "tokens": torch.randint(1000, 3000, (3, 20), generator=g) * token_mask,
        "token_mask": token_mask,
    }


def gradients(model):
    segmentation_loss(model(**batch()), torch.ones(3, 64, 64), torch.ones(3)).backward()
    return {n for n, p in model.named_parameters() if p.grad is not None}


FREEZE = ("image", "text", "decoder")


@pytest.mark.parametrize("frozen", [(), ("image",), ("image", "text"), ("text",), ("decoder",), FREEZE])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_frozen_gets_no_gradient_and_all_else_does(scheme, frozen):
    options = {"freeze_image_encoder": "image" in frozen, "freeze_mask_decoder": "decoder" in frozen}
    if scheme == "end_to_end":
        options["adapters"] = "image" in frozen
    model = small_model(scheme, "text" in frozen, static_tokens=0 if scheme == "default" else 4, **options)
    trained = gradients(model)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}  # none waits for a gradient in vain
    assert "text_projection.weight" in trained
    assert any(n.startswith("image_encoder.instruction.") for n in trained) == (scheme != "default")
    assert ("image_encoder.static_tokens.tokens" in trained) == (scheme != "default")
    assert ("image_encoder.blocks.0.attn.qkv.weight" in trained) != ("image" in frozen)
    assert any(n.startswith("text_encoder.") for n in trained) != ("text" in frozen)
    assert any(n.startswith(("mask_decoder.", "prompt_encoder.")) for n in trained) != ("decoder" in frozen)
    if frozen == FREEZE:
        assert {n.split(".")[1] for n in trained if n.startswith("image_encoder")} <= {"instruction", "static_tokens"}


def test_frozen_projections_are_the_released_codes_slip():
    """Words then never enter: zero projections that don't train."""
    model = small_model(freeze_image_encoder=True, freeze_projections=True, zero_words=True)
    assert not any(n.startswith("image_encoder.") for n in gradients(model))
    x = torch.randn(1, 3, 64, 64)
    words = torch.randn(2, 1, 4, 384)
    torch.testing.assert_close(model.image_encoder(x, words[0]), model.image_encoder(x, words[1]))


def test_padding_that_counts_as_words():
    """The released code: what BERT makes of padding enters the ViT and the decoder."""
    torch.manual_seed(0)
    text = TextEncoder(MINILM, layers=1, zero_padding=False)
    model = DITSAM(text, "vit_t", 64, mask_padding=False).eval()
    inputs = batch()
    assert model.text_encoder(inputs["tokens"], inputs["token_mask"])[2, 5:].abs().sum() > 0
    fewer = {k: inputs[k][:, :12] for k in ("tokens", "token_mask")}
    assert not torch.allclose(model(**inputs), model(**inputs | fewer), atol=1e-4)
    masked = small_model().eval()
    model.load_state_dict(masked.state_dict())
    assert gradients(model) == {n for n, p in model.named_parameters() if p.requires_grad}


# --- CLIP ---------------------------------------------------------------------------------------------------------


def test_clips_text_tower_reads_the_words(tiny_clip):
    """Its last hidden states, as transformers computes them; frozen: no gradients, evaluation mode, half of it."""
    import transformers

    encoder = TextEncoder(str(tiny_clip))
    tokens = torch.tensor([[0, 5, 6, 7, 1, 1, 1], [0, 5, 6, 7, 8, 9, 1]])
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    whole = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    want = whole.text_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(encoder(tokens, mask), want * mask[..., None])
    assert encoder.dim == 32 and not encoder.train().bert.training
    assert not encoder(tokens, mask).requires_grad
    assert torch.isfinite(encoder(tokens, torch.zeros_like(mask))).all()  # no words at all
    assert len(list(TextEncoder(str(tiny_clip), layers=2).bert.modules())) < len(list(encoder.bert.modules()))


# --- one's own ----------------------------------------------------------------------------------------------------


def documented_scheme() -> type[Instruction]:
    """The class that docs/extend.md adds as an example."""
    code = re.search(r"```python\n(class WordsOnce.*?)```", (ROOT / "docs/extend.md").read_text(), re.DOTALL)[1]
    names = {"Instruction": Instruction, "projection": projection}
    exec(code, names)
    return names["WordsOnce"]


def test_the_configuration_names_every_scheme():
    assert set(get_args(ModelConfig.model_fields["scheme"].annotation)) == SCHEMES.keys()


def test_a_new_scheme_is_a_class_and_a_line(monkeypatch, config_file):
    from dit_ds.config.load import load_config
    from dit_ds.models.build import build_model

    monkeypatch.setitem(SCHEMES, "words_once", documented_scheme())
    config = load_config(config_file, ["--model.static_tokens", "2"])
    config.model.scheme = "words_once"  # which a new scheme adds to the schema's Literal
    model = build_model(config)
    trained = gradients(model)
    assert {"image_encoder.instruction.shared.weight", "image_encoder.static_tokens.tokens"} <= trained
    listens = model.eval()(**batch()) - model(**batch() | {"tokens": batch()["tokens"].flip(0)})
    assert listens.abs().max() > 1e-3


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, says",
    [
        ("--model.scheme cascad", "did you mean 'cascade'?"),
        ("--model.scheme default --model.static_tokens 4", "set model.scheme layer_wise"),
        ("--model.static_tokens 4 --model.static_form add", "set model.static_tokens 20"),
        ("--model.adapters always", "of model.scheme end_to_end"),
        ("--model.freeze_projections true", "goes with model.freeze_image_encoder"),
        (
            "--model.scheme default --text.freeze true --model.freeze_image_encoder true"
            " --model.freeze_mask_decoder true",
            "nothing is left to train",
        ),
        ("--data.prompts [text,text]", "names one twice"),
        ("--data.scales [640]", "data.image_size, 64"),
        ("--data.scales [32] --data.resize stretch", "set data.resize pad"),
    ],
)
def test_impossible_combinations_are_refused_in_a_line(config_file, capsys, overrides, says):
    from dit_ds.cli.entry import main

    assert main(["train", "--config", str(config_file), *overrides.split()]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_more_tokens_than_clip_reads_are_refused(config_file, tiny_clip, capsys):
    from dit_ds.cli.entry import main

    overrides = ["--text.name", str(tiny_clip), "--data.tokens", "78"]
    assert main(["train", "--config", str(config_file), *overrides]) == 2
    assert "data.tokens 78" in (err := capsys.readouterr().err) and "set data.tokens 77" in err
