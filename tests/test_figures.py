"""Attention maps against the layers' own outputs, and the figures that are drawn of checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.checkpointing.weights import save_tensors
from dit_ds.cli.entry import main
from dit_ds.config.load import merge, validate
from dit_ds.config.schema import RunConfig
from dit_ds.evaluation.metrics import intersection_and_union
from dit_ds.models.attention_maps import attention_of_picture, layer_maps, observed, picture_grid
from dit_ds.models.build import build_model
from dit_ds.models.image_encoder import JointAttention
from dit_ds.models.instruction import SCHEMES
from dit_ds.models.sam import Size
from dit_ds.visualize.drawing import GridRow, write_grid

RED = (220, 0, 0)


def assert_maps_give(attn, x, words, mask, of_x, of_words, tolerance):
    """The maps times the values, through the output projection, are what the layer returned; rows sum to one."""
    maps, b, d = layer_maps(attn, x, words, mask), len(x), x.shape[-1] // attn.num_heads
    tokens = x.flatten(1, 2) if words is None else torch.cat([words, x.flatten(1, 2)], dim=1)
    values = attn.qkv(tokens)[0].view(b, -1, 3, attn.num_heads, d)[:, :, 2].transpose(1, 2)
    for got, want in ((maps.visual, of_x.flatten(1, 2)), (maps.text, of_words)):
        if got is None or want is None:
            continue
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), rtol=0, atol=tolerance)
        out = attn.proj((got @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, want, rtol=0, atol=tolerance)
        if mask is not None:
            assert (got[..., : mask.shape[1]].movedim(3, 1)[~mask] == 0).all()
    return maps


@pytest.mark.parametrize("backend", ["eager", "sdpa", "chunked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_maps_times_values_are_the_layers_output(dtype, tolerance, backend):
    torch.manual_seed(0)
    attn = JointAttention(48, 4, (5, 6), backend).to(dtype)
    for p in (attn.rel_pos_h, attn.rel_pos_w):
        torch.nn.init.normal_(p)
    x, words = torch.randn(2, 5, 6, 48, dtype=dtype), torch.randn(2, 7, 48, dtype=dtype)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    with torch.no_grad():
        for m in (mask, None):
            maps = assert_maps_give(attn, x, words, m, *attn(x, words, m, update_text=True), tolerance)
            assert maps.visual.shape == (2, 4, 30, 37) and maps.text.shape == (2, 4, 7, 37)
            assert_maps_give(attn, x, words, m, *attn(x, words, m), tolerance)  # L-DIT: no outputs of words
        assert_maps_give(attn, x, None, None, *attn(x), tolerance)


def tiny(scheme: str = "layer_wise", **overrides: dict) -> RunConfig:
    """`conftest.tiny_config` of a scheme, which nothing is read for."""
    config = merge(tiny_config(Path("nowhere"), Path("nowhere")), {"model": {"scheme": scheme}})
    return validate(merge(config, overrides))


def random_model(config: RunConfig) -> torch.nn.Module:
    """Positions and all at random."""
    model = build_model(config).eval()
    for name, p in model.image_encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def a_picture(height: int, width: int, side: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One sample: [CLS], four words, [SEP], two of padding; and which are words."""
    torch.manual_seed(1)
    tokens = torch.tensor([[101, 1996, 2187, 2317, 2732, 102, 0, 0]])
    words = torch.tensor([False, True, True, True, True, False, False, False])
    image = torch.randint(0, 255, (1, 3, side, side), dtype=torch.uint8)
    size = torch.tensor([[height, width]])
    return {"image": image, "size": size, "tokens": tokens, "token_mask": tokens > 0}, words


