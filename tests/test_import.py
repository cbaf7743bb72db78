"""Authors' checkpoints become ours, exactly: every tensor is used or named, and the logits are the authors'."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
from pathlib import Path

import authors_networks as authors
import authors_swin
import pytest
import torch
import yaml
from conftest import ROOT

from dit_ds.checkpointing.import_weights import SETTINGS, import_weights
from dit_ds.checkpointing.weights import load_model
from dit_ds.cli.entry import main
from dit_ds.errors import UserError
from dit_ds.models.checkpoint_file import read_tensors
from dit_ds.models.segmenter import Prediction

SIDE = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Makes folders with the architecture of a text encoder, by its width."""
    root = tmp_path_factory.mktemp("bert")

    def folder(dim: int) -> str:
        authors.bert(dim, authors.LAYERS).config.save_pretrained(root / str(dim))
        return str(root / str(dim))

    return folder


def inputs(side: int = SIDE):
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, 3, side, side), generator=g, dtype=torch.uint8)
    tokens = torch.randint(0, authors.WORDS, (2, authors.TOKENS), generator=g)
    mask = torch.arange(authors.TOKENS) < torch.tensor([[9], [20]])
    mean, std = (
        torch.tensor(x, dtype=torch.double)[:, None, None] for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    return image, tokens, mask, (image.double() - mean) / std


def ours(file: Path, side: int = SIDE):
    """What the imported model computes in fp64."""
    image, tokens, mask, _ = inputs(side)
    model, config, _ = load_model(file, {"data": {"image_size": side, "scales": []}})
    size = torch.full((2, 2), side)
    with torch.no_grad():
        if config.model.name == "rela":
            return model.double()(image, size, tokens, mask, apart=True)
        return model.double()(image, size, tokens, mask)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1), (got, want)


def wrapped(state, prefix: str = "") -> dict:
    args = argparse.Namespace(lr=1e-4, output=Path("/x"))
    return {"epoch": 3, "state_dict": {f"{prefix}{n}": x for n, x in state.items()}, "args": args,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}, "lr": 0.1}  # fmt: skip


DIT = [("default", 2, False), ("default", 4, False), ("default", 6, False), ("layer_wise", 2, False),
       ("end_to_end", 2, False), ("layer_wise", 2, True), ("end_to_end", 2, True), ("cross_attention", 2, False),
       ("cross_attention_ffn", 2, False)]  # fmt: skip


def check_dit(tmp_path, text, size: str, scheme: str, layers: int, static: bool, text_dim: int | None = None) -> None:
    state = authors.draw(authors.dit_shapes(size, scheme, layers, static, text_dim))
    file, out = tmp_path / "best.pth", tmp_path / "ours.safetensors"
    torch.save(wrapped(state, "module."), file)
    ambiguous = scheme in ("end_to_end", "layer_wise") and not static
    result = import_weights(
        file, out, scheme=scheme if ambiguous else None, text=text(text_dim or authors.SIZES[size][0])
    )
    assert (result["source"], result["scheme"], result["size"]) == ("dit", scheme, size)
    assert result["used"] + sum(result["left_out"].values()) == len(state) + 1  # an optimizer's moment
    _, tokens, mask, image = inputs()
    close(ours(out), authors.dit(state, size, scheme, image, tokens, mask))


@pytest.mark.parametrize(("scheme", "layers", "static"), DIT)
def test_dit(tmp_path, text, scheme, layers, static):
    check_dit(tmp_path, text, "vit_t", scheme, layers, static)


@pytest.mark.parametrize(("scheme", "static"), [("layer_wise", False), ("end_to_end", False), ("layer_wise", True)])
def test_text_that_is_not_as_wide_as_the_vit_has_a_projection_before_all_layers_which_is_merged(
    tmp_path, text, scheme, static
):
    check_dit(tmp_path, text, "vit_t", scheme, 2, static, text_dim=64)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("scheme", "layers", "static"), DIT)
def test_dit_at_full_size(tmp_path, text, scheme, layers, static):
    check_dit(tmp_path, text, "vit_b", scheme, layers, static)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dit_with_vit_h(tmp_path, text):
    check_dit(tmp_path, text, "vit_h", "layer_wise", 2, False, text_dim=768)


