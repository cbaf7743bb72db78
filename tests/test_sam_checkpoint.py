"""Files to start from: all of SAM is read, whoever wrote the file and whatever is around it, or none of it."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import MINILM, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sam_files import ADDED, PARTS, assert_loads, make_model, refused

from dit_ds.config.load import validate
from dit_ds.doctor import configured
from dit_ds.doctor.check import Context, run_checks
from dit_ds.errors import UserError
from dit_ds.models.checkpoint_file import read_tensors
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.sam_checkpoint import check_sam_checkpoint, load_sam_checkpoint
from dit_ds.models.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def model() -> DITSAM:
    return make_model()


@pytest.fixture(scope="module")
def sam(model) -> dict[str, torch.Tensor]:
    """All of SAM's tensors, with random values, by segment-anything's names."""
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(x.shape, generator=g) for n, x in model.state_dict().items() if not n.startswith(ADDED)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


# --- what weights are wrapped in


WRAPPERS = st.lists(st.sampled_from(["module.", "model.", "sam.", "_orig_mod.", "net.", "student."]), max_size=3)
KEYS = st.lists(st.sampled_from(["model", "state_dict", "weights", "module"]), max_size=2)


@settings(max_examples=25, deadline=None)
@given(WRAPPERS, KEYS, st.booleans(), st.booleans())
def test_wrappers_are_taken_off(model, sam, scratch, prefixes, keys, compiled, legacy):
    content = {"".join(prefixes) + n.replace(".blocks.", "._orig_mod.blocks.") if compiled else "".join(prefixes) + n: x
               for n, x in sam.items()}  # fmt: skip
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, scratch / "wrapped.pth", _use_new_zipfile_serialization=not legacy)
    assert_loads(model, scratch / "wrapped.pth", sam)


class Colour(enum.Enum):
    RED = "red"


class Settings(dict):
    """As Lightning's AttributeDict."""


class Runs:
    """An object that runs a command where it is unpickled."""

    def __init__(self, command: str, run=os.system):
        self.command, self.run = command, run

    def __reduce__(self):
        return self.run, (self.command,)


def extras() -> dict:
    linear = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    counts = collections.defaultdict(int)
    counts["a"] += 1
    return {"optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=1e-4, path=Path("x")),
            "best": np.float64(0.5), "history": np.arange(5), "who": [Colour.RED, Settings(a=1), {1, 2}, counts],
            "queue": collections.deque([1.0, 2.0]), "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
            "rng": torch.get_rng_state(), "epoch": 7}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_lies_beside_the_weights_is_no_matter(model, sam, tmp_path, legacy, protocol):
    path = tmp_path / "x.pth"
    torch.save(extras() | {"model": collections.OrderedDict(sam)}, path, pickle_protocol=protocol,
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    assert_loads(model, path, sam)
    torch.save(
        {"state_dict": Settings(sam)} | extras(), path, pickle_protocol=protocol
    )  # a dictionary of another class
    assert_loads(model, path, sam)


@pytest.mark.parametrize("run", [os.system, eval, exec])
@pytest.mark.parametrize("where", ["beside", "above", "as a name"])
def test_a_file_runs_nothing(model, sam, tmp_path, monkeypatch, run, where):
    mark, path = tmp_path / "mark", tmp_path / "x.pth"
    command = f"touch {mark}" if run is os.system else f"open({str(mark)!r}, 'w')"
    bad = Runs(command, run)
    content = {"beside": {"model": sam, "args": bad}, "above": bad, "as a name": {"model": sam, bad: 1}}[where]
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
        torch.save(content, path, **options)
        if where == "above":
            refused(model, path)
        else:
            assert_loads(model, path, sam)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content if where == "above" else [bad]))
    refused(model, tmp_path / "plain.pkl")
    assert not mark.exists()


def test_the_weights_are_taken_and_not_their_average(model, sam, tmp_path):
    average = {n: x + 1 for n, x in sam.items()}
    torch.save({"model": sam, "model_ema": average, "epoch": 1}, tmp_path / "x.pth")
    assert assert_loads(model, tmp_path / "x.pth", sam)["notes"] == ["without those under model_ema"]
    torch.save({"ema": sam}, tmp_path / "x.pth")
    assert_loads(model, tmp_path / "x.pth", sam)
    torch.save({"a": sam, "b": average}, tmp_path / "x.pth")
    assert "more than once, under 'a.' and 'b.'" in refused(model, tmp_path / "x.pth")


