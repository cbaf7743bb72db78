"""A step's memory: exact where it can be known, predicted as it is on real tensors, and within Table 8's targets."""

from __future__ import annotations

import inspect
import json
import queue
import sys
import threading

import pytest
import torch
from conftest import ROOT, warm
from memory_worker import MICRO_BATCH, configuration, storages
from test_upstream import resolve

import dit_ds.planning.memory.tracker as tracker_module
from dit_ds.config.load import validate
from dit_ds.engine.engine import import_deepspeed
from dit_ds.engine.simulated_rank import replacements
from dit_ds.errors import RunFailed
from dit_ds.models.build import build_model
from dit_ds.models.losses import segmentation_loss
from dit_ds.planning.memory import fake_cluster
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.live_tensors import LiveTensors
from dit_ds.planning.memory.profiled_step import fake_batch
from dit_ds.planning.memory.request import MemoryRequest
from dit_ds.planning.memory.streams import Streams
from dit_ds.planning.memory.tracker import MemoryTracker

STAYS = ("parameters", "gradients", "optimizer", "average", "buffers")


def test_live_tensors_are_counted_until_they_are_freed():
    with LiveTensors() as live:
        a = torch.zeros(1000)  # 4000 bytes, rounded to 4096
        view = a.view(10, 100)[:, 3]
        assert live.now == 4096
        del a
        assert live.now == 4096  # the view holds it
        b = torch.ones(256) + 1  # 1024, and as much again for a moment
        assert (live.now, live.peak) == (4096 + 1024, 4096 + 2 * 1024)
        view[0] = 1  # in place: nothing new
        del view, b
        assert (live.now, live.peak) == (0, 4096 + 2 * 1024)


def test_what_was_there_before_is_not_counted():
    a = torch.zeros(1000)
    with LiveTensors() as live:
        views = (a.view(10, 100).t(), a.detach(), a.add_(1))
        assert live.now == 0, views


def test_what_autograd_keeps_is_counted_and_freed():
    w = torch.randn(64, 64, requires_grad=True)
    with LiveTensors() as live:
        y = (torch.ones(128, 64) @ w).exp()  # keeps its input and its own output
        kept = live.now
        y.sum().backward()
        del y
        assert kept == 2 * 128 * 64 * 4
        assert live.now == 64 * 64 * 4  # the gradient


