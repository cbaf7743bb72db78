"""Training through the command line: worlds, ZeRO stages, kills and resumes give the same result."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, dit_ds, metrics_of, refused, small_disk, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_ds.checkpointing.reader import Reader

MICRO = "--deepspeed.override.train_micro_batch_size_per_gpu"


def weights(run_dir: Path, step: int) -> dict:
    """All tensors of a checkpoint, read whole from its ranks' files and the frozen ones'."""
    path = run_dir / f"checkpoints/step_{step:08d}"
    return load_file(path / "frozen.safetensors") | Reader(path).whole("master")


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def batches_of_ten(folder: Path, micro_batch: str) -> list:
    """`dit-ds train` as `trained` was: 10 expressions a step, so that an epoch's last batch is short."""
    return ["train", "--config", folder / "tiny.yaml", "--train.batch_size", "10", MICRO, micro_batch]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run on two ranks: one epoch, 96 refs in batches of 10, so the last batch is short."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(shards, folder / "run")))
    done = dit_ds("train", "--config", config, "--json", "--train.batch_size", "10", MICRO, "5", ranks=2, real=True)
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 10
    return folder


def test_two_ranks_equal_one(trained, shards, tmp_path):
    dit_ds(*batches_of_ten(trained, "10"), "--run_dir", tmp_path / "one")
    one, two = metrics_of(tmp_path / "one"), metrics_of(trained / "run")
    assert [m["step"] for m in one] == [m["step"] for m in two] == list(range(1, 11))
    np.testing.assert_allclose([m["loss"] for m in one], [m["loss"] for m in two], rtol=2e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in one], [m["grad_norm"] for m in two], rtol=1e-3)
    assert_close(weights(tmp_path / "one", 10), weights(trained / "run", 10), 2e-4)


def test_accumulation_equals_one_pass(trained, tmp_path):
    dit_ds(*batches_of_ten(trained, "2"), "--run_dir", tmp_path / "acc")
    losses = [[m["loss"] for m in metrics_of(d)] for d in (tmp_path / "acc", trained / "run")]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_what_a_run_leaves_behind(trained):
    run = trained / "run"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "best.json",
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"] == 10
    assert json.loads((run / "environment.json").read_text())["versions"]["deepspeed"]
    line = metrics_of(run)[0]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "samples_per_second",
        "data_wait",
        "tokens_per_second",
        "mfu",
        "step_seconds_p50",
        "step_seconds_p95",
        "slowest_rank",
        "skipped_steps",
        "peak_memory_gib",
        "reserved_memory_gib",
        "step",
        "epoch",
    } <= line.keys()
    log = (run / "log.txt").read_text().splitlines()
    start = next(i for i, line in enumerate(log) if "parameters, in millions" in line)
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in log)
    table = {name: rest for _, _, name, *rest in map(str.split, log[start + 1 : start + 8])}
    assert table["text_encoder"][1:] == ["0.00", "frozen"] and float(table["image_encoder.instruction"][1]) > 0
    assert [m["step"] for m in metrics_of(run, "eval")] == [10]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000010"]