# --- all of SAM, or a refusal


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_missing_is_counted(model, sam, scratch, data):
    gone = data.draw(st.sets(st.sampled_from(sorted(sam)), min_size=1, max_size=12))
    save_file({n: x for n, x in sam.items() if n not in gone}, scratch / "cut.safetensors")
    line = refused(model, scratch / "cut.safetensors")
    assert f"lacks {len(gone)} of SAM's {len(sam)} tensors" in line
    for part in PARTS:
        mine = [n for n in gone if n.startswith(part)]
        there = f"{len(mine)} of {sum(n.startswith(part) for n in sam)} of the {part.replace('_', ' ').rstrip('.')} ("
        assert (there in line) == bool(mine)
        assert not mine or any(n in line for n in mine)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_has_another_shape_is_refused(model, sam, scratch, data):
    name = data.draw(st.sampled_from(sorted(sam)))
    shape = list(sam[name].shape)
    how = data.draw(st.sampled_from(["wider", "empty", "another rank"]))
    new = {"wider": [*shape[:-1], shape[-1] + 1], "empty": [0, *shape[1:]], "another rank": [1, *shape]}[how]
    torch.save(sam | {name: torch.zeros(new)}, scratch / "shape.pth")
    assert "of another size" in refused(model, scratch / "shape.pth")


def test_blocks_that_are_cut_off(model, sam, tmp_path):
    torch.save({n: x for n, x in sam.items() if not n.startswith("image_encoder.blocks.3.")}, tmp_path / "x.pth")
    line = refused(model, tmp_path / "x.pth")
    assert "lacks 14 of" in line and "(image_encoder.blocks.3." in line and "and 11 more" in line


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bare", [False, True])
def test_one_part_alone_is_named(model, sam, tmp_path, part, bare):
    only = {n.removeprefix(part) if bare else n: x for n, x in sam.items() if n.startswith(part)}
    save_file(only, tmp_path / "x.safetensors")
    assert f"holds SAM's {part.replace('_', ' ').rstrip('.')} alone: it lacks" in refused(
        model, tmp_path / "x.safetensors"
    )


def renamed(sam: dict, of: str, to: str) -> dict:
    return {n.replace(of, to): x for n, x in sam.items()}


