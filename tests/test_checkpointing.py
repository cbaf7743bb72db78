"""Activation checkpointing and torch.compile under DeepSpeed: the same numbers, less kept, what is said computed again."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import on_ranks

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.models.instruction import Options, make_instruction

POLICIES = ("none", "block", "every_3", "selective")
DEPTH = 4  # of vit_t


STAGES = [*(pytest.param(stage, marks=pytest.mark.slow) for stage in range(3)), 3]


@functools.cache
def by_policy(stage: int) -> dict[str, dict]:
    """What two ranks computed under each policy of activation checkpointing."""
    return dict(zip(POLICIES, on_ranks(2, *({"stage": stage, "policy": p} for p in POLICIES))))


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_bits_under_every_zero_stage(stage, policy):
    """With dropout in the recomputed layers: other draws there would give other losses after the first step."""
    plain, recomputed = by_policy(stage)["none"], by_policy(stage)[policy]
    assert recomputed["losses"] == plain["losses"]
    assert recomputed["weights"] == plain["weights"]


@pytest.mark.parametrize("stage", STAGES)
def test_selective_keeps_the_attention_and_the_others_recompute_it(stage):
    calls = {p: by_policy(stage)[p]["attention_calls"] for p in POLICIES}
    assert calls == {"none": DEPTH, "block": 2 * DEPTH, "every_3": 2 * DEPTH, "selective": DEPTH}


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_under_deepspeed():
    settings = [{"stage": s, "policy": p, "compile": True} for s, p in ((2, "none"), (2, "selective"), (3, "block"))]
    for setting, compiled in zip(settings, on_ranks(2, *settings)):
        plain = by_policy(setting["stage"])[setting["policy"]]
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert compiled["attention_calls"] == plain["attention_calls"]


def encoder(word_dropout: float = 0.0, **options) -> ImageEncoder:
    torch.manual_seed(0)
    model = ImageEncoder(64, 8, 48, 6, 4, 32, "chunked", **options)
    model.instruction = make_instruction("layer_wise", 24, 48, 6, Options(dropout=word_dropout))
    return model


def kept_by(model: ImageEncoder, policy: str) -> int:
    """Bytes that autograd, or the checkpoints' caches, hold after a forward pass; parameters left out."""
    model.checkpoint_activations(policy)
    from dit_ds.planning.memory.live_tensors import LiveTensors

    x, words = torch.randn(2, 3, 64, 64), torch.randn(2, 5, 24, requires_grad=True)
    with LiveTensors() as live:
        out = model(x, words)
        kept = live.now
    out.sum().backward()
    return kept


def test_each_policy_keeps_less():
    model = encoder()
    kept = {p: kept_by(model, p) for p in (*POLICIES, "every_2")}
    image = 2 * 64 * 48 * 4  # bytes of a layer's input
    assert kept["none"] > kept["selective"] + 6 * 5 * image  # at least q, k, v and the MLP's inside in six layers
    assert kept["selective"] > kept["block"] + 5 * image  # an attention's output a layer
    assert kept["block"] > kept["every_2"] > kept["every_3"]
    # nothing but each layer's input
    assert kept["block"] - kept_by(encoder_without_layers(), "none") == pytest.approx(6 * image, rel=0.05)


def encoder_without_layers() -> ImageEncoder:
    model = encoder()
    model.blocks = torch.nn.ModuleList()
    return model


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_with_dropout_are_those_of_no_checkpointing(window):
    model = encoder(word_dropout=0.3, window_size=window, global_layers=(1,)).double()
    x, results = torch.randn(2, 3, 64, 64).double(), {}
    for policy in POLICIES:
        model.checkpoint_activations(policy)
        model.zero_grad()
        torch.manual_seed(1)
        words = torch.linspace(-1, 1, 2 * 5 * 24, dtype=torch.float64).view(2, 5, 24).requires_grad_()
        model(x, words).square().mean().backward()
        results[policy] = [words.grad] + [p.grad for p in model.parameters()]
    for policy in POLICIES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[policy], results["none"])), policy


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'every_0' is not none, block, every_K or selective"):
        encoder().checkpoint_activations("every_0")


@pytest.mark.parametrize("policy", ["none", "block"])
def test_a_frozen_encoder_has_no_graph_before_words_enter(policy):
    """The patch embedding and the first layer's image path need none; the projections still train."""
    model = encoder()
    model.requires_grad_(False)
    model.instruction.requires_grad_(True)
    model.checkpoint_activations(policy)
    seen, first = {}, model.blocks[0]
    modules = {"patch": model.patch_embed, "norm": first.norm1, "qkv": first.attn.qkv, "next": model.blocks[1].norm1}

    def note(name):
        def hook(module, inputs, out):
            seen.setdefault(name, []).append(out)

        return hook

    for name, module in modules.items():
        module.register_forward_hook(note(name))
    model(torch.randn(1, 3, 64, 64), torch.randn(1, 5, 24)).sum().backward()
    assert not seen["patch"][0].requires_grad
    assert [y.requires_grad for y in seen["norm"][:2]] == [True, False]  # of the words, of the image
    assert [y.requires_grad for y in seen["qkv"][0]] == [False, True]  # of the image, of the words
    assert seen["next"][1].requires_grad
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"instruction.projections.{i}.{k}" for i in range(6) for k in ("weight", "bias")
    }
