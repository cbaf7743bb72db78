"""Each key of the configuration is read by its type, has a range if it is a number, and is found under a usual name."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dit_ds.config.load import field_names, fields, load_config, validate
from dit_ds.config.schema import RunConfig
from dit_ds.config.suggestions import _ELSEWHERE, unknown_key
from dit_ds.config.yaml_text import dump_yaml, load_yaml
from dit_ds.errors import UserError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def parts(kind: Any, constraints: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """(type, constraints) of a field, or of the elements of a list, tuple, dict or union."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [m for m in inner[1:] for m in getattr(m, "metadata", [m])]
        yield from parts(inner[0], (*constraints, *own))
    elif origin in (Union, types.UnionType):
        for one in inner:
            yield from parts(one, constraints)
    elif origin in (list, dict, tuple):  # whose own constraints are of their length
        for one in inner[1:] if origin is dict else inner:
            yield from parts(one)
    else:
        yield kind, constraints


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any, tuple]]:
    """(dotted key, type of the key, type and constraints of a value in it)."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            for kind, constraints in parts(info.annotation, tuple(info.metadata)):
                yield f"{prefix}{name}", info.annotation, kind, constraints


NUMBERS = [(key, whole, kind, limits) for key, whole, kind, limits in leaves() if kind in (int, float)]
TEXTS = [key for key, whole, kind, _ in leaves() if whole in (str, str | None) and kind is str]
TEXTS.remove("train.activation_checkpointing")  # which has a pattern


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "empty.yaml"
    path.write_text("")
    return path


def value_of(config: RunConfig, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def written(whole: Any, number: Any) -> str:
    """A value of that type with this number in it, as on the command line."""
    origin = get_origin(whole)
    if origin is dict:
        return f"{{a/b: {number}}}"
    return f"[{number}, {number}]" if origin is tuple else f"[{number}]" if origin is list else str(number)


# --- ranges


def test_the_walk_finds_numbers_of_every_kind():
    found = {key for key, *_ in NUMBERS}
    assert {"data.mixture", "data.scales", "train.betas", "train.lr", "train.max_steps", "seed"} <= found
    assert len(found) > 35 and len(TEXTS) > 10


@pytest.mark.parametrize(("key", "limits"), [pytest.param(k, limits, id=k) for k, _, _, limits in NUMBERS])
def test_every_number_has_a_range(key, limits):
    assert any(isinstance(m, (annotated_types.Ge, annotated_types.Gt)) for m in limits), f"{key} has no least value"
    assert any(isinstance(m, (annotated_types.Le, annotated_types.Lt)) for m in limits), f"{key} has no largest value"


@pytest.mark.parametrize(("key", "whole"), [pytest.param(k, whole, id=k) for k, whole, *_ in NUMBERS])
def test_what_is_no_number_in_the_range_is_one_line(key, whole, empty):
    wrong = [
        "nan",
        "inf",
        "-inf",
        ".nan",
        ".inf",
        "-1",
        "-0.5",
        "1e400",
        "9" * 400,
        "9" * 5000,
        "1e",
        "0x",
        "a",
        "[a",
    ]
    for number in wrong if get_origin(whole) else [*wrong, ""]:
        with pytest.raises(UserError) as error:
            load_config(empty, [f"--{key}", written(whole, number)])
        assert "\n" not in str(error.value) and key in str(error.value) and len(str(error.value)) < 400


@QUICK
@given(chosen=st.sampled_from(NUMBERS), number=st.one_of(st.floats(), st.integers(-3, 2**70)))
def test_a_number_is_taken_as_it_is_or_refused_in_one_line(chosen, number, empty):
    key, whole, kind, limits = chosen
    try:
        got = value_of(load_config(empty, [f"--{key}={written(whole, number)}"]), key)
    except UserError as e:
        assert "\n" not in str(e)
        return
    got = got["a/b"] if isinstance(got, dict) else got[0] if isinstance(got, (list, tuple)) else got
    assert type(got) is kind and got == kind(number) == pytest.approx(number) and math.isfinite(got)
    for m in limits:
        assert got >= getattr(m, "ge", got) and got <= getattr(m, "le", got)
        assert got > getattr(m, "gt", -math.inf) and got < getattr(m, "lt", math.inf)


# --- values are read by their key's type

TRICKY = ["/x #1", "0123", "007", "2024-01-01", "on", "no", "~", "1e-4", "[a", "{a", "a: b", "- a", "*a", "&a", "!!int 1",
          "1_000", "0x10", "1:30", "%a", "@a", "`a", "'a", '"a', "a\tb", " a ", "true", "NaN", "|", ">", "?", "<<", "é", "\u2028",
          "a\nb", "#", "None"]  # fmt: skip
ANY_TEXT = st.sampled_from(TRICKY) | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)


@QUICK
@given(key=st.sampled_from(TEXTS), text=ANY_TEXT, glued=st.booleans())
@example(key="run_dir", text="null", glued=False)
@example(key="data.root", text="/x #1", glued=False)
def test_text_is_taken_as_it_is_typed(key, text, glued, empty, tmp_path_factory):
    """Also when the run's folder keeps it, and it is read from there."""
    if text == "null" and value_of(RunConfig(), key) is None or text.startswith("--") and not glued:
        return
    try:
        config = load_config(empty, [f"--{key}={text}"] if glued else [f"--{key}", text])
    except UserError as e:  # combinations of settings
        assert key.startswith(("data.", "model.")) and "\n" not in str(e)
        return
    got = value_of(config, key)
    assert got == text and type(got) is str
    path = empty.with_name("resolved.yaml")
    config.save(path)
    assert load_config(path) == config


