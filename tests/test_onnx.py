"""Export to ONNX: what the file computes in onnxruntime, the code of docs/ that runs it, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import MINILM, ROOT
from PIL import Image

from dit_ds.checkpointing import export_onnx as module
from dit_ds.checkpointing.export import header
from dit_ds.checkpointing.export_onnx import export_onnx
from dit_ds.checkpointing.weights import load_model, save_tensors
from dit_ds.cli.entry import main
from dit_ds.config.load import validate
from dit_ds.errors import RunFailed
from dit_ds.evaluation.predictor import Predictor
from dit_ds.models.build import build_model
from dit_ds.models.sam import SIZES

SIDE = 64
EXPRESSION = "woman in the red coat"  # of docs/export.md


@pytest.fixture(autouse=True)
def two_layers(monkeypatch):
    """Half the layers, half the time."""
    monkeypatch.setitem(SIZES, "vit_t", replace(SIZES["vit_t"], depth=2))


def write_model(path, model=None, text=MINILM, **data):
    """An exported file of a model with random weights."""
    values = {"data": {"image_size": SIDE, **data}, "model": {"size": "vit_t", **(model or {})},
              "text": {"name": str(text), "layers": 1, "freeze": True, "cache": 9}, "eval": {"threshold": 0.46}}  # fmt: skip
    config = validate(values)
    built = build_model(config)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if "rel_pos" in name or "static" in name:  # which start at zero
                p.normal_(std=0.1)
    meta = {"step": 7, "epoch": 0}
    save_tensors({n: x.contiguous() for n, x in built.state_dict().items()}, path, {"dit_ds": header(config, meta)})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """L-DIT, exported by the command."""
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_t", replace(SIZES["vit_t"], depth=2))
        source = write_model(folder / "model.safetensors")
        assert main(["export", str(source), "--format", "onnx", "--out", str(folder / "model.onnx")]) == 0
    return folder


def run(file, inputs):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {k: x.numpy() for k, x in inputs.items()})[0]


def inputs_of(batch, words, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(words) < torch.randint(2, words + 1, (batch, 1), generator=rng)
    return {
        "image": torch.randint(256, (batch, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8),
        "size": torch.randint(8, SIDE + 1, (batch, 2), generator=rng),
        "tokens": torch.randint(1000, (batch, words), generator=rng),
        "token_mask": mask,
    }


@torch.no_grad()
def test_logits_are_the_models_for_any_batch_and_number_of_words(made):
    model = load_model(made / "model.safetensors").model
    for batch, words in ((1, 2), (1, 20), (5, 11), (2, 3)):
        inputs = inputs_of(batch, words, seed=words)
        want, got = model(**inputs), run(made / "model.onnx", inputs)
        assert got.shape == (batch, SIDE // 4, SIDE // 4)
        assert np.abs(got - want.numpy()).max() <= 1e-4 < want.std()
    other = inputs | {"tokens": inputs["tokens"] + 1}
    assert np.abs(run(made / "model.onnx", other) - got).max() > 1e-3  # words count


def test_the_file_says_what_running_it_needs(made):
    proto = onnx.load(made / "model.onnx")
    about = {p.key: p.value for p in proto.metadata_props}
    meta = json.loads(about["dit_ds"])
    assert (
        meta["step"] == 7
        and meta["config"]["data"]["image_size"] == SIDE
        and meta["config"]["eval"]["threshold"] == 0.46
    )
    assert json.loads(about["tokenizer"])["truncation"]["max_length"] == 20
    assert {op.domain for op in proto.opset_import} == {""}  # ONNX's own operators alone
    assert sorted(f.name for f in made.iterdir()) == ["model.onnx", "model.safetensors"]  # nothing temporary is left


def test_the_documented_code_segments_as_predict_does(made, tmp_path):
    """The very code, by itself: it imports neither torch nor dit_ds."""
    page = (ROOT / "docs/export.md").read_text()
    code = re.search(r"\n## ONNX\n.*?```python\n(.*?)```", page, re.DOTALL)[1]
    assert f'"{EXPRESSION}"' in code
    rng = np.random.default_rng(0)
    for name, shape in (("wide", (90, 131)), ("small", (40, 31))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").symlink_to(made / "model.onnx")
        blurred = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize(shape[::-1])
        blurred.save(folder / "photo.jpg")
        last = "import sys; assert not {'torch', 'dit_ds', 'transformers'} & sys.modules.keys()"
        done = subprocess.run([sys.executable, "-c", f"{code}\n{last}"], cwd=folder, capture_output=True, text=True,
                              timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        want = Predictor(load_model(made / "model.safetensors")).segment(folder / "photo.jpg", EXPRESSION).mask
        got = np.asarray(Image.open(folder / "mask.png")).astype(bool)
        assert got.shape == want.shape == shape and 0.1 < want.mean() < 0.9
        assert (got != want).mean() < 1e-3  # a pixel may lie on the threshold


OTHERS = {
    "default": ({"scheme": "default"}, {}),
    "E-DIT, mixed prompts": ({"scheme": "end_to_end", "adapters": "always"}, {"prompts": ["text", "point", "box"]}),
    "no words": ({"scheme": "default"}, {"prompts": ["point", "box"]}),
    "released L-DIT": (
        {"scheme_form": "released", "mask_padding": False, "static_tokens": 20, "static_form": "add"},
        {},
    ),
    "cascade, few tokens": ({"scheme": "cascade", "static_tokens": 3}, {"tokens": 4}),
    "cross_attention": ({"scheme": "cross_attention"}, {}),
    "cross_attention_ffn": ({"scheme": "cross_attention_ffn"}, {}),
    "released cross_attention": ({"scheme": "cross_attention", "scheme_form": "released"}, {}),
    "released cross_attention_ffn": ({"scheme": "cross_attention_ffn", "scheme_form": "released"}, {}),
    "LAVT": ({"name": "lavt", "size": "swin_t_tiny"}, {"resize": "stretch"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_models(tmp_path, name):
    """Each compares itself with onnxruntime; the words' number is fixed where padding counts."""
    model, data = OTHERS[name]
    said = export_onnx(write_model(tmp_path / "m.safetensors", model, **data), tmp_path / "m.onnx")
    assert said["max_abs_difference"] <= 1e-4
    shapes = {"image": ["batch", 3, SIDE, SIDE], "size": ["batch", 2]}
    kinds = data.get("prompts", ["text"])
    if "text" in kinds:
        shapes |= {k: ["batch", "words" if model.get("mask_padding", True) else 20] for k in ("tokens", "token_mask")}
    if kinds != ["text"]:
        shapes |= {"points": ["batch", "points", 2], "labels": ["batch", "points"]}
    assert said["inputs"] == shapes


