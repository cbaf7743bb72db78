"""Words: a set, a sample and what people type are read alike, and what a model can't read of them is counted and said."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import MINILM, dit_ds
from hypothesis import given
from hypothesis import strategies as st
from refer_files import image, own_set

from dit_ds.cli.entry import main
from dit_ds.config.schema import RunConfig
from dit_ds.data.annotations.refer import clean_sentence
from dit_ds.data.expressions import normalise_expression
from dit_ds.data.input_check import InputCheck
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.tokenize import make_token_check, make_tokenize
from dit_ds.data.masks import UnusableRecord
from dit_ds.data.picture import read_picture
from dit_ds.errors import UserError
from dit_ds.evaluation.inference import expression_warnings, picture_inputs, read_expression
from dit_ds.models.text_encoder import load_tokenizer

TYPED = {
    "The LEFT cup!": "the left cup",
    "  man’s “red” hat,\n(the big one) ": "man s red hat the big one",
    "upper-left e\u0301clair": "upper-left \u00e9clair",
    "zero\u200bwidth soft\u00adhyphen": "zerowidth softhyphen",
    "собака слева.": "собака слева",
    "左边的狗。": "左边的狗",
    "बाएँ कुत्ता": "बाएँ कुत्ता",
}


@pytest.mark.parametrize("text", TYPED)
def test_typed_words_become_a_sets(text):
    assert normalise_expression(text) == TYPED[text]


@given(st.text())
def test_what_is_typed_is_what_a_set_holds(text):
    """An own set's text, REFER's `sent` and `raw`, and predict's --text: one form, which stays as it is."""
    plain = normalise_expression(text)
    assert normalise_expression(plain) == plain and plain == " ".join(plain.split())
    sources = [{"sent_id": 1, "sent": "", "raw": text}, {"sent_id": 1, "sent": text, "raw": ""}]
    if plain:
        assert read_expression(text) == plain and all(clean_sentence(s) == plain for s in sources)
        return
    with pytest.raises(UserError, match="--text"):
        read_expression(text)
    for source in sources:
        with pytest.raises(UnusableRecord):
            clean_sentence(source)


def configuration(**data) -> RunConfig:
    return RunConfig.model_validate({"data": {"image_size": 64} | data, "text": {"name": MINILM}})


@pytest.mark.parametrize("former", [False, True])
def test_a_sample_has_the_tokens_of_a_prediction(tmp_path, monkeypatch, former):
    """Also where shards hold what an earlier version left as it was."""
    folder, config, parse = own_set(tmp_path, list(TYPED)), configuration(), SplitIndex.parse

    def former_parse(self, image, data):
        meta = parse(self, image, data)
        for sentence, text in zip(meta["refs"][0]["sentences"], TYPED):
            sentence["sent"] = text.strip()
        return meta

    if former:
        monkeypatch.setattr(SplitIndex, "parse", former_parse)
        assert InputCheck(config).losses(folder, "train", 1).counts["expressions_rewritten"] == 6
    tokenize = make_tokenize(load_tokenizer(MINILM), 20)
    dataset = ExpressionDataset(SplitIndex.load(folder, "train"), "sentence", 64, tokenize)
    pixels = read_picture(str(tmp_path / "images" / image(1)["file_name"]))
    for i, text in enumerate(TYPED):
        sample = dataset[(0, i, 1.0)]
        assert sample["text"] == TYPED[text]
        assert sample["tokens"].tolist() == picture_inputs(config, pixels, text=text)["tokens"][0].tolist(), text


def test_token_checks_are_what_the_tokenizer_cuts():
    tokenizer = load_tokenizer(MINILM)
    for length in (3, 8, 20):
        check = make_token_check(tokenizer, length)
        for text in ("man", "the left woman " * 5, "红 red", "", "a " * (length - 2), "a " * (length - 1)):
            whole = tokenizer(text)["input_ids"]
            found = check(text)
            assert found.cut == (len(whole) > length) and found.room == length - 2
            assert found.ids == whole[1:-1] and found.unknown == whole.count(tokenizer.unk_token_id)


def test_losses_are_counted_and_named(tmp_path, capsys):
    texts = ["left dog", "Dog!", "the " + "very " * 20 + "big dog", "😀 красная собака", "红 色 的 red", "a红 b红"]
    folder = own_set(tmp_path, texts)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"text": {"name": MINILM}, "data": {"tokens": 12}}))
    losses = InputCheck(configuration(tokens=12)).losses(folder, "train", 1)
    tokenizer = load_tokenizer(MINILM)
    ids = [tokenizer.tokenize(normalise_expression(t)) for t in texts]
    unknown = [t for t, x in zip(texts, ids) if 2 * x.count("[UNK]") >= len(x)]
    assert losses.counts["expressions_cut"] == sum(len(x) > 10 for x in ids) > 0
    assert losses.counts["expressions_unknown"] == len(unknown) > 0
    assert losses.counts["expressions_rewritten"] == 0  # `data shard` normalised them

    arguments = [str(folder), "--config", str(tmp_path / "c.yaml"), "--processes", "1"]
    assert main(["data", "stats", *arguments, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["as_read"]
    assert stats["counts"] == dict(losses.counts) and stats["settings"]["tokens"] == 12 and stats["note"] is None
    assert main(["data", "verify", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["train"]["expressions_cut"] == losses.counts["expressions_cut"]
    assert any("longer than data.tokens 12" in w and "very very" in w for w in found["warnings"])
    assert any("mostly [UNK]" in w for w in found["warnings"])
    assert main(["data", "verify", *arguments, "--data.tokens", "40"]) == 0  # as the configuration, overridden
    assert "longer than" not in capsys.readouterr().out


def test_without_a_tokenizer_it_is_said_what_is_not_counted(folder, capsys, refusal):
    assert main(["data", "verify", str(folder), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "note: how many expressions are cut" in out or "bert-base-uncased" not in out  # it may be in the cache
    assert "overrides a configuration" in refusal("data", "stats", folder, "--data.tokens", "8")
    assert "cannot read the configuration" in refusal("data", "verify", folder, "--config", "none.yaml")


def test_warnings_of_a_prediction_say_what_is_not_read():
    config = configuration(tokens=6)
    assert expression_warnings(config, "the left red dog") == []
    (line,) = expression_warnings(config, "the left red dog behind the fence")
    assert "data.tokens" in line and line.endswith("'behind the fence'")
    (line,) = expression_warnings(config, "红 色 dog")
    assert "[UNK]" in line and "2 of 3" in line


def test_predict_and_attention_warn_and_normalise(shards, refer_tree, config_file, tmp_path):
    run = ["train", "--config", config_file, "--train.max_steps", "1", "--data.tokens", "6", "--eval.every_epochs", "0"]
    dit_ds(*run)
    picture = sorted((refer_tree / "images/train2014").iterdir())[0]

    def said(command, text):
        arguments = [
            command,
            tmp_path / "run",
            "--image",
            picture,
            "--text",
            text,
            "--out",
            tmp_path / "p.png",
            "--json",
        ]
        done = dit_ds(*arguments)
        return json.loads(done.stdout), done.stderr

    short, plain = (said("predict", t)[0] for t in ("The left, red “star”!", "the left red star"))
    assert short["covered"] == plain["covered"] and short["warnings"] == plain["warnings"] == []
    for command in ("predict", "attention"):
        result, stderr = said(command, "the left red star above the dark box")
        (line,) = result["warnings"]
        assert f"warning: {line}" in stderr.splitlines() and "'above the dark box'" in line