@pytest.mark.fast
def test_metrics_go_to_tensorboard_and_to_deepspeeds_monitors(config_file, tmp_path):
    """csv_monitor stands for W&B, which needs an account: both get the same calls."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    dit_ds("train", "--config", config_file, "--train.max_steps", "2", "--log.tensorboard", "true",
           "--deepspeed.override.csv_monitor", json.dumps(monitor))  # fmt: skip
    losses = [m["loss"] for m in metrics_of(tmp_path / "run")]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("train/loss")], losses, rtol=1e-6)
    rows = next((tmp_path / "csv").rglob("*train_loss.csv")).read_text().splitlines()[1:]
    np.testing.assert_allclose([float(r.split(",")[1]) for r in rows], losses, rtol=1e-6)


@pytest.fixture(scope="module")
def fp32_losses(shards, tmp_path_factory) -> list[float]:
    """Of the four steps that are taken in bf16 below."""
    folder = tmp_path_factory.mktemp("fp32")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny_config(shards, folder / "run")))
    dit_ds("train", "--config", folder / "c.yaml", "--train.max_steps", "4", "--train.batch_size", "4")
    return [m["loss"] for m in metrics_of(folder / "run")]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_trains_as_fp32(config_file, fp32_losses, tmp_path, stage):
    dit_ds("train", "--config", config_file, "--deepspeed.config", ROOT / f"configs/deepspeed/zero{stage}.json",
           "--deepspeed.override.bf16.enabled", "true", "--train.max_steps", "4", "--train.batch_size", "4")  # fmt: skip
    losses = {"bf16": [m["loss"] for m in metrics_of(tmp_path / "run")], "fp32": fp32_losses}
    assert len(losses["bf16"]) == 4
    np.testing.assert_allclose(*losses.values(), rtol=0.02)  # of steps that change them by more
    assert max(fp32_losses) > 1.05 * min(fp32_losses)


@pytest.mark.slow
def test_a_compiled_run_trains_evaluates_and_saves(config_file, tmp_path):
    """Compiled blocks in windows, selectively checkpointed, in bf16; evaluation reads them without gradients."""
    dit_ds("train", "--config", config_file, "--deepspeed.override.bf16.enabled", "true", "--train.max_steps", "2",
           "--train.compile", "true", "--train.activation_checkpointing", "selective", "--model.window_size", "3",
           "--model.word_dropout", "0.1", "--model.attention", "chunked")  # fmt: skip
    assert len(metrics_of(tmp_path / "run")) == 2 and len(metrics_of(tmp_path / "run", "eval")) == 1
    dit_ds("eval", tmp_path / "run")  # not compiled


def test_evaluation_gives_the_same_digits_on_any_number_of_ranks(trained, tmp_path):
    one, two, three = (
        json.loads(dit_ds("eval", trained / "run", "--json", ranks=n, real=n == 2).stdout.splitlines()[-1])
        for n in (1, 2, 3)
    )
    assert one == two == three
    assert list(one) == ["split", "prompt", "n", "oiou", "miou", "p@0.5", "p@0.6", "p@0.7", "p@0.8", "p@0.9"]
    assert one["n"] == metrics_of(trained / "run", "eval")[-1]["n"]
    assert one["miou"] == metrics_of(trained / "run", "eval")[-1]["miou"]
    written = tmp_path / "masks"
    dit_ds("eval", trained / "run", "--split", "testA", "--write-masks", written)
    masks = list(written.iterdir())
    assert len(masks) == json.loads(dit_ds("eval", trained / "run", "--split", "testA", "--json").stdout)["n"]
    assert set(np.unique(np.asarray(Image.open(masks[0])))) <= {0, 255}


def test_an_exported_file_is_the_model(trained, shards, tmp_path):
    """One file evaluates to the same digits, starts a fine-tuning, and has SAM's names; bf16 halves it."""
    out = tmp_path / "out/model.safetensors"
    said = json.loads(dit_ds("export", trained / "run", "--out", out, "--json", real=True).stdout)
    tensors = load_file(out)
    assert said["tensors"] == len(tensors) and said["bytes"] == out.stat().st_size and said["step"] == 10
    assert {"image_encoder.blocks.0.attn.qkv.weight", "mask_decoder.iou_token.weight"} <= tensors.keys()
    assert any(n.startswith("text_encoder.") for n in tensors)  # frozen, yet the file needs no other
    assert dit_ds("eval", out, "--json").stdout == dit_ds("eval", trained / "run", "--json").stdout
    tune = [*batches_of_ten(trained, "10"), "--run_dir", tmp_path / "tuned", "--model.checkpoint", out]
    dit_ds(*tune, "--train.max_steps", "1", "--train.lr", "1e-12")
    assert_close(weights(tmp_path / "tuned", 1), {n: tensors[n] for n in weights(tmp_path / "tuned", 1)}, 1e-6)
    half = tmp_path / "half.safetensors"
    dit_ds("export", trained / "run", "--out", half, "--dtype", "bf16")
    assert half.stat().st_size < 0.51 * out.stat().st_size
    full, short = (json.loads(dit_ds("eval", f, "--json").stdout) for f in (out, half))
    assert short["n"] == full["n"] and short["miou"] == pytest.approx(full["miou"], abs=0.02)
    half.write_bytes(half.read_bytes()[:5000])
    assert "is damaged" in refused(dit_ds("eval", half, check=None))
    stranger = tmp_path / "stranger.safetensors"
    save_file({"a": next(iter(tensors.values())).clone()}, stranger)
    assert "not written by dit-ds export" in refused(dit_ds("eval", stranger, check=None))


