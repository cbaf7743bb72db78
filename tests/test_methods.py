"""LAVT and ReLA: their sizes, and what must not matter; their equations are in test_methods_equations.py."""

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
from dit_ds.engine import engine, optimizers
from dit_ds.engine.batchnorm import SyncedBatchNormStats
from dit_ds.engine.deepspeed_json import deepspeed_config
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import original_probabilities
from dit_ds.models.lavt import LAVT
from dit_ds.models.rela import ReLA
from dit_ds.models.swin import TextSwin
from dit_ds.models.swin_sizes import SIZES
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
    spared = optimizers.no_decay(model)
    assert {"backbone.norms.3.bias", "decoder.steps.0.1.weight", "backbone.embeddings.norm.weight"} <= spared
    assert "backbone.stages.2.blocks.1.attention.relative_position_bias.relative_position_bias_table" in spared
    assert not any(".mlp." in n or "pwams" in n or "embeddings.word" in n for n in spared)
    groups = optimizers.parameter_groups(model, config)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and len(groups[1]["params"]) == len(spared)
    assert len(optimizers.parameter_groups(model, config.model_copy(update={"weight_decay_norms": True}))) == 1


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
