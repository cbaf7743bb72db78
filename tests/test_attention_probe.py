"""Which attention kernel is the fastest: measured once, checked, remembered, and the same on all ranks. On CPUs, where no
run measures, with the kernels that there are."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.distributed import World
from dit_ds.errors import UserError
from dit_ds.models import attention_triton
from dit_ds.models.image_encoder import ImageEncoder
from dit_ds.planning import attention_probe
from dit_ds.planning.attention_probe import Choice, Shape, choose_kernels, decide, fastest

CPU = torch.device("cpu")
SHAPE = Shape((4, 6), heads=2, d=8, batch=2, words=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dit_ds/attention.json"


def alone(monkeypatch):
    monkeypatch.setattr(attention_probe, "gather_objects", lambda value: [value])
    return World(0, 1, 0, CPU)


def test_the_fastest_is_chosen_and_remembered(cache, monkeypatch):
    ms = {"chunked": 2.0, "sdpa": 1.0}
    measured = []
    monkeypatch.setattr(attention_probe.Layer, "milliseconds", lambda self, k: measured.append(k) or ms[k])
    choice, remembered = fastest(SHAPE, ["chunked", "sdpa"], torch.float32, CPU)
    assert (choice.kernel, choice.milliseconds, choice.left_out, remembered) == ("sdpa", ms, {}, False)
    assert measured == ["chunked", "sdpa"]
    assert fastest(SHAPE, ["chunked", "sdpa"], torch.float32, CPU) == (choice, True)
    assert len(measured) == 2
    for other in (SHAPE._replace(batch=3), SHAPE._replace(words=0)):  # measured by themselves
        assert not fastest(other, ["chunked", "sdpa"], torch.float32, CPU)[1]
    assert not fastest(SHAPE, ["chunked", "sdpa"], torch.bfloat16, CPU)[1]
    assert len(json.loads(cache.read_text())) == 4


def test_times_are_those_of_forward_and_backward():
    layer = attention_probe.Layer(SHAPE, torch.float32, CPU)
    assert 0 < layer.milliseconds("chunked") < 1000
    out, *grads = layer.step("chunked")
    assert out.shape == (2, 24, 2, 8) and [g.shape for g in grads] == [x.shape for x in layer.leaves]


@pytest.mark.parametrize("content", ["{", "[]", '{"KEY": 3}', '{"KEY": {"kernel": "chunked"}}'])
def test_a_damaged_memory_is_measured_anew(cache, content):
    key = attention_probe._key(SHAPE, ["chunked"], torch.float32, CPU)
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace('"KEY"', json.dumps(key)))
    choice, remembered = fastest(SHAPE, ["chunked"], torch.float32, CPU)
    assert choice.kernel == "chunked" and not remembered
    assert fastest(SHAPE, ["chunked"], torch.float32, CPU) == (choice, True)


def test_a_home_that_cannot_be_written_is_no_error(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert fastest(SHAPE, ["chunked"], torch.float32, CPU)[0].kernel == "chunked"


def test_a_kernel_that_fails_or_is_wrong_is_left_out(monkeypatch):
    """sdpa's gradients are halved; xformers can't run here."""
    whole = attention_probe.Layer.step

    def step(self, kernel, *args, **kwargs):
        results = whole(self, kernel, *args, **kwargs)
        return [results[0], *(g / 2 for g in results[1:])] if kernel == "sdpa" else results

    monkeypatch.setattr(attention_probe.Layer, "step", step)
    choice, _ = fastest(SHAPE, ["sdpa", "xformers", "chunked"], torch.float32, CPU)
    assert choice.kernel == "chunked" and list(choice.milliseconds) == ["chunked"]
    assert choice.left_out["sdpa"] == "its result is off by 0.5" and "CUDA" in choice.left_out["xformers"]
    layers = {SHAPE: []}
    with pytest.raises(UserError, match="model.attention sdpa can't be used here .*off by 0.5.*set model.attention"):
        decide(layers, "sdpa", ["sdpa"], torch.float32, alone(monkeypatch))


def encoder(**more):
    return ImageEncoder(96, 16, 32, depth=3, num_heads=2, out_chans=8, backend="auto", **more)


def test_layers_get_the_kernel_of_their_own_shape(monkeypatch):
    """Windows and the whole grid are measured apart; the log says what was measured."""
    e, asked = encoder(window_size=4, global_layers=(1,)), []

    def measured(shape, kernels, dtype, device):
        asked.append(shape)
        kernel = "sdpa" if shape.grid == (6, 6) else "chunked"
        return Choice(kernel, {}, {kernel: 1.0, "eager": 2.0}, {"xformers": "too wide"})

    monkeypatch.setattr(attention_probe, "_measured", measured)
    layers = {}
    for block in e.blocks:
        layers.setdefault(attention_probe._shape(block, e.grid, 7, 2), []).append(block)
    lines = decide(layers, "auto", ["sdpa", "chunked"], torch.bfloat16, alone(monkeypatch))
    assert asked == [Shape((4, 4), 2, 16, 8, 7), Shape((6, 6), 2, 16, 2, 7)]
    assert [b.attn.backend for b in e.blocks] == ["chunked", "sdpa", "chunked"]
    assert lines[1] == ("attention over 6 x 6 and 7 words, 2 heads of 16, 2 at once, bfloat16: sdpa; forward and backward "
                        "sdpa 1.00 ms, eager 2.00 ms; not xformers: too wide")  # fmt: skip


def test_a_cpu_measures_nothing(monkeypatch):
    e = encoder()
    monkeypatch.setattr(attention_probe, "_measured", None)
    assert choose_kernels(e, "auto", 7, micro_batch=2, dtype=torch.float32, world=alone(monkeypatch)) == []
    assert {b.attn.backend for b in e.blocks} == {"auto"}


def test_tiles_that_were_measured_stay_chosen(monkeypatch):
    """The fastest tile of each kernel, by a clock of ours; remembered ones are taken up, too."""
    problem = attention_probe._problem(SHAPE, torch.bfloat16, CPU)
    last = {k: attention_triton.tiles(k, problem)[-1] for k in attention_triton.KINDS}

    def milliseconds(self, kernel):
        return 1.0 + sum(attention_triton.tile_of(k, problem) != t for k, t in last.items())

    monkeypatch.setattr(attention_probe.Layer, "milliseconds", milliseconds)
    monkeypatch.setattr(attention_triton, "_chosen", {})
    whole = attention_probe.Layer.step
    monkeypatch.setattr(attention_probe.Layer, "step", lambda self, k, *a, **b: whole(self, "chunked", *a, **b))
    choice, _ = fastest(SHAPE, ["triton"], torch.bfloat16, CPU)
    assert choice.kernel == "triton" and choice.tiles == {k: list(t) for k, t in last.items()}
    attention_triton._chosen.clear()
    decide({SHAPE: []}, "auto", ["triton"], torch.bfloat16, alone(monkeypatch))
    assert {k: attention_triton.tile_of(k, problem) for k in last} == last
    assert attention_triton.tile_of("keys", problem._replace(words=9)) == last["keys"]  # of any number of words


def of_rank(rank: int, folder: str) -> None:
    """Each rank would choose another kernel."""
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    mine = Choice(("chunked", "sdpa")[rank], {}, {("chunked", "sdpa")[rank]: 1.0}, {})
    attention_probe.fastest = lambda *_: (mine, False)
    e = encoder()
    layers = {attention_probe._shape(e.blocks[0], e.grid, 7, 2): list(e.blocks)}
    lines = decide(layers, "auto", ["chunked", "sdpa"], torch.float32, World(rank, 2, rank, CPU))
    assert {b.attn.backend for b in e.blocks} == {"chunked"} and "chunked 1.00 ms" in lines[0]
    dist.destroy_process_group()


def test_rank_0_decides_for_all(tmp_path):
    torch.multiprocessing.spawn(of_rank, args=(str(tmp_path),), nprocs=2)
