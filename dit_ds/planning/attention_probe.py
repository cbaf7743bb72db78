"""The fastest attention kernel at a run's own shapes, by measurement, remembered in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_ds.distributed import World, gather_objects
from dit_ds.errors import UserError
from dit_ds.files import read_json, sha256_of, write_json
from dit_ds.models import attention_triton
from dit_ds.models.attention import relative_position_attention
from dit_ds.models.attention_kernels import why_not
from dit_ds.models.image_encoder import ImageEncoder, JointBlock

# by the value of `model.attention`
CANDIDATES: dict[str, tuple[str, ...]] = {
    "auto": ("triton", "flash3", "flash4", "xformers", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient"),
    "sdpa": ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient"),
    "triton": ("triton",),
}
_ROUNDS = 10
# relative, of the output and of each gradient, to fp32 arithmetic: a kernel that is farther off is wrong
_TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PACKAGES = ("torch", "triton", "xformers", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


class Shape(NamedTuple):
    """What a layer attends over: grid (H, W), heads, their width, samples (windows count as such), text tokens."""

    grid: tuple[int, int]
    heads: int
    d: int
    batch: int
    words: int

    def __str__(self) -> str:
        h, w = self.grid
        return f"{h} x {w} and {self.words} words, {self.heads} heads of {self.d}, {self.batch} at once"


class Choice(NamedTuple):
    """The decision for one shape.

    Attributes:
        kernel: a value of `model.attention`.
        tiles: `attention_triton.Tile` of each of its kernels, where triton was measured.
        milliseconds: forward and backward of each kernel that was measured.
        left_out: why the others were not.
    """

    kernel: str
    tiles: dict[str, list[int]]
    milliseconds: dict[str, float]
    left_out: dict[str, str]


def choose_kernels(
    encoder: Any, requested: str, words: int, micro_batch: int, dtype: torch.dtype, world: World
) -> list[str]:
    """Set the kernel of each layer to the fastest of those that run on every rank, measured on rank 0. Collective.

    Does nothing on a CPU, and where `model.attention` names a kernel without variants.

    Args:
        encoder: the model's image encoder.
        requested: `model.attention`.
        words: text tokens that a layer reads.
        micro_batch: samples of a rank at once.
        dtype: of queries, keys and values.
    Returns:
        Lines for the log.
    Raises:
        UserError: the only kernel requested gives wrong results here.
    """
    if world.device.type != "cuda" or requested not in CANDIDATES or not isinstance(encoder, ImageEncoder):
        return []
    runs = {k for k in CANDIDATES[requested] if why_not(k, world.device.type, dtype) is None}
    everywhere = set.intersection(*gather_objects(runs))
    kernels = [k for k in CANDIDATES[requested] if k in everywhere]
    if not kernels or dtype not in _TOLERANCE:
        return []
    layers: dict[Shape, list[JointBlock]] = {}
    for block in (b for b in encoder.blocks if isinstance(b, JointBlock)):
        layers.setdefault(_shape(block, encoder.grid, words, micro_batch), []).append(block)
    return decide(layers, requested, kernels, dtype, world)


def _shape(block: JointBlock, grid: tuple[int, int], words: int, batch: int) -> Shape:
    if block.window_size:
        batch *= (-(-grid[0] // block.window_size)) * (-(-grid[1] // block.window_size))
        grid = (block.window_size, block.window_size)
    return Shape(grid, block.attn.num_heads, block.attn.rel_pos_h.shape[1], batch, words)


def decide(
    layers: dict[Shape, list[JointBlock]], requested: str, kernels: list[str], dtype: torch.dtype, world: World
) -> list[str]:
    """As `choose_kernels`, for layers by their shape and kernels that run."""
    choices: dict[Shape, Choice] = {}
    lines: list[str] = []
    if world.main:
        device = torch.device(world.device)
        for shape in layers:
            choices[shape], remembered = fastest(shape, kernels, dtype, device)
            lines.append(_described(shape, choices[shape], dtype) + (" (remembered)" if remembered else ""))
    choices, lines = gather_objects((choices, lines))[0]
    for shape, blocks in layers.items():
        choice = choices[shape]
        if not choice.kernel:
            reasons = "; ".join(f"{k}: {why}" for k, why in choice.left_out.items())
            raise UserError(f"model.attention {requested} can't be used here ({reasons}): set model.attention eager")
        for kind, tile in choice.tiles.items():
            attention_triton.choose(kind, _problem(shape, dtype, world.device), attention_triton.Tile(*tile))
        for block in blocks:
            block.attn.backend = choice.kernel
    return lines


def _described(shape: Shape, choice: Choice, dtype: torch.dtype) -> str:
    times = ", ".join(f"{k} {ms:.2f} ms" for k, ms in sorted(choice.milliseconds.items(), key=lambda x: x[1]))
    left_out = "".join(f"; not {k}: {why}" for k, why in choice.left_out.items())
    kind = str(dtype).removeprefix("torch.")
    return (
        f"attention over {shape}, {kind}: {choice.kernel or 'none'}; forward and backward {times or 'none'}{left_out}"
    )


def cache_file() -> Path:
    """Where choices are remembered: in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_ds" / "attention.json"


