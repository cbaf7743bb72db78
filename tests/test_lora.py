"""LoRA: what plain matrices and `peft` compute, from the base's logits on; adapters, merged weights, refusals."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import yaml
from conftest import MINILM, dit_ds, on_ranks, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from dit_ds.checkpointing.weights import load_model
from dit_ds.config.load import validate
from dit_ds.config.lora import LoraConfig
from dit_ds.errors import UserError
from dit_ds.models.build import build_model
from dit_ds.models.lora import LoRA, merge_lora, updated_layers

ALL = ["qkv", "proj", "mlp", "text"]


def config_of(lora: dict | None = None, text: dict | None = None, data: dict | None = None, **model):
    return validate(
        {
            "model": {"size": "vit_t", "lora": lora} | model,
            "data": {"image_size": 64} | (data or {}),
            "text": {"name": MINILM, "layers": 1, "freeze": True} | (text or {}),
        }
    )


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (2, 3, 64, 64), generator=g, dtype=torch.uint8),
        "size": torch.tensor([[64, 64], [48, 64]]),
        "tokens": torch.randint(1000, 3000, (2, 20), generator=g),
        "token_mask": torch.arange(20) < torch.tensor([[6], [12]]),
    }


def stir(model: torch.nn.Module) -> None:
    """B is zero at first, and A then has no gradient."""
    torch.manual_seed(1)
    for _, lora in updated_layers(model):
        torch.nn.init.normal_(lora.B, std=0.3)


FORMS = {
    "layer_wise": {},
    "end_to_end": {"scheme": "end_to_end"},
    "windows": {"window_size": 2},
    "naive": {"attention": "naive"},
    "released": {"scheme": "cross_attention", "scheme_form": "released"},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_are_those_of_whole_matrices(form):
    """A model without LoRA whose weights are W + alpha / rank * B A, differentiated through them; in fp64."""
    model = build_model(config_of({"rank": 4, "alpha": 6.0, "targets": ALL}, **FORMS[form])).double().eval()
    plain = build_model(config_of(None, {"freeze": False}, freeze_image_encoder=True, **FORMS[form])).double().eval()
    assert torch.equal(model(**batch()), plain(**batch()))  # B is zero: the first logits are the base's
    stir(model)
    names = {n for n, m in model.named_modules() if isinstance(m, LoRA)}
    assert len(names) == 4 * 4 + 4  # layers of the ViT; query, key, value and output of the one of BERT
    leaves = {n: [x.detach().clone().requires_grad_() for x in (model.get_submodule(n).A, model.get_submodule(n).B)]
              for n in names}  # fmt: skip
    own = plain.state_dict(keep_vars=True)
    keys = {n: n.removesuffix("lora") + "weight" for n in names}
    changed = {keys[n]: own[keys[n]].detach() + 1.5 * b @ a for n, (a, b) in leaves.items()}
    got, want = model(**batch()), functional_call(plain, changed, kwargs=batch())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert (got - plain(**batch())).abs().max() > 0.1
    for logits in (got, want):
        logits.square().mean().backward()
    for n, (a, b) in leaves.items():
        lora = model.get_submodule(n)
        torch.testing.assert_close(lora.A.grad, a.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(lora.B.grad, b.grad, rtol=1e-8, atol=1e-12)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}  # none waits for one in vain
    rest = {n for n, p in plain.named_parameters() if p.requires_grad and not n.startswith("text_encoder.")}
    assert trained == rest | {f"{n}.{x}" for n in names for x in "AB"}


def _our_name(n: str) -> str:
    return n.replace("lora_A.default.weight", "lora.A").replace("lora_B.default.weight", "lora.B")


def test_what_peft_computes_on_a_plain_vit():
    """segment-anything's own image encoder under `peft`: outputs, gradients, and weights after steps of AdamW."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from segment_anything.modeling import ImageEncoderViT

    model = build_model(config_of({"rank": 4, "alpha": 6.0, "targets": ALL[:3]}, scheme="default"))
    ours = model.image_encoder.double()
    stir(ours)
    plain = ImageEncoderViT(64, 16, 3, 128, 4, 4, 4.0, 64, True, functools.partial(torch.nn.LayerNorm, eps=1e-6),
                            use_rel_pos=True, global_attn_indexes=(0, 1, 2, 3)).double()  # fmt: skip
    plain.load_state_dict({n: x for n, x in ours.state_dict().items() if ".lora." not in n})
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])")
    theirs = peft.inject_adapter_in_model(options, plain).double()
    pairs = {}
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            pairs[n] = ours.get_parameter(_our_name(n))
            p.data.copy_(pairs[n].data)
    assert len(pairs) == 2 * 4 * 4
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    for _ in range(3):
        outs = [m(x) for m in (ours, theirs)]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-8)  # Adam divides gradients that are 0 but for rounding
        for optimizer, out in zip(optimizers, outs):
            optimizer.zero_grad()
            out.square().mean().backward()
        for n, p in pairs.items():
            torch.testing.assert_close(p.grad, theirs.get_parameter(n).grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()


def test_what_peft_computes_in_bert():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = build_model(config_of({"rank": 4, "targets": ["text"]}, {"layers": 2})).double().eval()
    stir(model)
    bert = build_model(config_of(text={"layers": 2})).double().eval().text_encoder.bert
    options = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=r".*attention\.(self\.(query|key|value)|output\.dense)"
    )
    theirs = peft.inject_adapter_in_model(options, bert).double().eval()
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            p.data.copy_(model.text_encoder.bert.get_parameter(_our_name(n)).data)
    tokens, mask = batch()["tokens"], batch()["token_mask"]
    want = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    torch.testing.assert_close(model.text_encoder(tokens, mask), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", ["block", "every_3", "selective"])
def test_dropout_draws_the_same_when_it_is_recomputed(policy):
    model = build_model(config_of({"rank": 4, "dropout": 0.3, "targets": ALL[:3]})).double().train()
    stir(model)
    gradients = []
    for p in ("none", policy):
        model.checkpoint_activations(p)
        model.zero_grad()
        torch.manual_seed(2)
        out = model(**batch())
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert (model.eval()(**batch()) - out).abs().max() > 1e-3


def test_the_second_mlp_layer_keeps_its_input_once():
    """gelu(x), four times as wide as the tokens, is recomputed for the update, too."""
    from dit_ds.planning.memory.live_tensors import LiveTensors

    kept = {}
    for targets in (["qkv"], ["qkv", "mlp"]):
        model = build_model(config_of({"targets": targets}, data={"image_size": 256}))
        x = torch.randn(1, 3, 256, 256)
        with LiveTensors() as live:
            out = model.image_encoder(x, torch.randn(1, 4, model.text_encoder.dim))
            kept[len(targets)] = live.now
        out.sum().backward()
    wide = 4 * 256 * 4 * 128 * 4  # bytes of a hidden layer in four layers
    assert kept[2] - kept[1] < 0.5 * wide  # lin1's input is, too


# --- under DeepSpeed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_is_plain_adamw_on_one_process():
    lora = {"model": {"lora": {"rank": 4, "targets": ALL[:3]}}}
    settings = {
        "dropout": False,
        "plain": True,
        "weight_decay": 0.1,
        "ema_decay": 0.5,
        "policy": "block",
        "eps": 1e-6,
    } | lora
    stages = (0, 1, 2, 3, "3_offload")
    for stage, got in zip(stages, on_ranks(2, *({"stage": s} | settings for s in stages))):
        assert got["loss_error"] <= 1e-5 and got["weight_error"] <= 1e-4 and got["back"], stage
        assert got["ema_error"] <= 1e-4 < got["ema_matters"], stage


@pytest.mark.slow
def test_the_same_bits_recomputed_and_compiled():
    """With updates in the text encoder, and dropout of all kinds; compiled without, as its draws are others."""
    lora = {"model": {"lora": {"rank": 4, "dropout": 0.2, "targets": ALL}}}
    plain, block = on_ranks(2, *({"stage": 3, "policy": p} | lora for p in ("none", "block")))
    assert plain["losses"] == block["losses"] and plain["weights"] == block["weights"]
    lora = {"model": {"lora": {"rank": 4, "targets": ALL[:3]}}, "stage": 2, "dropout": False}
    plain, compiled = on_ranks(2, lora, lora | {"compile": True})
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)


