"""What `test_autocast` compares, in a process of its own, where a fake GPU may be registered. Prints one JSON object.

python tests/autocast_worker.py models       operators that our models call: what autocast does on fake CUDA and on ours
python tests/autocast_worker.py listed       the same of the operators on autocast's lists
python tests/autocast_worker.py planted      the same with `exp` on the wrong list
python tests/autocast_worker.py cached       casts of weights used more than once, on the fake GPU and on the CPU
python tests/autocast_worker.py peaks        peaks under autocast, on the fake GPU and on the CPU
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from autocast_calls import CALLS, Floats, Ints  # noqa: E402
from memory_worker import configuration  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from dit_ds.config.load import validate  # noqa: E402
from dit_ds.models.build import build_model  # noqa: E402
from dit_ds.planning.memory import autocast, fake_cluster  # noqa: E402
from dit_ds.planning.memory.fake_cluster import fake_tensors  # noqa: E402
from dit_ds.planning.memory.live_tensors import LiveTensors  # noqa: E402
from dit_ds.planning.memory.profiled_step import fake_batch  # noqa: E402

LOW = (torch.float16, torch.bfloat16)
MIXES = ("fp32", "low", "first fp32", "first low", "other low")
NEEDS_VALUES = (torch.ops.aten.is_nonzero.default,)
_MISSING = ("not linked with support for cuda", "not compiled with CUDA")  # fake CUDA without CUDA, in a few operators
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

Call = tuple[Any, tuple, dict[str, Any]]


class TensorOf(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Any) -> Any:
        return cls(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def is_spec(x: Any) -> bool:
    return isinstance(x, TensorOf)


class Calls(TorchDispatchMode):
    """The operators called in inference mode, where those made of others arrive whole, each with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, tuple, dict[str, Any]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = tree_map(TensorOf.of, (args, kwargs))
        ranks = [(len(x.shape), x.dtype) if is_spec(x) else type(x) for x in tree_leaves(call, is_leaf=is_spec)]
        self.found.setdefault((func, *ranks), (func, *call))
        return func(*args, **kwargs)


def models() -> Iterator[tuple[nn.Module, tuple[dict[str, Tensor], Tensor, Tensor]]]:
    """A tiny model of each kind in training mode, with a batch."""
    kinds: list[dict[str, Any]] = [
        {"scheme": s}
        for s in ("default", "end_to_end", "layer_wise", "cascade", "cross_attention", "cross_attention_ffn")
    ]
    kinds += [{"scheme": "layer_wise", "attention": "eager"}, {"scheme": "layer_wise", "attention": "naive"}]
    kinds += [{"scheme": "layer_wise", "window_size": 14, "static_tokens": 2, "word_dropout": 0.1}]
    kinds += [{"name": n, "size": "swin_t_tiny", "attention": a} for n in ("lavt", "rela") for a in ("sdpa", "eager")]
    with tempfile.TemporaryDirectory() as folder:
        base = configuration(folder, precision="fp32").model_dump(mode="json", exclude_unset=True)
        for kind in kinds:
            config = validate(base | {"model": {"size": "vit_t", "attention": "chunked"} | kind})
            yield build_model(config).train(), fake_batch(2, config.data.image_size, config.data.tokens)


def called_by_models() -> list[Call]:
    calls = Calls()
    for model, (inputs, mask, weight) in models():
        with torch.inference_mode(), calls:
            model.loss(model(**inputs), mask, weight)
    return [c for c in calls.found.values() if c[0] not in NEEDS_VALUES]


def listed() -> list[Call]:
    """A call of each operator on autocast's lists."""

    def spec(x: Any) -> Any:
        return TensorOf(tuple(x), torch.long if isinstance(x, Ints) else torch.float32) if isinstance(x, Floats) else x

    calls = []
    for name, args in CALLS.items():
        by_name = args[-1] if isinstance(args[-1], dict) else {}
        positional = tuple(a for a in args if a is not by_name)
        call = tree_map(spec, (positional, by_name), is_leaf=lambda x: isinstance(x, Floats))
        calls.append((autocast._overload(name), *call))
    return calls


class Casts(TorchDispatchMode):
    """The casts below autocast: (type, shape) of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            self.seen.append((str(out.dtype), list(out.shape)))
        return out


@contextlib.contextmanager
def autocast_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """As `torch.autocast`, which refuses CUDA where there is none."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


def types_of(mix: str, low: torch.dtype) -> Iterator[torch.dtype]:
    """Types of the tensors of floating point of a call, in their order."""
    others = {"first fp32": low, "first low": torch.float32}
    first = {"fp32": torch.float32, "first fp32": torch.float32, "other low": LOW[1 - LOW.index(low)]}.get(mix, low)
    return itertools.chain([first], itertools.repeat(others.get(mix, first)))


def behaviour(device: str, call: Call, mix: str, low: torch.dtype) -> dict[str, Any]:
    """What an operator does under autocast: the types of its outputs, or that it fails, and the casts before."""
    func, args, kwargs = call
    types = types_of(mix, low)

    def make(x: Any) -> Any:
        if is_spec(x):
            dtype = next(types) if x.dtype.is_floating_point else x.dtype
            return torch.empty(x.shape, dtype=dtype, device=torch.device(device, 0))
        return torch.device(device, 0) if isinstance(x, torch.device) else x

    args, kwargs = tree_map(make, (args, kwargs), is_leaf=is_spec)
    if func is _ATTENTION:
        func = nn.functional.scaled_dot_product_attention  # which is replaced on the fake GPU
    with Casts() as casts, autocast_on(device, low):
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, AssertionError) as e:
            missing = any(m in str(e) for m in _MISSING)
            return {"out": "unknown" if missing else "refused", "casts": casts.seen}
    return {"out": [str(x.dtype) for x in tree_leaves(out) if isinstance(x, Tensor)], "casts": casts.seen}


