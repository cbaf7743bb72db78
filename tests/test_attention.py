"""Attention: every backend against SAM's formulas in fp64; what it keeps for the backward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from conftest import ROOT

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.config.schema import ModelConfig
from dit_ds.errors import UserError
from dit_ds.models import attention, attention_kernels, attention_triton
from dit_ds.models.attention import BACKENDS, relative_position_attention
from dit_ds.models.attention_kernels import FUSED, why_not
from dit_ds.models.image_encoder import JointAttention

sys.path.append(str(ROOT / "benchmarks"))
import triton_aot
import triton_worker

# grid, words, whether some of them are padding, lengths of the tables if they are to be interpolated
CASES = {
    "square": ((6, 6), 6, True, None),
    "not square, odd words": ((5, 7), 3, True, None),
    "one word": ((4, 4), 1, False, None),
    "no words": ((4, 6), 0, False, None),
    "tables to interpolate": ((6, 5), 5, True, (27, 7)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def inputs_of(case, heads=3, d=8, batch=3):
    """q, k and v come from x by one projection, those of the words by two thirds of it, as in the encoder."""
    (h, w), words, masked, lengths = CASES[case]
    g = torch.Generator().manual_seed(1)
    dim = heads * d
    shapes = {
        "x": (batch, h * w, dim), "words": (batch, words, dim), "weight": (3 * dim, dim),
        "table_h": ((lengths or (2 * h - 1,))[0], d), "table_w": ((lengths or (0, 2 * w - 1))[1], d),
    }  # fmt: skip
    inputs = {n: torch.randn(*s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    inputs["weight"] /= dim**0.5
    mask = torch.ones(batch, words, dtype=torch.bool) if masked else None
    if masked:
        mask[0, words // 2 :] = False
    return inputs, mask


def outputs_and_gradients(backend, case, dtype, device="cpu", rounded_to=torch.float64):
    inputs, mask = inputs_of(case)
    inputs = {n: x.to(rounded_to).to(device, dtype).requires_grad_() for n, x in inputs.items()}
    b, n, dim = inputs["x"].shape
    qkv = torch.nn.functional.linear(inputs["x"], inputs["weight"]).view(b, n, 3, 3, 8)
    words = torch.nn.functional.linear(inputs["words"], inputs["weight"][dim:]).view(b, -1, 2, 3, 8)
    mask = None if mask is None else mask.to(device)
    out = relative_position_attention(qkv, inputs["table_h"], inputs["table_w"], CASES[case][0], words, mask, backend)
    out.backward(torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view_as(out))
    return {"out": out.detach()} | {n: x.grad for n, x in inputs.items() if x.numel()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_formulas_in_fp64(backend, case, dtype, device):
    if backend in FUSED and (reason := why_not(backend, device, dtype)):
        pytest.skip(reason)
    reference = outputs_and_gradients("eager", case, torch.float64, rounded_to=dtype)
    for name, got in outputs_and_gradients(backend, case, dtype, device).items():
        error = (got.double().cpu() - reference[name]).norm() / reference[name].norm()
        assert error <= TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ["chunked", "sdpa"])
def test_pieces_of_any_size_agree(backend, monkeypatch):
    case = "not square, odd words"
    whole = outputs_and_gradients(backend, case, torch.float64)
    for piece, rows in ((1, 1), (100, 1), (2000, 3 * 35 * 2)):
        monkeypatch.setattr(attention_kernels, "CHUNK", piece)
        monkeypatch.setitem(attention._ROWS, "cpu", rows)
        for name, got in outputs_and_gradients(backend, case, torch.float64).items():
            torch.testing.assert_close(got, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("weight", "x"), ("table_h", "table_w"), ("words",)])
def test_what_needs_no_gradient_gets_none(frozen):
    torch.manual_seed(0)
    qkv = torch.randn(2, 16, 3, 2, 8, dtype=torch.float64, requires_grad="x" not in frozen)
    tables = [torch.randn(7, 8, dtype=torch.float64, requires_grad="table_h" not in frozen) for _ in range(2)]
    words = torch.randn(2, 3, 2, 2, 8, dtype=torch.float64, requires_grad="words" not in frozen)
    leaves = [x for x in (qkv, *tables, words) if x.requires_grad]
    grads = [
        torch.autograd.grad(relative_position_attention(qkv, *tables, (4, 4), words, None, b).square().sum(), leaves)
        for b in ("eager", "chunked")
    ]
    for want, got in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("words", [0, 5])
@pytest.mark.parametrize("backend", ["chunked", "sdpa"])
def test_no_more_is_kept_than_inputs_output_and_log_sum_exp(backend, words):
    """Bytes of distinct storages that autograd holds after a whole attention layer, beyond its parameters."""
    b, h, w, dim, heads = 2, 12, 10, 64, 4
    layer = JointAttention(dim, heads, (h, w), backend)
    x, y = torch.randn(b, h, w, dim, requires_grad=True), torch.randn(b, words, dim, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        layer(x, y if words else None)
    for p in layer.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    n = h * w
    allowed = b * (n + words) * dim  # x and words, which the projection needs
    allowed += b * (3 * n + 2 * words) * dim + b * n * dim + b * heads * n  # q, k, v, out, log-sum-exp
    allowed += b * heads * n * (h + w)  # rel_h and rel_w; the tables they come from are smaller
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= 4 * allowed
    assert 4 * b * heads * n * n > 4 * allowed / 2  # a map would have been noticed


@pytest.mark.parametrize("words", [None, 3])
def test_the_operator_is_one_of_torchs(words):
    """Its schema, its shapes on fake tensors and its gradients under compilation, by torch's own check."""
    torch.manual_seed(0)
    qkv, rel = torch.randn(2, 12, 3, 2, 8, requires_grad=True), torch.randn(3, 3, 8, requires_grad=True)
    kv = words and torch.randn(2, words, 2, 2, 8, requires_grad=True)
    mask = words and torch.arange(words).expand(2, -1) < 2
    arguments = (qkv, rel, torch.randn(4, 4, 8, requires_grad=True), kv, mask, "chunked")
    torch.library.opcheck(torch.ops.dit_ds.attention.default, arguments)


