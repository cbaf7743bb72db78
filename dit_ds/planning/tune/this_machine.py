"""This machine's GPU and the attention kernels that run on it, looked up in a subprocess.

The subprocess's CUDA context is gone before trials need the GPU's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from dit_ds.errors import RunFailed
from dit_ds.models.attention_kernels import FUSED, why_not
from dit_ds.processes import die_with_parent


def gpu() -> tuple[str, float] | None:
    """Name and bytes of this machine's first GPU; None without one."""
    found = _probe("bfloat16")
    return (found["name"], found["memory"]) if found["name"] else None


def missing_kernels(kernels: list[str], dtype: torch.dtype) -> list[str]:
    """Those of the values of `model.attention` that do not run on this machine in that type."""
    return _probe(str(dtype).removeprefix("torch."), *kernels)["missing"]


def _probe(*arguments: str) -> dict[str, Any]:
    """What `_main` prints.

    Raises:
        RunFailed: the subprocess failed.
    """
    command = [sys.executable, "-m", "dit_ds.planning.tune.this_machine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=die_with_parent)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RunFailed(f"this machine's GPU and attention kernels can't be looked up: {error}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(dtype: str, *kernels: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = [k for k in kernels if k in FUSED and why_not(k, device, getattr(torch, dtype))]
    name, memory = "", 0
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    print(json.dumps({"name": name, "memory": memory, "missing": missing}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
