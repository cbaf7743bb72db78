"""Lets `segment_anything.modeling` be imported quickly, and `torchvision` beside a CPU build of torch.

`dit_ds.models` imports this module before all others.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_keep: list[torch.library.Library] = []  # definitions are removed with their library object


def _declare_missing_operators() -> None:
    """PyPI's torchvision is a CUDA build: where its extension cannot load, its import fails on two operators that torch
    does not know. Declaring them is enough, as nothing here calls them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.cuda.is_available() or torch.version.cuda:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)


def _import_modeling() -> None:
    """Import SAM's modules without their package's `__init__`, whose predictor imports torchvision with all its models
    and torch's compiler: two seconds of CPU for what is not used here. Later imports of the package run it as usual."""
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.name in sys.modules:
        return
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # not executed
    try:
        importlib.import_module("segment_anything.modeling")
    finally:
        del sys.modules[spec.name]


_declare_missing_operators()
_import_modeling()