OTHERS = {
    "SAM-HQ": lambda sam: sam | {"mask_decoder.hf_token.weight": torch.zeros(1, 64)},
    "SAM 2": lambda sam: {"model." + n: x for n, x in renamed(renamed(sam, "mask_decoder.", "sam_mask_decoder."),
                                                              "image_encoder.blocks", "image_encoder.trunk.blocks").items()},
    "MobileSAM": lambda sam: renamed(sam, "image_encoder.blocks.", "image_encoder.layers.1.blocks."),
    "EfficientSAM": lambda sam: sam | {"prompt_encoder.invalid_points.weight": torch.zeros(1, 64)},
    "the paper's released code": lambda sam: renamed(sam, "image_encoder", "visual_encoder"),
    "with adapters": lambda sam: sam | {"image_encoder.blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 128)},
    "a Swin": lambda sam: {"backbone.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(4, 4)},
    "another network": lambda sam: sam | {"mask_decoder.gate.weight": torch.zeros(1)},
    "no tensor with a name of SAM's": lambda sam: {"blocks.0.attn.qkv.weight": torch.zeros(4, 4)},
    "quantized": lambda sam: sam | {"image_encoder.neck.0.weight": sam["image_encoder.neck.0.weight"].to(torch.int8)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_named(model, sam, tmp_path, name):
    save_file(OTHERS[name](sam), tmp_path / "x.safetensors")
    assert name in refused(model, tmp_path / "x.safetensors")


def test_a_longer_mask_decoder(sam, tmp_path):
    """A file of SAM's two layers starts the first two of four; one of four that lacks the second is refused."""
    path = tmp_path / "x.pth"
    torch.save(sam, path)
    four = make_model(decoder_layers=4)
    report = load_sam_checkpoint(four, path)
    layer = "mask_decoder.transformer.layers."
    assert report["missing"] and all(n.startswith((f"{layer}2.", f"{layer}3.")) for n in report["missing"])
    whole = {n: x for n, x in four.state_dict().items() if not n.startswith(ADDED)}
    torch.save(whole, path)
    assert set(load_sam_checkpoint(make_model(), path)["unexpected"]) == whole.keys() - sam.keys()
    torch.save({n: x for n, x in whole.items() if not n.startswith(f"{layer}1.")}, path)
    assert "of the mask decoder" in refused(four, path)


def test_the_size_that_a_file_has(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = tmp_path / "b.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768),
                "image_encoder.blocks.11.norm1.weight": torch.zeros(768)}, path)  # fmt: skip
    text = TextEncoder(MINILM, layers=1, random_init=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        target = DITSAM(text, "vit_h", 64).state_dict()
    with pytest.raises(
        UserError, match="it is vit_b, 768 wide with 12 layers, model.size is vit_h .* set model.size vit_b"
    ):
        check_sam_checkpoint(path, target)
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 500)}, path)
    with pytest.raises(UserError, match="none of SAM's, 500 wide"):
        check_sam_checkpoint(path, target)


# --- files that hold no weights by name


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


CONTENTS = {
    "a bare tensor, (2, 3)": torch.zeros(2, 3),
    "a list": [{"image_encoder.pos_embed": torch.zeros(1)}],
    "a int": 5,
    "no tensor": {"epoch": 1, "args": argparse.Namespace()},
    "'test_sam_checkpoint.Whole'": Whole(),
}


@pytest.mark.parametrize("says", CONTENTS)
def test_contents_that_are_no_weights(model, tmp_path, says):
    torch.save(CONTENTS[says], tmp_path / "x.pth")
    assert says in refused(model, tmp_path / "x.pth")


def test_files_that_are_no_checkpoints(model, sam, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(sam, whole)
    torch.jit.script(Whole()).save(tmp_path / "script.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, says in {"script.pth": "TorchScript", "pointer.pth": "git lfs pull", "page.pth": "not a readable",
                       "half.pth": "not a readable", "empty.safetensors": "not a readable", "folder": "dit-ds export",
                       "none.pth": "no file "}.items():  # fmt: skip
        assert says in refused(model, tmp_path / name)


def test_reading_names_alone_reads_no_values(sam, tmp_path):
    torch.save(sam, tmp_path / "x.pth")
    save_file(sam, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        found = read_tensors(path, values=False)
        assert all(x.is_meta and x.shape == sam[n].shape and x.dtype == sam[n].dtype for n, x in found.items())
        assert found.keys() == sam.keys()


# --- commands


def test_train_eval_and_doctor_refuse_alike(sam, shards, tmp_path, refusal):
    path, config = tmp_path / "cut.pth", tiny_config(shards, tmp_path / "run")
    config["model"]["checkpoint"] = str(path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    torch.save({n: x for n, x in sam.items() if n != "mask_decoder.iou_token.weight"}, path)
    says = f"{path} lacks 1 of SAM's {len(sam)} tensors, 1 of "
    assert says in refusal("eval", tmp_path / "c.yaml")
    assert says in refusal("train", "--config", tmp_path / "c.yaml") and not (tmp_path / "run").exists()
    for text in (config["text"]["name"], "nobody/no-such-encoder"):
        config["text"]["name"] = text
        c = Context(config=validate(config))
        (check,) = run_checks([configured.sam_checkpoint], c, 60)
        assert check.status == "fail" and says in check.found and "sam_vit_*.pth" in check.remedy
        torch.save(sam, path)
        (check,) = run_checks([configured.sam_checkpoint], c, 60)
        assert check.status == "ok" and check.found == f"{path}, {len(sam)} tensors, all of SAM's"
        torch.save({n: x for n, x in sam.items() if n != "mask_decoder.iou_token.weight"}, path)
