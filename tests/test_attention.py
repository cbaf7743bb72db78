"""Attention: every backend against SAM's formulas in fp64; what it keeps for the backward pass."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything
from dit_ds.config.schema import ModelConfig
from dit_ds.errors import UserError
from dit_ds.models import attention, attention_kernels
from dit_ds.models.attention import BACKENDS, relative_position_attention
from dit_ds.models.attention_kernels import KERNELS, why_not
from dit_ds.models.image_encoder import JointAttention

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
    if backend in KERNELS and (reason := why_not(backend, device, dtype)):
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


@pytest.mark.parametrize("backend", ["xformers", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
def test_a_backend_that_cannot_run_says_why(backend):
    qkv, table = torch.zeros(1, 4, 3, 1, 8), torch.zeros(3, 8)
    with pytest.raises(UserError, match=f"{backend} can't run here: .*CUDA.*'cpu'.*set model.attention auto"):
        relative_position_attention(qkv, table, table, (2, 2), backend=backend)
