"""Text encoders of other kinds than BERT and CLIP: what transformers computes, or one line before anything loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import MINILM, dit_ds, tiny_config

from dit_ds.config.load import validate
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.doctor import configured
from dit_ds.doctor.check import Context, run_checks
from dit_ds.errors import UserError
from dit_ds.models.build import build_model
from dit_ds.models.text_encoder import TextEncoder, load_tokenizer, text_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
        "max_position_embeddings": 50}  # fmt: skip
# kind: its configuration, and how many tokens it reads
KINDS = {
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}, 512),
    "Electra": (SMALL | {"embedding_size": 16}, 512),
    "DebertaV2": (SMALL, 512),
    "Roberta": (SMALL | {"max_position_embeddings": 514}, 512),
    "MPNet": (SMALL | {"max_position_embeddings": 66}, 64),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "bos_token_id": 0,
              "eos_token_id": 0}, 64),
    "T5": (T5, None),
    "Bart": (BART, 50),
    "XLNet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 99}, None),
}  # fmt: skip


def make_config(kind: str, **options):
    return getattr(transformers, f"{kind}Config")(**options)


def saved(kind: str, folder: Path):
    """A random model of the kind, saved there, in evaluation mode: of an encoder and decoder, its encoder."""
    torch.manual_seed(0)
    of = getattr(transformers, {"T5": "T5EncoderModel"}.get(kind, f"{kind}Model"))
    model = of(make_config(kind, **KINDS[kind][0])).eval()
    model.save_pretrained(folder)
    return model.get_encoder() if kind in ("T5", "Bart") else model


def some_ids() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(5, 90, (3, 8), generator=g), torch.arange(8) < torch.tensor([[8], [5], [2]])


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(tmp_path, kind):
    theirs, (ids, mask) = saved(kind, tmp_path), some_ids()
    want = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    plain, cached = TextEncoder(str(tmp_path)), TextEncoder(str(tmp_path), cache=8)
    assert plain.dim == want.shape[-1]
    torch.testing.assert_close(plain(ids, mask), want)
    for _ in range(2):
        torch.testing.assert_close(cached(ids, mask), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_has_a_gradient(tmp_path, kind):
    saved(kind, tmp_path)
    encoder = TextEncoder(str(tmp_path), random_init=True, frozen=False).train()
    encoder(*some_ids()).square().sum().backward()
    trained = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) > 10 and all(p.grad is not None for _, p in trained)
    one = TextEncoder(str(tmp_path), layers=1)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_up_to_what_it_reads_and_no_more(tmp_path, kind):
    most = KINDS[kind][1]
    make_config(kind, **KINDS[kind][0]).save_pretrained(tmp_path)
    if most is None:
        text_config(str(tmp_path), None, 5000)
        return
    text_config(str(tmp_path), None, most)
    encoder = TextEncoder(str(tmp_path), random_init=True)
    ids = torch.full((1, most), 7)
    assert encoder(ids, torch.ones_like(ids, dtype=torch.bool)).shape == (1, most, encoder.dim)
    with pytest.raises(UserError, match=f"reads {most} at most"):
        text_config(str(tmp_path), None, most + 1)


REFUSED = {
    "ViT": ({"hidden_size": 32, "num_hidden_layers": 1}, "reads no token ids"),
    "Whisper": ({"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "reads no token ids"),
    "FNet": ({"hidden_size": 32, "num_hidden_layers": 1}, "reads no token ids with a mask"),
    "DPR": (SMALL, "gives no features of each token"),
    "BlipText": (SMALL, "no encoder of that kind"),
    "Sam": ({}, "reads no token ids"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gives_no_features_of_tokens_is_refused_before_it_loads(tmp_path, shards, kind, refusal):
    options, why = REFUSED[kind]
    make_config(kind, **options).save_pretrained(tmp_path / "encoder")  # and no weights
    config = tiny_config(shards, tmp_path / "run")
    config["text"] = {"name": str(tmp_path / "encoder"), "tokenizer": MINILM, "layers": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    line = refusal("train", "--config", tmp_path / "c.yaml")
    assert "can't be used" in line and why in line and not (tmp_path / "run").exists()


def test_what_is_not_all_there(tmp_path, shards):
    model = saved("DistilBert", tmp_path)
    state = {n: x for n, x in model.state_dict().items() if "layer.1.ffn" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="lacks 4 tensors of a distilbert .transformer.layer.1.ffn"):
        TextEncoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="can't be loaded"):
        TextEncoder(str(tmp_path))
    config = tiny_config(shards, tmp_path / "run")
    config["text"] = {"name": str(tmp_path), "tokenizer": MINILM}
    (check,) = run_checks([configured.text_encoder], Context(config=validate(config)), 60)
    assert check.status == "ok"  # its files are there
    config["text"]["layers"] = 3
    (check,) = run_checks([configured.text_encoder], Context(config=validate(config)), 60)
    assert check.status == "fail" and "has 2" in check.found


def test_half_precision_is_read_as_fp32(tmp_path):
    saved("Roberta", tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in TextEncoder(str(tmp_path)).parameters()} == {torch.float32}


def gpt2_tokenizer(folder: Path) -> None:
    """Without a token for padding, and set to pad on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(
        ["the left red star"], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], vocab_size=80)
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", padding_side="left")
    fast.save_pretrained(folder)


def test_a_tokenizer_without_padding(tmp_path):
    gpt2_tokenizer(tmp_path)
    ids, mask = make_tokenize(load_tokenizer(str(tmp_path)), 12)("left star")
    n = int(mask.sum())
    assert 0 < n < 12 and mask[:n].all() and ids.shape == (12,) and np.isin(ids[n:], 0).all()


def test_a_tokenizer_of_another_encoder(tmp_path, shards, refusal):
    make_config("Electra", **SMALL).save_pretrained(tmp_path / "encoder")
    config = tiny_config(shards, tmp_path / "run")
    config["text"] = {"name": str(tmp_path / "encoder"), "tokenizer": MINILM, "random_init": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    line = refusal("train", "--config", tmp_path / "c.yaml")
    assert "has 30522 tokens" in line and "knows 99" in line and "set text.tokenizer" in line


def test_a_run_with_gpt2_whose_text_trains(tmp_path, shards):
    """Training, evaluation and the model's inspection on tensors without data, from tokenizer to mask."""
    saved("GPT2", tmp_path / "encoder")
    gpt2_tokenizer(tmp_path / "encoder")
    config = tiny_config(shards, tmp_path / "run")
    config["text"] = {"name": str(tmp_path / "encoder")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", tmp_path / "c.yaml", "--train.max_steps", "2")
    assert json.loads(dit_ds("eval", tmp_path / "run", "--json").stdout)["n"] > 0
    (check,) = run_checks([configured.run_folder], Context(config=validate(config)), 60)
    assert "checkpoints of about" in check.found
    assert build_model(validate(config)).text_encoder.dim == 32