@pytest.mark.slow
def test_memory_plan_counts_what_trains(config_file):
    """The model that is trained is the one that is profiled."""
    plans = [
        dit_ds("memory", "plan", "--config", config_file, *lora, "--json") for lora in ([], ["--model.lora.rank", 4])
    ]
    assert all("predict: 0 micro-batches" in p.stderr for p in plans)
    plain, updated = (json.loads(p.stdout) for p in plans)
    model = build_model(config_of({"rank": 4}))
    assert updated["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert updated["categories"]["optimizer"] < 0.8 * plain["categories"]["optimizer"]


# --- a run, its checkpoints and what is exported --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run from a SAM, with LoRA: stopped, resumed, and one that was not."""
    folder = tmp_path_factory.mktemp("lora")
    sam = build_model(config_of(scheme="default")).state_dict()
    save_file(
        {n: x for n, x in sam.items() if n.startswith(("image_", "prompt_", "mask_"))}, folder / "sam.safetensors"
    )
    values = tiny_config(shards, folder / "run")
    values["model"] |= {"checkpoint": str(folder / "sam.safetensors"), "lora": {"rank": 4, "targets": ["qkv", "proj"]}}
    values["train"] |= {"max_steps": 4}
    values["eval"] = {"every_epochs": 0}
    (folder / "lora.yaml").write_text(yaml.safe_dump(values))
    command = ["train", "--config", folder / "lora.yaml"]
    done = dit_ds(*command, "--train.max_steps", 2, ranks=2)
    assert "image_encoder.lora" in done.stderr
    dit_ds(*command, "--resume", ranks=2)
    dit_ds(*command, "--run_dir", folder / "whole", ranks=2)
    return folder


def test_a_run_resumes_to_the_same_bits_and_its_checkpoints_hold_adapters_alone(trained):
    a, b = (load_model(trained / name).model.state_dict() for name in ("run", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    model = load_model(trained / "run").model
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = sum(f.stat().st_size for f in trained.glob("run/checkpoints/step_00000004/rank_*"))
    assert 12 * numbers <= sizes < 12 * numbers + 100_000  # masters and Adam's two moments
    assert not any(n.startswith("image_encoder.blocks.") and ".lora." not in n for n, p in model.named_parameters()
                   if p.requires_grad)  # fmt: skip


def logits(path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path).model(**batch())


def test_an_adapter_is_what_was_trained_and_needs_its_base(trained, refusal, tmp_path):
    out, want = trained / "adapter.safetensors", logits(trained / "run")
    said = json.loads(dit_ds("export", trained / "run", "--adapter", "--out", out, "--json").stdout)
    names = load_file(out).keys()
    assert {n.partition(".")[0] for n in names} == {
        "image_encoder",
        "mask_decoder",
        "prompt_encoder",
        "text_projection",
    }
    assert all(".lora." in n or ".instruction." in n for n in names if n.startswith("image_encoder"))
    assert said["base"] == str(trained / "sam.safetensors") and out.stat().st_size == said["bytes"]
    assert torch.equal(logits(out), want)
    half = tmp_path / "half.safetensors"
    dit_ds("export", out, "--adapter", "--dtype", "bf16", "--out", half)  # of an adapter, too
    assert half.stat().st_size < 0.6 * said["bytes"] and (logits(half) - want).abs().max() < 0.2
    # another base, or none
    state = load_file(trained / "sam.safetensors")
    save_file(
        state | {"image_encoder.neck.0.weight": state["image_encoder.neck.0.weight"] + 1e-3},
        tmp_path / "other.safetensors",
    )
    again = ("export", out, "--merge", "--out", tmp_path / "merged.safetensors", "--base")
    assert "not the ones it was trained with" in refusal(*again, tmp_path / "other.safetensors")
    assert "no file " in refusal(*again, tmp_path / "none.safetensors")
    assert "leave out --base" in refusal("export", trained / "run", "--out", tmp_path / "x", "--base", half)
    dit_ds(*again, trained / "sam.safetensors")
    torch.testing.assert_close(logits(tmp_path / "merged.safetensors"), want, rtol=0, atol=1e-5)
    # it is no SAM to start from
    assert "dit-ds export --merge" in refusal("train", "--config", trained / "lora.yaml", "--model.lora", "null",
                                              "--run_dir", tmp_path / "r", "--model.checkpoint", out)  # fmt: skip


def test_merged_weights_give_the_same_logits_without_lora(trained, refusal):
    out = trained / "merged.safetensors"
    dit_ds("export", trained / "run", "--merge", "--out", out)
    torch.testing.assert_close(logits(out), logits(trained / "run"), rtol=0, atol=1e-5)
    with safe_open(out, "pt") as f:
        config = json.loads(f.metadata()["dit_ds"])["config"]
    assert config["model"]["lora"] is None and config["model"]["freeze_image_encoder"]
    assert not any("lora" in n for n in load_file(out))
    assert "has no model.lora to merge" in refusal("export", out, "--merge", "--out", trained / "x.safetensors")


def test_a_whole_export_starts_another_run(trained):
    out = trained / "whole.safetensors"
    dit_ds("export", trained / "run", "--out", out)
    values = yaml.safe_load((trained / "lora.yaml").read_text())
    report = build_model(validate(values)).load_pretrained(out)
    assert not report["missing"] and not report["unexpected"]
    with pytest.raises(UserError, match="set model.lora.rank to match"):
        values["model"]["lora"]["rank"] = 8
        build_model(validate(values)).load_pretrained(out)


def test_end_to_ends_adapters_stay_when_it_is_merged():
    """They are where the ViT's own weights are frozen."""
    config = config_of({"rank": 4}, scheme="end_to_end")
    model = build_model(config).eval()
    stir(model)
    want = model(**batch())
    assert merge_lora(model) == 8
    torch.testing.assert_close(model(**batch()), want, rtol=0, atol=1e-5)
    merged = build_model(config_of(scheme="end_to_end", freeze_image_encoder=True))
    assert merged.load_state_dict(model.state_dict()).missing_keys == []


@pytest.mark.timeout(120)
def test_sizes_of_vit_h_at_rank_16():
    """The paper's BERT frozen. On tensors without data: bytes by what trains."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dit_ds.models.text_encoder import offline_text

    config = validate({"model": {"size": "vit_h", "lora": {"rank": 16}}, "text": {"freeze": True}})
    with offline_text(config), FakeTensorMode():
        model = build_model(config, text_weights=False)
    trained = {n: 4 * p.numel() for n, p in model.named_parameters() if p.requires_grad}
    lora = sum(size for n, size in trained.items() if ".lora." in n)
    assert lora == 4 * 32 * 16 * (1280 + 3 * 1280 + 1280 + 1280) <= 55e6
    assert sum(trained.values()) <= 210e6


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, says",
    [
        ("--model.name lavt --model.size swin_t_tiny --model.lora.rank 4", "lavt knows no model.lora"),
        ("--model.name rela --model.size swin_t_tiny --model.lora.rank 4", "rela knows no model.lora"),
        ("--model.lora.rank 0", "model.lora.rank = 0"),
        ("--model.lora.rank 2000", "model.lora.rank = 2000"),
        ("--model.lora.rank 200", "128 wide: set 128 or less"),
        ("--model.lora.rnk 2", "did you mean 'model.lora.rank'"),
        ("--model.lora.dropout 1", "model.lora.dropout = 1"),
        ("--model.lora.targets []", "model.lora.targets"),
        ("--model.lora.targets [q]", "model.lora.targets"),
        ("--model.lora.targets [qkv,qkv]", "names one twice"),
        ("--model.lora.targets [text] --text.cache 9", "set text.cache 0"),
        ("--model.lora.targets [text] --data.prompts [box]", "add text to data.prompts"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(config_file, refusal, overrides, says):
    assert says in refusal("train", "--config", config_file, *overrides.split())


def test_a_text_encoder_without_linear_attention_is_refused(tmp_path):
    """GPT-2's projections are no linear layers."""
    import transformers

    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT2Model has no linear layers of attention"):
        build_model(config_of({"targets": ["text"]}, {"name": str(tmp_path), "random_init": True, "layers": None}))


def test_clips_attention_is_updated(tiny_clip):
    model = build_model(config_of({"rank": 4, "targets": ["text"]}, {"name": str(tiny_clip), "layers": 2}))
    inputs = batch()
    model(**inputs | {"tokens": inputs["tokens"] % 80}).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    of_text = [n for n in trained if n.startswith("text_encoder.")]
    assert len(of_text) == 2 * 2 * 4 and all(".lora." in n for n in of_text)


def test_lora_alone_trains_where_all_else_is_frozen():
    config = config_of({"rank": 4}, freeze_projections=True, freeze_mask_decoder=True, scheme="default")
    names = {n for n, p in build_model(config).named_parameters() if p.requires_grad}
    assert names and all(".lora." in n or n.startswith("text_projection") for n in names)


def test_the_section_is_read_as_any_other(config_file):
    from dit_ds.config.load import load_config

    read = load_config(config_file, ["--model.lora", "{rank: 8, targets: [mlp]}", "--model.lora.alpha", "4"]).model.lora
    assert read == LoraConfig(rank=8, alpha=4.0, targets=["mlp"])
    assert load_config(config_file, ["--model.lora.rank", "8", "--model.lora", "null"]).model.lora is None
    config_file.write_text(config_file.read_text().replace("model:\n", "model:\n  lora: null\n"))
    assert load_config(config_file, ["--model.lora.rank", "8"]).model.lora.rank == 8
