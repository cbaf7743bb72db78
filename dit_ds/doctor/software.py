"""Checks of the installed software, by running it."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dit_ds.distributed import pick_device
from dit_ds.doctor.check import Check, Context
from dit_ds.engine import engine
from dit_ds.files import GIB
from dit_ds.models.attention import best_backend, relative_position_attention
from dit_ds.models.attention_kernels import FUSED, why_not

_DEEPSPEED = (0, 19, 3)  # older ones fail on activation checkpointing with frozen parts under ZeRO-3


def versions(c: Context) -> Iterator[Check]:
    """Versions of Python, torch, DeepSpeed, xformers, transformers, CUDA and the driver."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "xformers", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    c.facts["versions"] = found
    driver = Path("/proc/driver/nvidia/version")
    number = re.search(r"\s(\d+\.\d+[.\d]*)\s", driver.read_text()) if driver.exists() else None
    text = ", ".join(f"{k} {v or 'none'}" for k, v in found.items())
    text += f", CUDA of torch {torch.version.cuda or 'none'}, driver {number[1] if number else 'none'}"
    if tuple(int(n) for n in re.findall(r"\d+", found["deepspeed"] or "0")[:3]) < _DEEPSPEED:
        yield Check("versions", "fail", text, f"pip install 'deepspeed>={'.'.join(map(str, _DEEPSPEED))}'")
    else:
        yield Check("versions", "ok", text)


def gpu(c: Context) -> Iterator[Check]:
    """This rank's GPU, and whether another process uses it."""
    with warnings.catch_warnings(record=True) as caught:  # why CUDA can't start, if it can't
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    c.facts["device"] = "cuda" if there else "cpu"
    if not there:
        why = f" ({str(caught[0].message).splitlines()[0][:120]})" if caught else ""
        remedy = "start it on a node with GPUs (sbatch --gpus-per-node)"
        if any(Path("/dev").glob("nvidia[0-9]*")):
            remedy = "run nvidia-smi" if torch.version.cuda else "install a build of torch for CUDA"
        yield Check("gpu", "warn", f"none that torch can use{why}: training will be slow", remedy)
        return
    device = pick_device(c.local_rank)
    p = torch.cuda.get_device_properties(device)
    c.facts["gpu"] = str(getattr(p, "uuid", device.index))
    free, total = (x / GIB for x in torch.cuda.mem_get_info(device))
    text = (
        f"{p.name}, compute capability {p.major}.{p.minor}, {torch.cuda.device_count()} visible here, "
        f"{free:.0f} of {total:.0f} GiB free"
    )
    if total - free > 2 + torch.cuda.memory_reserved(device) / GIB:  # CUDA's context is about half a GiB
        yield Check("gpu", "warn", text + ": another process uses it", "nvidia-smi names it")
    else:
        yield Check("gpu", "ok", text)


def attention(c: Context) -> Iterator[Check]:
    """Which attention backends run on this device."""
    device, dtype = pick_device(c.local_rank).type, c.model_dtype
    reasons: dict[str, list[str]] = {}
    runs = []
    for name in ("eager", *FUSED):
        reason = _eager_fails(device, dtype) if name == "eager" else why_not(name, device, dtype)
        if reason:
            reasons.setdefault(reason, []).append(name)
        else:
            runs.append(name)
    kind = str(dtype).removeprefix("torch.")
    text = "; ".join(
        [f"{', '.join(runs) or 'none'} in {kind}", *(f"not {', '.join(v)} ({k})" for k, v in reasons.items())]
    )
    forced = c.config.model.attention if c.config else "auto"
    if not runs or (forced != "auto" and forced not in runs):
        wanted = "no backend runs" if not runs else f"model.attention {forced} can't run"
        yield Check("attention", "fail", f"{wanted}: {text}", "set model.attention auto" if runs else "reinstall torch")
    else:
        takes = best_backend(device, dtype, (c.config.data.image_size // 16) ** 2 if c.config else 1024)
        yield Check("attention", "ok", f"{text}; {forced} takes {takes}" if forced == "auto" else text)


def _eager_fails(device: str, dtype: torch.dtype) -> str | None:
    try:
        qkv = torch.zeros(1, 16, 3, 2, 16, device=device, dtype=dtype, requires_grad=True)
        table = torch.zeros(7, 16, device=device, dtype=dtype)
        relative_position_attention(qkv, table, table, (4, 4), backend="eager").sum().backward()
        return None
    except (RuntimeError, NotImplementedError) as e:
        return str(e).splitlines()[0][:200]


def arithmetic(c: Context) -> Iterator[Check]:
    """Adam's fused step and a bf16 matrix product."""
    device = pick_device(c.local_rank)
    weight = torch.nn.Parameter(torch.ones(64, device=device))
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.5, fused=True).step()
    right = torch.allclose(weight, torch.full_like(weight, 0.5), atol=1e-4)
    yield Check("fused adam", "ok" if right else "fail", f"a step on {device.type}" + ": wrong result" * (not right),
                "" if right else "reinstall torch for this machine")  # fmt: skip
    ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    right = bool(((ones @ ones) == 64).all())
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if slow:
        remedy = "--deepspeed.precision fp16"
        yield Check("bf16", "warn", "emulated on this GPU: slow", remedy)
    else:
        yield Check("bf16", "ok" if right else "fail", "a matrix product" + ": wrong result" * (not right),
                    "" if right else "--deepspeed.precision fp32")  # fmt: skip


def deepspeed(c: Context) -> Iterator[Check]:
    """The import, and what is called of it."""
    ds = engine.import_deepspeed()
    absent = [n for n in ("initialize", "init_distributed", "zero.GatheredParameters") if not _has(ds, n)]
    if absent:
        yield Check("deepspeed", "fail", f"{ds.__version__} has no {', '.join(absent)}", "pip install -U deepspeed")
        return
    yield Check("deepspeed", "ok", f"{ds.__version__} imports")


def _has(module: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module is not None