def test_null_is_none_where_a_key_may_be_none(empty, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {checkpoint: a.pth}\ntext: {layers: 3, tokenizer: ~}\n")
    assert load_config(path).text.tokenizer is None
    config = load_config(path, ["--model.checkpoint", "null", "--text.layers", "null"])
    assert config.model.checkpoint is None and config.text.layers is None
    with pytest.raises(UserError, match="run_dir"):
        load_config(tmp_path / "c.yaml", ["--run_dir", ""])
    path.write_text("run_dir: null\n")
    with pytest.raises(UserError, match="run_dir = None"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {lr: 1e-4}", "train.lr", 1e-4),
        ("train: {lr: '1e-4'}", "train.lr", 1e-4),
        ("seed: 0123", "seed", 123),
        ("run_dir: 007", "run_dir", "007"),
        ("run_dir: 2024-01-01", "run_dir", "2024-01-01"),
        ("run_dir: 12:30", "run_dir", "12:30"),
        ("data: {val_split: no}", "data.val_split", "no"),
        ("data: {dataset: on}", "data.dataset", "on"),
        ("text: {freeze: no}", "text.freeze", False),
        ("text: {freeze: On}", "text.freeze", True),
        ("train: {milestones: [1e1, 20]}", "train.milestones", [10.0, 20.0]),
        ("train: {betas: [9e-1, .5]}", "train.betas", (0.9, 0.5)),
        ("data: {mixture: {refcoco/unc: 5e-1}}", "data.mixture", {"refcoco/unc": 0.5}),
        ("deepspeed: {override: {zero_optimization: {reduce_bucket_size: 5e7, stage: 1}}}", "deepspeed.override",
         {"zero_optimization": {"reduce_bucket_size": 5e7, "stage": 1}}),
        ("deepspeed: {override: {wandb: {enabled: true, group: '1', project: 2024-01-01, team: no}}}", "deepspeed.override",
         {"wandb": {"enabled": True, "group": "1", "project": "2024-01-01", "team": "no"}}),
        ("a: &x {workers: 3}\ndata: {<<: *x, tokens: 7}", None, "unknown key 'a"),
    ],
)  # fmt: skip
def test_yaml_is_read_by_type(text, key, value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    if key is None:
        with pytest.raises(UserError, match=value):
            load_config(path)
        return
    assert repr(value_of(load_config(path), key)) == repr(value)
    load_config(path).save(path)
    assert repr(value_of(load_config(path), key)) == repr(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(ANY_TEXT, x, max_size=3), max_leaves=6,
)  # fmt: skip


@QUICK
@given(override=st.dictionaries(ANY_TEXT, JSON, max_size=3))
def test_a_saved_configuration_reads_back_as_it_was(override, empty):
    config = validate({"deepspeed": {"override": override}})
    path = empty.with_name("override.yaml")
    config.save(path)
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text()).keys() == config.model_dump().keys()  # any reader of YAML can read it