def method_state(method: str, size: str, text_dim: int) -> dict[str, torch.Tensor]:
    shapes = {"lavt": authors_swin.lavt_shapes, "rela": authors_swin.rela_shapes}[method](size, text_dim)
    return authors.draw(shapes | authors.bert_shapes("text_encoder.", text_dim, pooler=False))


def of_lavt(state) -> dict:
    """BERT is saved beside the network."""
    both = {"model": {}, "bert_model": {}}
    for name, x in state.items():
        part = "bert_model" if name.startswith("text_encoder.") else "model"
        both[part][name.removeprefix("text_encoder.")] = x
    return both | {"args": argparse.Namespace(x=1), "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 39}


def of_detectron2(state) -> dict:
    return {"model": {n: x.numpy() for n, x in state.items()}, "__author__": "x", "matching_heuristics": False}


FORMS = {"lavt": of_lavt, "lavt one": lambda s: {"model": s}, "rela": lambda s: {"model": s, "iteration": 5},
         "rela pkl": of_detectron2}  # fmt: skip


def check_method(tmp_path, text, form: str, size: str, text_dim: int, side: int) -> None:
    method = form.split()[0]
    state = method_state(method, size, text_dim)
    file, out = tmp_path / ("m.pkl" if "pkl" in form else "m.pth"), tmp_path / "ours.safetensors"
    content = FORMS[form](state)
    file.write_bytes(pickle.dumps(content)) if "pkl" in form else torch.save(content, file)
    result = import_weights(file, out, method, text=text(text_dim))
    assert (result["method"], result["size"]) == (method, size)
    buffers = sum("position_index" in n for n in state)
    assert result["left_out"].get("a constant that is computed anew") == buffers
    assert result["used"] == len(state) - buffers
    _, tokens, mask, image = inputs(side)
    got, want = ours(out, side), getattr(authors_swin, method)(state, size, image, tokens, mask)
    if isinstance(got, Prediction):
        assert got.no_target.tolist() == want[1].tolist()
        got, want = got.logits, want[0]
    close(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_lavt_and_rela(tmp_path, text, form):
    check_method(tmp_path, text, form, "swin_t_tiny", 64, 64)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", ["lavt", "rela"])
def test_lavt_and_rela_at_full_size(tmp_path, text, form):
    check_method(tmp_path, text, form, "swin_b", 768, 96)


# --- what comes with it, and what is refused


def saved(tmp_path, scheme="layer_wise", **changes) -> Path:
    state = authors.draw(authors.dit_shapes("vit_t", scheme)) | changes
    torch.save({"state_dict": {n: x for n, x in state.items() if x is not None}}, tmp_path / "dit.pth")
    return tmp_path / "dit.pth"


def test_the_configuration_beside_it_and_the_file_itself_start_a_training(tmp_path, text, capsys):
    """The authors' file is what `model.checkpoint` takes, too, for a model of its network."""
    file, out, name = saved(tmp_path), tmp_path / "ours.safetensors", text(128)
    command = ["import", file, "--from", "dit", "--scheme", "layer_wise", "--text", name, "--out", out, "--json"]
    assert main(list(map(str, command))) == 0
    assert json.loads(capsys.readouterr().out)["config"] == str(out.with_suffix(".yaml"))
    values = yaml.safe_load(out.with_suffix(".yaml").read_text())
    released = yaml.safe_load((ROOT / "configs/paper/released_code.yaml").read_text())
    for section in ("data", "eval", "train", "text", "deepspeed"):
        assert released[section].items() <= values[section].items()
    assert values["model"]["checkpoint"] == str(out)
    imported = load_model(out).model.state_dict()
    for checkpoint in (str(file), str(out)):
        values["model"]["checkpoint"], values["text"]["random_init"] = checkpoint, True
        out.with_suffix(".yaml").write_text(yaml.safe_dump(values))
        state = load_model(out.with_suffix(".yaml")).model.state_dict()
        assert all(torch.equal(state[n], x) for n, x in imported.items())


def test_the_settings_are_those_of_the_papers_configurations():
    for source, name in (("dit", "released_code"), ("lavt", "table8_lavt"), ("rela", "table8_rela")):
        written = yaml.safe_load((ROOT / f"configs/paper/{name}.yaml").read_text())
        for section, values in SETTINGS[source].items():
            kept = {k: v for k, v in written[section].items() if k not in ("name", "size", "checkpoint", "override")}
            assert {k: float(v) if isinstance(v, str) and v[0].isdigit() else v for k, v in kept.items()} == values


def test_a_sam_keeps_its_tensors(tmp_path, text, capsys):
    vit, prompts, decoder = authors.sam(128, 4, 4, 64, 2, 256, (1, 3))
    parts = (("image_encoder", vit), ("prompt_encoder", prompts), ("mask_decoder", decoder))
    state = {f"{p}.{n}": x for p, part in parts for n, x in part.state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    text_folder = Path(text(128))
    authors.bert(128, authors.LAYERS).save_pretrained(text_folder)
    out = tmp_path / "ours.safetensors"
    result = import_weights(tmp_path / "sam.pth", out, "sam", text=str(text_folder))
    assert (result["source"], result["size"], result["used"]) == ("sam", "vit_t", len(state))
    back = read_tensors(out)
    assert result["fresh"] == len(back) - len(state)
    assert all(torch.equal(back[n], x) for n, x in state.items())
    config = load_model(out).config
    assert (config.data.prompts, config.model.scheme) == (["point", "box"], "default")  # words it has yet to learn
    for source, says in (
        ("transformers", "is of a SAM by its own names, not of a SamModel"),
        ("rela", "no checkpoint of"),
    ):
        with pytest.raises(UserError, match=says):
            import_weights(tmp_path / "sam.pth", tmp_path / "other.safetensors", source, text=str(text_folder))
    with pytest.raises(UserError, match="what dit-ds export wrote"):
        import_weights(out, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"source": "lavt"}, "is of DIT's released code, not of LAVT: give --from dit, or auto"),
        ({}, {"scheme": None}, "may be E-DIT or L-DIT, whose tensors have the same names"),
        ({"visual_encoder.neck.0.weight": None}, {}, "lacks 1 of the model's"),
        ({"visual_encoder.extra": torch.ones(2)}, {}, "1 tensors that DIT's released code does not have (visual_encoder.extra)"),
        ({"visual_encoder.blocks.4.norm1.weight": torch.ones(128)}, {}, "128 wide with 5 layers, which none of SAM's sizes is"),
        ({"text_proj.weight": torch.ones(32, 128)}, {}, "have another shape (text_projection.weight is (32, 128)"),
        ({"lang_encoder.bert.embeddings.word_embeddings.weight": torch.ones(7, 128)}, {}, "name the text encoder"),
    ],
)  # fmt: skip
def test_what_is_not_the_network_is_refused_in_a_line(tmp_path, text, change, options, says):
    out = tmp_path / "out.safetensors"
    asked = {"scheme": "layer_wise", "text": text(128)} | options
    with pytest.raises(UserError) as refused:
        import_weights(saved(tmp_path, **change), out, **asked)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not out.exists() and not out.with_suffix(".yaml").exists()


def test_arrays_of_numpy_in_a_pickle_are_data_and_code_is_not_run(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 3), "f2")), "c": np.array(5),
              "d": np.arange(3, dtype=">i4"), "e": np.array([True, False]), "f": np.zeros((0, 4), "u2")}  # fmt: skip
    for protocol in (2, 4, 5):
        content = {"model": arrays, "args": argparse.Namespace(x=1), "code": Code(), "o": np.float64(3.5)}
        Path("x.pkl").write_bytes(pickle.dumps(content, protocol))
        back = read_tensors("x.pkl")
        assert back.keys() == {f"model.{n}" for n in arrays}
        assert all(np.array_equal(back[f"model.{n}"].numpy(), x) for n, x in arrays.items())
    assert not Path("ran").exists()
    for bad in ({"a": np.array(["x"])}, {"a": np.array([Code()], object)}):
        Path("x.pkl").write_bytes(pickle.dumps(bad))
        with pytest.raises(UserError):
            read_tensors("x.pkl")
    assert not Path("ran").exists()
    torch.save(collections.OrderedDict(a=torch.ones(2)), "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors("old.pth")["a"], torch.ones(2))