@pytest.mark.slow
def test_with_clips_text_tower(tmp_path, tiny_clip):
    said = export_onnx(write_model(tmp_path / "m.safetensors", text=tiny_clip), tmp_path / "m.onnx")
    assert said["max_abs_difference"] <= 1e-4 and said["inputs"]["tokens"] == ["batch", "words"]


class Traced:
    """Instead of the minutes of a trace: a graph of the model that is there already."""

    def __init__(self, made):
        self.model = onnx_ir.load(made / "model.onnx")

    def __call__(self, loaded):
        return self.model


def test_more_weights_than_one_file_holds_lie_beside_it(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_trace", Traced(made))
    out = tmp_path / "new/large.onnx"
    said = export_onnx(made / "model.safetensors", out, one_file=1000)
    data = tmp_path / "new/large.onnx.data"
    assert said["data"] == str(data) and said["bytes"] == out.stat().st_size + data.stat().st_size
    assert sorted(out.parent.iterdir()) == [out, data] and out.stat().st_size < data.stat().st_size
    inputs = inputs_of(2, 5)
    np.testing.assert_array_equal(run(out, inputs), run(made / "model.onnx", inputs))


def test_a_file_that_computes_something_else_is_not_left(made, tmp_path, monkeypatch):
    traced = Traced(made)
    words = traced.model.graph.initializers["text_encoder.bert.embeddings.word_embeddings.weight"]
    words.const_value = onnx_ir.tensor(-words.const_value.numpy(), name=words.name)
    monkeypatch.setattr(module, "_trace", traced)
    out = tmp_path / "m.onnx"
    out.write_bytes(b"former")
    with pytest.raises(RunFailed, match="from the model's"):
        export_onnx(made / "model.safetensors", out)
    assert out.read_bytes() == b"former" and list(tmp_path.iterdir()) == [out]


def test_without_onnxruntime_it_is_written_with_a_warning(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_trace", Traced(made))
    hide(monkeypatch, "onnxruntime")
    assert (
        main(["export", str(made / "model.safetensors"), "--format", "onnx", "--out", f"{tmp_path}/m.onnx", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["max_abs_difference"] is None and "pip install onnxruntime" in said["warnings"][0]


def hide(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))


def test_what_is_refused(made, tmp_path, refusal, monkeypatch):
    def line(*more, source=made / "model.safetensors", out=tmp_path / "m.onnx"):
        return refusal("export", source, "--format", "onnx", "--out", out, *more)

    assert "written in fp32: leave out --dtype bf16" in line("--dtype", "bf16")
    assert "is read: choose another name" in line(out=made / "model.safetensors")
    assert "is a device" in line(out="/dev/null")
    assert "is a folder: name a file" in line(out=tmp_path)
    rela = write_model(tmp_path / "rela.safetensors", {"name": "rela", "size": "swin_t_tiny"}, resize="stretch")
    assert "rela can't be exported to ONNX" in line(source=rela)
    hide(monkeypatch, "onnxscript")
    assert "needs onnxscript: pip install 'dit-ds[onnx]'" in line()
    assert not (tmp_path / "m.onnx").exists()