def test_the_configuration_knows_every_backend():
    assert get_args(ModelConfig.model_fields["attention"].annotation) == (*BACKENDS, "naive")


@pytest.mark.parametrize(
    "backend", ["xformers", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash3", "flash4", "triton"]
)
def test_a_backend_that_cannot_run_says_why(backend):
    qkv, table = torch.zeros(1, 4, 3, 1, 8), torch.zeros(3, 8)
    with pytest.raises(UserError, match=f"{backend} can't run here: .*CUDA.*'cpu'.*set model.attention auto"):
        relative_position_attention(qkv, table, table, (2, 2), backend=backend)


# ---- triton: what can be shown without a GPU. Nothing here is skipped where triton is missing.


@pytest.fixture(scope="module")
def interpreted():
    """What `triton_worker` found, in Triton's interpreter."""
    command = [sys.executable, str(ROOT / "tests/triton_worker.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", triton_worker.CASES)
def test_triton_interpreted_agrees_with_the_formulas_in_fp64(case, interpreted):
    allowed = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[triton_worker.CASES[case][4]]
    found = interpreted["errors"][case]
    assert len(found) == 4 + (triton_worker.CASES[case][2] > 0)
    assert {n: e for n, e in found.items() if not e <= allowed} == {}


def test_triton_interpreted_agrees_in_windows_with_text_that_is_updated(interpreted):
    assert {n: e for n, e in interpreted["windows"].items() if not e <= 1e-5} == {}


def test_triton_interpreted_gives_the_same_bits_each_time(interpreted):
    assert set(interpreted["repeated"].values()) == {True}


def test_triton_interpreted_agrees_with_every_tile(interpreted):
    assert {n: e for n, e in interpreted["every tile"].items() if not e <= 2e-3} == {}
    assert len(set(interpreted["every tile"].values())) > 1  # they do compute in another order


def test_triton_keeps_for_backward_what_the_other_kernels_keep(interpreted):
    assert interpreted["kept"]["triton"] == interpreted["kept"]["chunked"] > 0


def test_triton_is_an_operator_of_torchs(interpreted):
    assert interpreted["checked"]


def test_triton_refuses_what_its_kernels_have_not():
    with pytest.raises(UserError, match="at most 64 columns, and this has 65: set model.attention auto"):
        attention_triton.refuse_grid((3, 65))
    assert "no float64" in attention_triton.refusal("cuda", torch.float64)


def recorded():
    return json.loads((ROOT / "benchmarks/results/triton_aot.json").read_text())


def test_triton_compiled_for_every_gpu_is_as_recorded():
    """The table holds exactly what the code may run now, from this source, and all of it fits."""
    table = recorded()
    assert table["source"] == triton_aot.digest(), "the kernels changed: python benchmarks/triton_aot.py"
    assert [r["name"] for r in table["rows"]] == [c.name for c in triton_aot.configurations()]
    assert {r["name"]: triton_aot.wrong(r) for r in table["rows"] if triton_aot.wrong(r)} == {}
    assert triton_aot.summary(table["rows"]).items() <= table.items()
    assert table["spills"] == 0 and table["max_registers"] <= 255


@pytest.mark.parametrize("gpu", triton_aot.GPUS)
def test_triton_compiles_ahead_of_time(gpu, tmp_path, monkeypatch):
    """The kernel that needs the most registers, at ViT-H and 512 px."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wanted = ("bfloat16", 80, (32, 32), "queries")
    c = next(c for c in triton_aot.configurations() if c.gpu == gpu and c[1:5] == wanted)
    found = triton_aot.compiled(c)
    assert triton_aot.wrong(found) is None, found
    assert found["registers"] > 64 and found["shared"] > 16 << 10  # it is the kernel that was compiled


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gpu", triton_aot.GPUS)
def test_triton_compiles_ahead_of_time_in_every_configuration(gpu, dtype, tmp_path):
    command = [sys.executable, "benchmarks/triton_aot.py", "--json", "--gpu", gpu, "--dtype", dtype, "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["spills"] == 0 and found["max_registers"] <= 255 and found["wrong"] == []
    assert found["max_shared"] <= triton_aot.GPUS[gpu].shared
    assert found["configurations"] == sum(c[:2] == (gpu, dtype) for c in triton_aot.configurations())