@pytest.fixture(params=[0, 3])
def window(request, monkeypatch) -> int:
    """No windows, or windows of three, which are padded, as there are four places a side; in all layers but one."""
    monkeypatch.setattr(Size, "global_layers", (1,))
    return request.param


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_every_layer_of_a_model_is_explained(scheme, window):
    model = random_model(tiny(scheme, model={"window_size": window}))
    inputs, _ = a_picture(64, 64)
    given, returned = [], []
    hooks = [
        b.attn.register_forward_hook(lambda _, args, out: returned.append(out)) for b in model.image_encoder.blocks
    ]
    with observed(model.image_encoder, lambda *what: given.append(what)):
        logits = model(**inputs)
    for hook in hooks:
        hook.remove()
    assert [layer for layer, *_ in given] == [0, 1, 2, 3]
    for (_, attn, x, words, mask), (of_x, of_words) in zip(given, returned):
        assert (words is None) == (scheme == "default")
        assert_maps_give(attn, x, words, mask, of_x, of_words, 1e-5)
    assert torch.equal(model(**inputs), logits) and len(given) == 4  # nobody looks any more


@pytest.mark.parametrize("padding", [True, False])
@torch.no_grad()
def test_what_is_shown_is_the_mean_over_the_pictures_places(window, padding):
    """Place by place and window by window, of a picture that fills 3 x 4 of 4 x 4 places."""
    model = random_model(tiny("end_to_end", model={"window_size": window, "mask_padding": padding}))
    inputs, words = a_picture(40, 64)
    assert picture_grid(inputs["size"][0], (4, 4), 64) == (3, 4)
    given = []
    with observed(model.image_encoder, lambda layer, *what: given.append(what)):
        expected = model(**inputs)
    logits, found = attention_of_picture(model, inputs, words)
    assert torch.equal(logits, expected) and sorted(found) == [0, 1, 2, 3]
    for layer, (attn, x, of_words, mask) in enumerate(given):
        side = x.shape[1]  # of a window, or of the whole
        assert side == (3 if window and layer != 1 else 4)
        maps, across = layer_maps(attn, x, of_words, mask), -(-4 // side)
        received, by_word, to_words = torch.zeros(3, 4), torch.zeros(4, 3, 4), 0.0
        for place in range(12):
            i, j = divmod(place, 4)
            which = i // side * across + j // side
            rows = maps.visual[which, :, i % side * side + j % side].mean(0)
            to_words += float(rows[:8][inputs["token_mask"][0]].sum()) / 12
            for k in range(12):
                y, z = divmod(k, 4)
                key = 8 + y % side * side + z % side
                if y // side * across + z // side == which:
                    received[y, z] += rows[key] / 12
                    if k == place:
                        by_word[:, y, z] = maps.text[which, :, 1:5, key].mean(0) / len(x)
        torch.testing.assert_close(found[layer].received, received)
        torch.testing.assert_close(found[layer].by_word, by_word)
        assert found[layer].to_words == pytest.approx(to_words)


@torch.no_grad()
def test_only_the_expressions_rows_are_words():
    """Static tokens behind them take their share and are not shown."""
    model = random_model(tiny(model={"static_tokens": 3}))
    inputs, words = a_picture(64, 64)
    _, found = attention_of_picture(model, inputs, words, layers={2})
    assert list(found) == [2] and found[2].by_word.shape == (4, 4, 4)
    assert 0 < found[2].to_words < 1 - float(found[2].received.sum()) - 1e-3


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(shards, tmp_path_factory):
    """A function that writes an untrained model as an exported file, with its configuration."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name: str, scheme: str = "layer_wise", **overrides: dict) -> str:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            config = tiny(scheme, **merge({"data": {"root": str(shards)}}, overrides))
            header = {"config": config.model_dump(mode="json"), "step": 0, "epoch": 0}
            state = {n: x.contiguous() for n, x in build_model(config).state_dict().items()}
            save_tensors(state, path, {"dit_ds": json.dumps(header), "format": "pt"})
        return str(path)

    return write


@pytest.fixture
def call(capsys):
    """Run a command in this process: its JSON, or the line that refuses it."""

    def run(*args: object) -> dict | str:
        capsys.readouterr()
        status = main([*map(str, args), "--json"])
        said = capsys.readouterr()
        if status == 0:
            return json.loads(said.out)
        errors = [line for line in said.err.splitlines() if "error: " in line]
        assert status == 2 and len(errors) == 1 and "Traceback" not in said.err, said.err
        return errors[0]

    return run


@pytest.fixture
def picture(refer_tree) -> Path:
    return sorted((refer_tree / "images/train2014").iterdir())[0]


def test_attention_of_three_checkpoints(checkpoints, call, picture, tmp_path):
    paths = [checkpoints(s, s) for s in ("default", "end_to_end", "layer_wise")]
    out = tmp_path / "new/a.png"
    result = call("attention", *paths, "--image", picture, "--text", "The Left star", "--out", out)
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width > 800
    assert result["text"] == "the left star"
    default, end_to_end, layer_wise = result["checkpoints"]
    assert default["title"] == "default SAM (text frozen)" and layer_wise["title"] == "L-DIT (text frozen)"
    assert default["shows"] == "places" and default["layers"][0]["to_words"] is None
    for of in (end_to_end, layer_wise):
        assert of["shows"] == "words" and of["words"] == ["the", "left", "star"]
        assert [x["layer"] for x in of["layers"]] == [1, 2, 3, 4]
        for x in of["layers"]:
            assert 0 < x["to_words"] < 1 and 0 < x["words_to_image"] < 1 and x["peak"] >= 1


def test_attention_by_word_as_pdf(checkpoints, call, picture, tmp_path):
    common = ("attention", checkpoints("layer_wise"), "--image", picture, "--text", "left $ star", "--layers", "1,4")
    whole, by_word = tmp_path / "whole.PDF", tmp_path / "words.pdf"
    assert call(*common, "--out", by_word, "--words")["checkpoints"][0]["words"] == ["left", "star"]
    assert [x["layer"] for x in call(*common, "--out", whole)["checkpoints"][0]["layers"]] == [1, 4]
    assert whole.read_bytes()[:5] == by_word.read_bytes()[:5] == b"%PDF-"
    assert by_word.stat().st_size > whole.stat().st_size


def test_attention_that_cannot_be_drawn(checkpoints, call, picture, tmp_path):
    def line(*paths, image=picture, text="star", out="a.png", more=()):
        return call("attention", *paths, "--image", image, "--text", text, "--out", tmp_path / out, *more)

    ours, default = checkpoints("layer_wise"), checkpoints("default", "default")
    assert "is no picture's name" in line(ours, out="a.gif")
    assert "no layer 5 in" in line(ours, more=("--layers", "1,5"))
    assert "'0.5' does not read" in line(ours, more=("--layers", "0.5"))
    assert "no words in its ViT's attention" in line(default, more=("--words",))
    assert "--words is for one checkpoint" in line(ours, default, more=("--words",))
    assert "cannot read the picture" in line(ours, image=tmp_path / "no.jpg")
    assert "the text is empty" in line(ours, text=" ")
    lavt = checkpoints("lavt", model={"name": "lavt", "size": "swin_t_tiny"}, data={"resize": "stretch"})
    assert "attention is drawn of dit_sam's ViT only" in line(lavt)
    assert not list(tmp_path.iterdir())


def test_a_grid_tells_what_it_shows(checkpoints, call, tmp_path):
    paths = [checkpoints("layer_wise"), checkpoints("default", "default", data={"image_size": 96})]
    result = call("grid", *paths, "--samples", "5,0", "--out", tmp_path / "g.pdf", "--titles", "ours,SAM")
    assert (tmp_path / "g.pdf").read_bytes()[:5] == b"%PDF-"
    assert result["titles"] == ["ours", "SAM"] and [s["sample"] for s in result["samples"]] == [5, 0]
    np.testing.assert_allclose(np.mean([s["ious"] for s in result["samples"]], axis=0), result["miou"])

    from dit_ds.data.build import build_eval_dataset
    from dit_ds.evaluation.predictor import Predictor

    for k, path in enumerate(paths):  # what `dit-ds predict` would give
        predictor = Predictor.load(path)
        dataset = build_eval_dataset(predictor.config, "val")
        for s in result["samples"]:
            shared, union = intersection_and_union(
                predictor.segment(dataset.full_image(s["sample"]), s["text"]).mask,
                dataset[0, s["sample"], 1.0]["original"],
            )
            assert s["ious"][k] == pytest.approx(shared / union)


def test_wrong_predictions_are_framed_red(tmp_path):
    pixels = np.full((30, 40, 3), 90, np.uint8)
    mask = np.zeros((30, 40), bool)
    row = GridRow(pixels, "the left star", mask, [(mask, 0.2), (mask, 0.5), (mask, 0.9)])
    write_grid([row, row], ["a", "b", "c"], tmp_path / "g.png", wrong_below=0.5)
    with Image.open(tmp_path / "g.png") as drawn:
        is_red = (np.asarray(drawn) == RED).all(axis=2)
    columns = np.flatnonzero(is_red.any(axis=0))
    assert 400 < columns.min() and columns.max() - columns.min() == 219  # the third of five pictures, 220 wide
    assert is_red.sum() == 2 * (220 * 165 - 212 * 157)  # frames of four pixels, in both rows


def test_a_grid_frames_by_the_threshold(checkpoints, call, tmp_path):
    def reds(*more):
        call("grid", checkpoints("layer_wise"), "--rows", "2", "--out", tmp_path / "g.png", *more)
        with Image.open(tmp_path / "g.png") as drawn:
            return (np.asarray(drawn) == RED).all(axis=2).sum()

    assert reds("--wrong-below", "1") > 5000 and reds("--wrong-below", "0") < 500


def test_a_sheet_is_a_grid_of_one(checkpoints, call, tmp_path):
    sheet = call("sheet", checkpoints("layer_wise"), "--rows", "3", "--out", tmp_path / "s.png")
    grid = call("grid", checkpoints("layer_wise"), "--rows", "3", "--out", tmp_path / "g.png")
    assert sheet == {"out": str(tmp_path / "s.png"), "rows": 3, "miou": grid["miou"][0]}
    assert Image.open(tmp_path / "s.png").width > 1300  # two expressions side by side


def test_grids_that_cannot_be_drawn(checkpoints, call, shards, tmp_path):
    ours, out = checkpoints("layer_wise"), ("--out", tmp_path / "g.png")
    other_set = checkpoints("other_set", data={"split_by": "google"})
    assert "no manifest.json" in call("grid", other_set, *out)
    (tmp_path / "elsewhere/refcoco").mkdir(parents=True)
    (tmp_path / "elsewhere/refcoco/google").symlink_to(shards / "refcoco/unc")
    (tmp_path / "elsewhere/refcoco/unc").symlink_to(shards / "refcoco/unc")
    both = (ours, other_set, "--data-root", tmp_path / "elsewhere")
    assert "of refcoco/unc" in (line := call("grid", *both, *out)) and "compare checkpoints of one data set" in line
    assert "no sample 9999 in val" in call("grid", ours, "--samples", "1,9999", *out)
    assert "2 titles for 1 checkpoints" in call("grid", ours, "--titles", "a,b", *out)
    assert "no split 'testZ'" in call("grid", ours, "--split", "testZ", *out)
    assert "not allowed with" in call("grid", ours, "--rows", "2", "--samples", "1", *out)
    assert "is no picture's name" in call("grid", ours, "--out", tmp_path / "g.tiff")
    assert not (tmp_path / "g.png").exists()


def test_other_shards_of_the_same_set_are_refused(checkpoints, call, refer_tree, tmp_path):
    from dit_ds.data.shards.write import shard_refer

    shard_refer(refer_tree, refer_tree / "images/train2014", "refcoco", "unc", tmp_path, shards={"val": 2}, processes=1)
    other = checkpoints("other_shards", data={"root": str(tmp_path)})
    line = call("grid", checkpoints("layer_wise"), other, "--out", tmp_path / "g.png")
    assert "different shards of refcoco/unc" in line and "--data-root" in line


@pytest.mark.slow
def test_attention_of_a_clip(checkpoints, tiny_clip, refer_tree, tmp_path):
    """Its tokenizer has other ends than BERT's."""
    path = checkpoints("clip", text={"name": str(tiny_clip), "layers": 2})
    image = sorted((refer_tree / "images/train2014").iterdir())[0]
    out = tmp_path / "a.png"
    words = ("attention", path, "--image", image, "--text", "the red star", "--out", out, "--json")
    assert len(json.loads(conftest.dit_ds(*words, real=True).stdout)["checkpoints"][0]["layers"]) == 4 and out.exists()


def test_predict_writes_the_format_of_its_name_and_never_over_its_picture(checkpoints, call, picture, tmp_path):
    path = checkpoints("layer_wise")

    def predict(out: Path, *more: object) -> dict | str:
        return call("predict", path, "--image", picture, "--text", "star", "--out", out, *more)

    for ending, kind in ((".jpg", "JPEG"), (".webp", "WEBP"), (".PNG", "PNG")):
        out = tmp_path / f"new{ending}/p{ending}"
        assert predict(out)["out"] == str(out)
        with Image.open(out) as drawn:
            assert drawn.format == kind
    assert "is no picture's name" in predict(tmp_path / "p.txt")
    before = picture.read_bytes()
    (tmp_path / "same.jpg").symlink_to(picture)
    os.link(copy := shutil.copy(picture, tmp_path / "copy.jpg"), tmp_path / "hard.jpg")
    for out, read in ((picture, picture), (tmp_path / "same.jpg", picture), (tmp_path / "hard.jpg", copy)):
        for command in ("predict", "attention"):
            refused = call(command, path, "--image", read, "--text", "star", "--out", out)
            assert "itself, which is read" in refused, (command, out)
    assert picture.read_bytes() == before == (tmp_path / "hard.jpg").read_bytes()
    assert "cannot read the picture" in call("predict", path, "--image", "none.jpg", "--text", "a", "--out", picture)
    weights = Path(path).read_bytes()
    assert "itself, which is read" in call("export", path, "--out", path, "--dtype", "bf16")
    (step := tmp_path / "step_00000001").mkdir()
    for name in ("manifest.json", "meta.json", "model.safetensors"):
        (step / name).write_text("kept")
    for command, out in (("export", "model.safetensors"), ("sheet", "x.png"), ("grid", "x.png")):
        assert "is in a checkpoint's folder" in call(command, path, "--out", step / out)
    assert Path(path).read_bytes() == weights and len(list(step.iterdir())) == 3
    for wrong in ("0", "1", "35", "nan", "-0.1", "x", "inf"):
        assert "is not a number above 0 and below 1" in predict(tmp_path / "t.png", f"--threshold={wrong}")
    for option, wrong in (("--batch-size", "0"), ("--batch-size", "-1"), ("--workers", "-1"), ("--workers", "1.5")):
        assert "is not a whole number from" in call("eval", path, f"{option}={wrong}")


def test_pictures_are_shown_and_prompted_as_viewers_turn_them(checkpoints, call, tmp_path):
    photo, out, exif = tmp_path / "photo.jpg", tmp_path / "out.png", Image.Exif()
    exif[0x0112] = 6  # a quarter turn: shown 40 wide and 80 high
    Image.new("RGB", (80, 40), "white").save(photo, exif=exif)
    path = checkpoints("box", data={"prompts": ["text", "box"]})
    common = ("predict", path, "--image", photo, "--out", out)
    assert call(*common, "--box", "5,50,30,75")["box"] == [5, 50, 30, 75]
    assert Image.open(out).size == (2 * 40 + 6, 80 + 22)
    assert "is not within the picture, which is 40 wide and 80 high" in call(*common, "--box", "50,5,75,30")
    assert call("attention", path, "--image", photo, "--text", "star", "--out", out, "--layers", "1")["out"] == str(out)