@QUICK
@given(text=st.text(max_size=30) | st.sampled_from(["a: &a [*a]", "&a {b: *a}", "data: &a {root: *a}", "[" * 3000, "a: 1\na: 2",
                                                    "!!python/object:os.system {}", "? [1]\n: 2", "a: b: c", "\t", "--- 1\n--- 2"]))  # fmt: skip
@example(text="deepspeed: {override: &a {x: *a}}")
@example(text="data: {workers: 1, workers: 2}")
@example(text="base: [1]")
@example(text="base: null")
@example(text="1: 2")
@example(text="null: 2")
@example(text="\ufeffseed: 3")
def test_any_text_as_a_file_is_a_configuration_or_one_line(text, empty):
    path = empty.with_name("any.yaml")
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path)
    except UserError as e:
        assert "\n" not in str(e) and str(path) in str(e), e


def test_a_key_twice_in_a_file_is_refused_and_on_the_command_line_the_last_counts(empty, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  lr: 1e-4\n  epochs: 3\n  lr: 1e-5\n")
    with pytest.raises(UserError, match="'lr' stands twice"):
        load_config(path)
    assert load_config(empty, ["--seed", "1", "--seed", "2"]).seed == 2


def test_a_section_on_the_command_line_is_laid_over_the_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 3, lr: 0.5}\n")
    train = load_config(path, ["--train", "{lr: 1e-3}"]).train
    assert (train.epochs, train.lr) == (3, 1e-3)
    with pytest.raises(UserError, match="has no value"):
        load_config(path, ["--train.compile", "--seed", "3"])


def test_loading_and_dumping_keep_texts(tmp_path):
    assert load_yaml(dump_yaml({"a": "1e-4", "b": "no", "c": 1e-4})) == {"a": "1e-4", "b": "no", "c": "0.0001"}


# --- keys


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.learning_rate", "did you mean 'train.lr'?"),
        ("learning_rate", "did you mean 'train.lr'?"),
        ("train.learing_rate", "did you mean 'train.lr'?"),
        ("lr", "did you mean 'train.lr'?"),
        ("optim.lr", "did you mean 'train.lr'?"),
        ("batch_size", "did you mean 'train.batch_size'?"),
        ("train.num_epochs", "did you mean 'train.epochs'?"),
        ("epochs", "did you mean 'train.epochs'?"),
        ("train.wd", "did you mean 'train.weight_decay'?"),
        ("weight_decay", "did you mean 'train.weight_decay'?"),
        ("train.warmup_steps", "did you mean 'train.warmup_epochs'?"),
        ("train.warmup", "did you mean 'train.warmup_epochs'?"),
        ("train.gradient_accumulation_steps", "it follows from train.batch_size"),
        ("data.num_workers", "did you mean 'data.workers'?"),
        ("data.image-size", "did you mean 'data.image_size'?"),
        ("trian", "did you mean 'train'?"),
        ("trian.lr", "did you mean 'train'?"),
        ("output_dir", "did you mean 'run_dir'?"),
        ("optim", "set train.optimizer"),
        ("train.frobnicate", "see 'dit-ds train --help'"),
        ("xyz", "see 'dit-ds train --help'"),
    ],
)
def test_an_unknown_key_names_what_was_meant(key, says, empty):
    with pytest.raises(UserError) as error:
        load_config(empty, [f"--{key}", "1"])
    assert str(error.value).startswith("unknown key '") and says in str(error.value)


def test_names_elsewhere_lead_to_keys_that_exist():
    names = set(field_names())
    for key, elsewhere in _ELSEWHERE.items():
        assert key in names or key.startswith("deepspeed.override."), key
        assert not names & set(elsewhere.split()), key


def test_a_misspelt_key_is_recognised():
    """Each key, with one letter left out: itself is meant."""
    for key, *_ in fields():
        for i in range(key.rfind(".") + 1, len(key)):
            misspelt = key[:i] + key[i + 1 :]
            if len(key) - key.rfind(".") > 4 and misspelt not in field_names():
                assert f"'{key}'" in unknown_key(misspelt, field_names()), misspelt


def test_a_dotted_key_in_a_file_is_told_how_it_is_written(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train.lr: 1\n")
    with pytest.raises(UserError, match=r"in YAML write train: \{lr: ..\}"):
        load_config(path)


def test_literals_name_the_nearest(empty):
    with pytest.raises(UserError, match="did you mean 'layer_wise'"):
        load_config(empty, ["--model.scheme", "layerwise"])