def differ(call: Call, theirs: dict[str, Any], ours: dict[str, Any], low: torch.dtype) -> bool:
    casts = [x["casts"] for x in (theirs, ours)]
    if call[0] is _ATTENTION:  # fake CUDA has none but the kernel that casts once more: compare what comes before
        casts = [list(itertools.takewhile(lambda c: c[0] == str(low), x)) for x in casts]
    return casts[0] != casts[1] or (theirs["out"] != "unknown" and theirs["out"] != ours["out"])


def compared(calls: list[Call]) -> dict[str, Any]:
    """Where fake CUDA and the fake GPU differ, and how much was compared."""
    cases = [(call, low, mix) for call in calls for low in LOW for mix in MIXES]
    # our own operators are given tensors of one type, whatever autocast does
    cases = [c for c in cases if c[0][0].namespace == "aten" or not c[2].startswith("first")]
    with torch.no_grad():
        with FakeTensorMode():
            theirs = [behaviour("cuda", call, mix, low) for call, low, mix in cases]
        gpu = fake_cluster._gpu()
        with fake_tensors(LiveTensors()):
            ours = [behaviour(gpu, call, mix, low) for call, low, mix in cases]
    results = [(str(call[0]), str(low), mix, a, b) for (call, low, mix), a, b in zip(cases, theirs, ours)
               if differ(call, a, b, low)]  # fmt: skip
    outcomes: dict[str, set[str]] = {}
    for (call, _, _), a in zip(cases, theirs):
        outcomes.setdefault(str(call[0]), set()).add(a["out"] if isinstance(a["out"], str) else "known")
    return {
        "differences": results,
        "operators": sorted(outcomes),
        "without_output": sorted(name for name, found in outcomes.items() if "known" not in found),
        "casts": sum(len(a["casts"]) for a in theirs),
    }


def weights_cast(device: str) -> dict[str, list[Any]]:
    """The casts of a weight and what is like one, used twice each, under different conditions."""
    linear, found = nn.functional.linear, {}
    x, w = torch.zeros(2, 4, device=device), nn.Parameter(torch.zeros(4, 4, device=device))
    kinds = {
        "weight": w, "frozen": torch.zeros(4, 4, device=device), "view": w.narrow(0, 0, 2), "detached": w.detach(),
        "leaf that is a view": w.detach().view(4, 4).requires_grad_(), "made of it": w * 1,
        "fp16": nn.Parameter(w.detach().half()), "fp64": nn.Parameter(w.detach().double()),
    }  # fmt: skip
    for name, weight in kinds.items():
        with Casts() as casts, autocast_on(device, torch.bfloat16):
            a = x.double() if name == "fp64" else x
            linear(a, weight), linear(a, weight)
        found[name] = casts.seen
    with Casts() as casts, autocast_on(device, torch.bfloat16):
        torch.set_autocast_cache_enabled(False)
        linear(x, w), linear(x, w)
        torch.set_autocast_cache_enabled(True)
        linear(x, w), linear(x, w)
        torch.clear_autocast_cache()
        linear(x, w)
        torch.set_autocast_dtype(device, torch.float16)
        linear(x, w.detach()), linear(x.half(), nn.Parameter(w.detach()))
    found["not cached, cached, cleared"] = casts.seen
    with Casts() as casts, autocast_on(device, torch.bfloat16):
        linear(x, w)
        with torch.inference_mode():
            linear(x, w), linear(x, w)
        with torch.no_grad():
            linear(x, w)
    found["in inference mode"] = casts.seen
    return found


def cached() -> dict[str, Any]:
    gpu = fake_cluster._gpu()
    with fake_tensors(LiveTensors()):
        ours = weights_cast(gpu)
    return {"theirs": weights_cast("cpu"), "ours": ours}


def peak(device: str, live: LiveTensors, mode: str, cache: bool) -> tuple[int, int, bool]:
    """Eight layers used three times each. Returns the bytes at the peak and at the end above those at the start, and
    whether the first layer got a gradient though it was first used without."""
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).to(device)
    x = torch.ones(8, 1024, device=device)
    start = live.peak = live.now
    grad = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with grad(), torch.autocast(device, torch.bfloat16, cache_enabled=cache):
        with torch.no_grad():
            layers[0](x)
        with torch.autocast(device, torch.bfloat16):
            layers(x)  # whose end is not that of the outermost
        with torch.autocast(device, enabled=False):
            layers[1](x)
        y = layers(layers(x)).float().sum()
    if mode == "train":
        y.backward()
    del y
    return live.peak - start, live.now - start, layers[0].weight.grad is not None


def peaks() -> dict[str, Any]:
    gpu, found = fake_cluster._gpu(), {}
    for mode, cache in itertools.product(("train", "no_grad", "inference"), (True, False)):
        with fake_tensors(LiveTensors()) as live:
            ours = peak(gpu, live, mode, cache)
        with LiveTensors() as live:
            found[f"{mode} {cache}"] = (peak("cpu", live, mode, cache), ours)
    return found


def planted() -> dict[str, Any]:
    autocast.FP32 = tuple(name for name in autocast.FP32 if name != "exp")
    autocast.LOW_PRECISION += ("exp",)
    return compared([c for c in listed() if str(c[0]) in ("aten.exp.default", "aten.log.default")])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL + 1)  # of operators that refuse a mix
    answers: dict[str, Callable[[], Any]] = {
        "models": lambda: compared(called_by_models()), "listed": lambda: compared(listed()), "planted": planted,
        "cached": cached, "peaks": peaks,
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        answer = answers[sys.argv[1]]()
    print(json.dumps(answer))
