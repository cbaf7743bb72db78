"""Lets `import torchvision` succeed beside a CPU build of torch.

PyPI's torchvision is a CUDA build; where its extension cannot load, the import dies on two operators that torch has
never heard of. Declaring them is enough: nothing here calls them. Where torchvision is whole this does nothing.
"""

from __future__ import annotations

import importlib.util

import torch

_keep: list[torch.library.Library] = []  # a library's definitions go when it does


def _declare_missing_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.cuda.is_available() or torch.version.cuda:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)


_declare_missing_operators()