def fastest(shape: Shape, kernels: list[str], dtype: torch.dtype, device: torch.device) -> tuple[Choice, bool]:
    """The choice for a shape, and whether it was remembered."""
    key, path = _key(shape, kernels, dtype, device), cache_file()
    remembered = _remembered(path)
    if key in remembered:
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # written by something else
            return _checked(Choice(**remembered[key])), True
    choice = _measured(shape, kernels, dtype, device)
    with contextlib.suppress(UserError, OSError):  # a home that can't be written: measured again next time
        write_json(path, _remembered(path) | {key: choice._asdict()})
    return choice, False


def _checked(choice: Choice) -> Choice:
    tiles = [attention_triton.Tile(*t) for t in choice.tiles.values()]
    if choice.kernel and choice.kernel not in choice.milliseconds or any(n < 1 for t in tiles for n in t):
        raise ValueError(f"not a choice: {choice}")
    return choice


def _remembered(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, "attention kernels that were measured")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _key(shape: Shape, kernels: list[str], dtype: torch.dtype, device: torch.device) -> str:
    """GPU, type, shape, and the versions of whatever has kernels."""
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    ours = sha256_of(Path(attention_triton.__file__).with_name("triton_kernels.py"))[:12]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return json.dumps([gpu, str(dtype), shape, kernels, versions, torch.version.cuda, ours])


def _problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> attention_triton.Problem:
    capability = attention_triton.capability(device)
    return attention_triton.Problem(
        shape.grid, shape.heads, shape.d, shape.words, masked=True, dtype=dtype, capability=capability
    )


class Layer:
    """One layer's attention on random tensors; half of the text is padding."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        g = torch.Generator().manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=g) * scale).to(device, dtype).requires_grad_()

        (h, w), heads, d, batch, words = shape
        self.shape, n = shape, h * w
        self.leaves = [random(batch, n, 3, heads, d), *(random(2 * s - 1, d, scale=0.1) for s in (h, w))]
        if words:
            self.leaves.append(random(batch, words, 2, heads, d))
        self.mask = torch.arange(words, device=device).expand(batch, -1) < max(1, words // 2) if words else None
        self.grad = torch.randn(batch, n, heads, d, generator=g).to(device, dtype)

    def forward(
        self, kernel: str, dtype: torch.dtype | None = None, samples: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output and what it was computed from, with all samples or some, in the layer's type or another."""
        qkv, table_h, table_w, *text = self.leaves
        inputs = [x[:samples] if x.ndim == 5 else x for x in (qkv, table_h, table_w, *text)]
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        mask = None if self.mask is None else self.mask[:samples]
        text_kv = inputs[3] if text else None
        out = relative_position_attention(
            inputs[0], inputs[1], inputs[2], self.shape.grid, text_kv, text_mask=mask, backend=kernel
        )
        return out, inputs

    def step(self, kernel: str, dtype: torch.dtype | None = None, samples: int | None = None) -> list[Tensor]:
        """Output and gradients."""
        out, inputs = self.forward(kernel, dtype, samples)
        grads = torch.autograd.grad(out, inputs, self.grad[:samples].to(out.dtype))
        return [out.detach(), *grads]

    def milliseconds(self, kernel: str) -> float:
        """The median of a few forward and backward passes, after two that warm up."""
        times = []
        for i in range(_ROUNDS + 2):
            _synchronize(self.grad.device)
            start = time.perf_counter()
            self.step(kernel)
            _synchronize(self.grad.device)
            if i > 1:
                times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """By norms."""
    return float((got.float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measured(shape: Shape, kernels: list[str], dtype: torch.dtype, device: torch.device) -> Choice:
    layer, found, left_out = Layer(shape, dtype, device), {}, {}
    tiles: dict[str, list[int]] = {}
    exact = layer.step("chunked", torch.float32, samples=1)
    for kernel in kernels:
        try:
            if kernel == "triton":
                tiles = {kind: list(tile) for kind, tile in _tuned(layer, dtype, device)}
            error = max(relative_error(x, y) for x, y in zip(layer.step(kernel, samples=1), exact))
            if not error <= _TOLERANCE[dtype]:
                left_out[kernel] = f"its result is off by {error:.1g}"
                continue
            found[kernel] = layer.milliseconds(kernel)
        except Exception as e:  # whatever a kernel or its compiler raises at this shape: another is taken
            left_out[kernel] = (str(e).strip().splitlines() or [type(e).__name__])[0][:150]
    del layer, exact
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Choice(min(found, key=lambda k: found[k]) if found else "", tiles, found, left_out)


def _tuned(layer: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, attention_triton.Tile]]:
    """The fastest tile of each kernel, one kernel after the other; they stay chosen."""
    problem = _problem(layer.shape, dtype, device)
    for kind in attention_triton.KINDS:
        times = {}
        for tile in attention_triton.tiles(kind, problem):
            attention_triton.choose(kind, problem, tile)
            times[tile] = layer.milliseconds("triton")
        best = min(times, key=lambda t: times[t])
        attention_triton.choose(kind, problem, best)
        yield kind, best