KINDS = {
    "dit_ds.planning.memory.fake_cluster.fake_tensors": "",
    "dit_ds.planning.memory.measure.measure": "",
    "dit_ds.planning.memory.profiled_step.Steps.take": "",
    "dit_ds.planning.tune.memory_model.MemoryModel.__init__": "model",
    "dit_ds.engine.zero_state.TrainingState.update_average": "model",
    "dit_ds.models.attention.attention_forward": "model",
    "deepspeed.runtime.engine.DeepSpeedEngine.__init__": "deepspeed",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.__init__": "deepspeed",
    "deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3.forward": "model",
    "torch.optim.adamw.AdamW.__init__": "optimizer",
    "torch.optim.adam._fused_adam": "optimizer",
    "torch.utils.checkpoint.checkpoint": "checkpoint",
    "torch.autograd.graph._engine_run_backward": "autograd",
    "torch.autograd.function.FunctionCtx.save_for_backward": "",
    "torch.nn.functional.layer_norm": "model",
    "torch.nn.modules.module.Module.zero_grad": "model",
    "transformers.models.bert.modeling_bert.BertModel.forward": "model",
    "segment_anything.modeling.sam.Sam.forward": "model",
    "conftest.environment": "",
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_code_that_makes_a_tensor_is_known(name):
    """The tracker tells by it which category a tensor is of; an unknown kind would be counted as another one."""
    import_deepspeed()
    code = inspect.unwrap(resolve(name)).__code__
    assert (code.co_name, tracker_module._kind(code.co_filename)) == (name.rpartition(".")[2], KINDS[name])


def test_a_module_that_is_gone_stops_the_tracker(monkeypatch):
    import_deepspeed()
    monkeypatch.setitem(tracker_module._OPTIONAL_KINDS, "deepspeed.runtime.zero.linear_layers", "model")
    with pytest.raises(ModuleNotFoundError, match="deepspeed.runtime.zero.linear_layers"):
        tracker_module._kind("/a/file/not/seen/before.py")


def test_a_function_to_replace_that_is_gone_stops_the_prediction(monkeypatch):
    deepspeed = import_deepspeed()
    monkeypatch.delattr(deepspeed.runtime.zero.stage3, "assert_ints_same_as_other_ranks")
    with pytest.raises(
        RunFailed, match=rf"deepspeed {deepspeed.__version__} has no deepspeed.runtime.zero.stage3.assert_"
    ):
        with fake_cluster._changed(replacements(torch.device("meta", 0), Streams())):
            raise AssertionError("it was entered")


def worker(mode: str, ranks: int, *settings: dict) -> list:
    """What `memory_worker.py` prints."""
    done = warm([str(ROOT / "tests/memory_worker.py"), mode, *map(json.dumps, settings)], ranks, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# (stage, rank): the last rank's share ends in padding
ASKED = [(0, 0), (2, 0), (2, 1), (3, 0)]


@pytest.fixture(scope="module")
def profiles() -> dict:
    """(stage, rank) to (real, predicted) profiles of a step in bf16 on two ranks."""
    stages = sorted({stage for stage, _ in ASKED})
    real = dict(zip(stages, worker("real", 2, *({"stage": s} for s in stages))))
    fake = worker("fake", 1, *({"stage": s, "ranks": 2, "rank": r} for s, r in ASKED))
    return {(s, r): (real[s][r], f) for (s, r), f in zip(ASKED, fake)}


@pytest.mark.parametrize(("stage", "rank"), ASKED)
def test_what_stays_is_predicted_to_the_byte(profiles, stage, rank):
    """Real steps on gloo against fake ones, category by category; what passes, within a percent.

    What passes can't be the same to the byte: gloo holds a gradient until its thread is done, BERT's attention has
    another kernel on CPUs, and torch.tensor makes the pixels' mean and deviation there out of the tracker's sight.
    """
    real, fake = profiles[stage, rank]
    assert {k: real["after"][k] for k in STAYS} == {k: fake["after"][k] for k in STAYS}
    for kind in ("parameters", "optimizer", "average", "inputs"):
        assert real["at_peak"][kind] == fake["at_peak"][kind], kind
    held = max(real["at_peak"]["gradients"], 2 * sum(n for n, trained in real["numels"] if trained))
    for phase in real["phases"]:
        assert fake["phases"][phase] == pytest.approx(real["phases"][phase], rel=0.01, abs=held), phase


def rounded(size: int) -> int:
    return -(-size // 512) * 512


@pytest.mark.parametrize(("stage", "rank"), ASKED)
def test_real_steps_hold_what_arithmetic_says(profiles, stage, rank):
    """bf16 on two ranks: 2 bytes a parameter; 12 a trained one in the optimizer, whole or the rank's half of it."""
    (real, _), ranks, up = profiles[stage, rank], 2, rounded
    trained = [n for n, train in real["numels"] if train]
    frozen = [n for n, train in real["numels"] if not train]
    after, buffers = real["after"], sum(map(up, real["buffer_sizes"]))

    def halves(numels: list[int]) -> list[int]:
        return [-(-n // ranks) for n in numels]

    if stage == 0:
        parameters = sum(up(2 * n) for n in trained + frozen)
        optimizer = sum(3 * up(4 * n) + 512 for n in trained)  # with a count of steps each
    elif stage == 2:  # trained ones end to end, padded so that each share begins at a multiple of 4 bytes
        flat = -(-sum(trained) // (2 * ranks)) * 2 * ranks
        parameters = up(2 * flat) + sum(up(2 * n) for n in frozen)
        optimizer = 3 * up(4 * flat // ranks) + 512
    else:  # small ones stay whole beside their halves
        whole = sum(up(2 * n) for n in trained + frozen if n <= 100_000)
        parameters = up(2 * sum(halves(trained))) + sum(up(2 * n) for n in halves(frozen)) + whole
        optimizer = 3 * up(4 * sum(halves(trained))) + 512
    assert (after["parameters"], after["optimizer"]) == (parameters + buffers, optimizer)
    assert after["parameters"] == real["walked"]["parameters"]
    if stage != 3:  # where the optimizer's own list of masters is empty between steps
        assert after["optimizer"] == real["walked"]["masters"] + real["walked"]["states"]
    assert after["activations"] == after["temporaries"] == after["inputs"] == 0


@pytest.mark.parametrize("policy", ["none", "block"])
def test_what_is_kept_is_what_autograd_saves(tmp_path, policy):
    """A real forward pass; autograd's own hooks see what it packs away. Layers made again keep their inputs only."""
    config = configuration(str(tmp_path), precision="fp32", policy=policy)
    tracker, saved, inputs_of_layers = MemoryTracker(), [], []
    with tracker:
        model = build_model(config).train()
        model.image_encoder.checkpoint_activations(policy)
        inputs, mask, weight = fake_batch(MICRO_BATCH, 64, config.data.tokens)
        tracker.tag("parameters", [*model.parameters(), *model.buffers()])
        tracker.tag("inputs", [*inputs.values(), mask, weight])
        ours = {
            x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers(), *inputs.values(), mask, weight)
        }
        if policy == "block":  # the checkpoint holds them, not autograd
            for block in model.image_encoder.blocks:
                block.register_forward_pre_hook(lambda m, args: inputs_of_layers.extend(args))
        tracker.restart()
        tracker.watch(model)
        tracker.enter("forward")
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.detach()) or x.detach(), lambda x: x):
            loss = segmentation_loss(model(**inputs), mask, weight)
        tracker.enter("backward")
        kept = tracker.profile().kept
        tracker.unwatch()
        theirs = [x for x in (*saved, *inputs_of_layers, loss)
                  if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in ours]  # fmt: skip
        assert sum(kept.values()) == storages(theirs)
        assert sum(v for k, v in kept.items() if k.startswith("image_encoder.blocks")) > 0


def test_tensors_that_another_thread_drops_are_counted_once():
    """As autograd's does after a backward pass, while the next step has begun."""
    tracker, dropped, interval = MemoryTracker(), queue.SimpleQueue(), sys.getswitchinterval()

    def drop() -> None:
        while dropped.get() is not None:
            pass

    other = threading.Thread(target=drop)
    other.start()
    sys.setswitchinterval(1e-6)
    try:
        with tracker:
            kept = [torch.zeros(128) for _ in range(200)]
            for i in range(1500):
                dropped.put(torch.zeros(128))
                if i % 10 == 0:
                    tracker.enter("forward")
                    tracker.restart()
    finally:
        sys.setswitchinterval(interval)
        dropped.put(None)
        other.join(timeout=60)
    assert tracker.now == len(kept) * 512
    kept.clear()
    assert tracker.now == 0


@pytest.mark.slow
def test_a_profile_is_drawn_by_predict_and_fits_table_8(tmp_path):
    """ViT-B and BERT tuned, batch 32 on one GPU, bf16, fp32 masters, each layer recomputed: 4.8 GiB at most.

    Its parameters, gradients and optimizer states alone take 3.1. The picture of it is one.
    """
    from PIL import Image

    from dit_ds.planning.memory.timeline import draw

    config = validate(
        {
            "text": {"name": str(ROOT / "configs/text/bert_base"), "random_init": True},
            "train": {"batch_size": 32, "activation_checkpointing": "block"},
            "deepspeed": {
                "config": str(ROOT / "configs/deepspeed/zero0.json"),
                "override": {"train_micro_batch_size_per_gpu": 32},
            },
        }
    )
    (answer,) = predict([MemoryRequest(config)])
    profile = answer.profiles[32]
    assert 3.1 <= profile.peak / 2**30 <= 4.8
    assert sum(profile.at_peak.values()) == profile.peak == max(profile.phases.values())
    assert profile.peak == max(sum(m[1:]) for m in profile.timeline)
    assert dict((m[0], m[1:]) for m in profile.timeline)[profile.peak_at] == tuple(profile.at_peak.values())
    draw(profile, tmp_path / "step.png", "a step")
    assert min(Image.open(tmp_path / "step.png").size) > 500