def test_pictures(trained, refer_tree, tmp_path):
    image = sorted((refer_tree / "images/train2014").iterdir())[0]
    out = tmp_path / "p.png"

    def covered(*threshold, **kwargs):
        words = ["predict", trained / "run", "--image", image, "--text", "The left star", "--out", out, "--json"]
        return json.loads(dit_ds(*words, *threshold, **kwargs).stdout)["covered"]

    everything, nothing = covered("--threshold", "0.0001"), covered("--threshold", "0.9999")
    assert nothing <= covered(real=True) <= everything and nothing < everything
    assert Image.open(out).width > 2 * Image.open(image).width
    dit_ds("sheet", trained / "run", "--out", tmp_path / "s.png", "--rows", "4", real=True)
    assert Image.open(tmp_path / "s.png").height > 300


def test_resuming_something_else_is_refused_in_one_line(trained, config_file, tmp_path):
    base = batches_of_ten(trained, "5")
    assert "go on with --resume" in refused(dit_ds(*base, check=None))
    again = ["train", "--config", config_file, "--train.max_steps", "1"]
    dit_ds(*again)
    assert "seed 0, this run has 1" in refused(dit_ds(*again, "--resume", "--seed", "1", check=None))
    bf16 = ["--deepspeed.precision", "bf16"]
    assert "dtype torch.float32, this run has torch.bfloat16" in refused(dit_ds(*again, "--resume", *bf16, check=None))
    assert "is of another model" in refused(dit_ds(*again, "--resume", "--model.decoder_layers", "1", check=None))


def test_requests_that_cannot_be_met(refusal, trained, config_file, tmp_path):
    def line(*arguments):
        return refusal("train", "--config", config_file, *arguments)

    def late(*arguments):  # refused once the ranks have met
        return refused(dit_ds("train", "--config", config_file, *arguments, check=None))

    assert "micro-batches that divide are 1, 2, 4, 8" in line(MICRO, "3")
    assert "did you mean 'train.lr'?" in line("--train.lrr", "1")
    assert "did you mean 'layer_wise'?" in line("--model.scheme", "layerwise")
    assert "train.lr = 'fast'" in line("--train.lr", "fast")
    assert "no manifest.json" in line("--data.root", tmp_path)
    assert "no split 'dev'" in line("--data.val_split", "dev")
    assert "text encoder 'no/such'" in line("--text.name", "no/such")
    assert "no DeepSpeed configuration" in line("--deepspeed.config", "none.json")
    assert "the run owns" in line("--deepspeed.override.train_batch_size", "8")
    assert "no file " in late("--model.checkpoint", "none.pth")
    assert "xformers can't run here" in late("--model.attention", "xformers")
    assert "train.activation_checkpointing = 'every_0'" in line("--train.activation_checkpointing", "every_0")
    assert "cannot read the configuration" in refusal("train", "--config", "none.yaml")
    # nothing above left a run behind that would stop the next
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "no checkpoint in" in refusal("eval", tmp_path)
    picture = ["predict", trained / "run", "--out", tmp_path / "o.png"]
    assert "cannot read the picture" in refusal(*picture, "--image", tmp_path / "no.jpg", "--text", "a")
    assert "the text is empty" in refusal(*picture, "--image", ROOT / "README.md", "--text", " ")


def test_a_checkpoint_of_another_model_is_refused(refusal, trained, tmp_path):
    copy = tmp_path / "step_00000010"
    shutil.copytree(trained / "run/checkpoints/step_00000010", copy)  # complete: frozen weights are in it
    dit_ds("eval", copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["config"]["model"]["static_tokens"] = 2
    (copy / "meta.json").write_text(json.dumps(meta))
    assert "is of another model" in refusal("eval", copy)
    file = copy / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "is damaged" in refusal("eval", copy)


def test_a_full_disk_ends_a_run_in_one_line_and_keeps_no_half_checkpoint(config_file, tmp_path):
    with small_disk(tmp_path / "small", "3m") as small:
        arguments = ["train", "--config", config_file, "--run_dir", small / "run", "--train.max_steps", "1"]
        assert "no space left" in refused(dit_ds(*arguments, check=None))
        assert not list((small / "run").glob("checkpoints/*")) and not list((small / "run/frozen").iterdir())
