"""Tensors of the files that weights come in: safetensors, PyTorch's, sharded ones, folders of `transformers`.

A file is data. Of a pickle, PyTorch's own tensors, numpy's arrays of numbers and dictionaries are read; an object of any
other class, as an `argparse.Namespace` beside the weights, becomes an inert stand-in, whose class is neither imported nor
run.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dit_ds.errors import UserError
from dit_ds.files import check_name, read_json

_IN_FOLDERS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_DEEPEST = 8  # dictionaries in dictionaries that are looked into


def read_tensors(path: str | Path, values: bool = True) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name; those of dictionaries in dictionaries by their keys, joined by dots.

    Args:
        path: a .safetensors file, one of `torch.save`, a pickle of numpy arrays, the index.json of a sharded one, or a folder that `transformers`
            saved.
        values: False reads names, shapes and dtypes where the format allows it; the tensors are then on `meta`.
    Raises:
        UserError: no such file, it is damaged, or it holds no tensors by name.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(Path(path)):
        content = _read(file, values)
        if isinstance(content, Tensor):
            raise UserError(f"{path} holds a bare tensor, {tuple(content.shape)}: {_GIVE}")
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name: {_GIVE}")
        found = _flat(content)
        if not found and type(content) not in (dict, OrderedDict):  # as of torch.save(model)
            raise UserError(f"{path} holds an object of the class {type(content).__name__!r}: save its state_dict()")
        tensors |= found
    if not tensors:
        raise UserError(f"{path} holds no tensor: {_GIVE}")
    return tensors


def load_by_name(model: nn.Module, path: str | Path) -> dict[str, list[str]]:
    """Load all of a model, as `dit-ds export` wrote it.

    Returns:
        `loaded`, `missing` (none) and `unexpected` (in the file only) tensor names.
    Raises:
        UserError: as of `read_tensors`, or the file is of another model.
    """
    state, target = read_tensors(path), model.state_dict()
    wrong = [n for n in target if n not in state or state[n].shape != target[n].shape]
    if wrong:
        have = tuple(state[wrong[0]].shape) if wrong[0] in state else "absent"
        raise UserError(
            f"{path} is of another model: {len(wrong)} of its {len(target)} tensors are absent or of another shape "
            f"({wrong[0]} is {have}, here {tuple(target[wrong[0]].shape)}): use its own model.* and text.* keys"
        )
    model.load_state_dict({n: state[n] for n in target})
    return {"loaded": sorted(target), "missing": [], "unexpected": sorted(state.keys() - target.keys())}


_GIVE = "give an official sam_vit_*.pth or a SamModel of transformers"


def _files(path: Path) -> list[Path]:
    """The files that a path stands for: several of a sharded checkpoint."""
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise UserError(
                f"the folder {path} holds no {_IN_FOLDERS[0]} and no {_IN_FOLDERS[2]}: give a folder that transformers "
                "saved, or a file; of a run, the file that dit-ds export writes"
            )
        path = found[0]
    if not path.name.endswith(".index.json"):
        return [path]
    index = read_json(path, "index of shards")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path} has no weight_map, so it is no index of shards: {_GIVE}")
    return [path.parent / name for name in sorted({check_name(name, path) for name in shards.values()})]


def _read(path: Path, values: bool) -> Any:
    try:
        return _read_safetensors(path, values) if path.suffix == ".safetensors" else _read_pickle(path, values)
    except FileNotFoundError:
        raise UserError(f"no file {path}; of SAM, download sam_vit_b_01ec64.pth or its larger kin") from None
    except PermissionError:
        raise UserError(f"cannot read {path} (permission denied): ask its owner for chmod a+r") from None
    except Exception as e:  # of a damaged file torch.load raises many kinds
        if path.is_file() and zipfile.is_zipfile(path) and _is_torchscript(path):
            raise UserError(f"{path} is a TorchScript archive, a program: save the model's state_dict()") from None
        if path.is_file() and path.open("rb").read(11) == b"version htt":
            raise UserError(f"{path} is Git LFS's pointer to a file, not the file: git lfs pull") from None
        raise UserError(f"{path} is not a readable SAM checkpoint ({type(e).__name__}): download it again") from None


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_safetensors(path: Path, values: bool) -> dict[str, Tensor]:
    with safe_open(path, "pt") as f:
        if values:
            return {name: f.get_tensor(name) for name in f.keys()}
        parts = {name: f.get_slice(name) for name in f.keys()}
        return {n: torch.empty(x.get_shape(), dtype=_dtype(x.get_dtype()), device="meta") for n, x in parts.items()}


def _dtype(name: str) -> torch.dtype:
    """Of safetensors' names, those of floating point; bytes for any other."""
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(name, torch.uint8)


def _read_pickle(path: Path, values: bool) -> Any:
    zipped = zipfile.is_zipfile(path)  # else the format before PyTorch 1.6, which can't be read in part
    if not zipped and path.is_file() and isinstance(content := _plain_pickle(path), dict):
        return content
    options: dict[str, Any] = (
        {"map_location": "cpu"} if values or not zipped else {"map_location": "meta", "mmap": True}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError:  # a class that PyTorch does not read; the file is opened anew
            return torch.load(path, weights_only=False, pickle_module=_InertPickle, **options)


def _plain_pickle(path: Path) -> Any:
    """What a pickle holds that `torch.save` did not write; of one that it wrote before PyTorch 1.6 a number."""
    with open(path, "rb") as f:
        try:
            return _InertUnpickler(f).load()
        except Exception:  # not a pickle; it is read as PyTorch's own, whose reader says what is wrong
            return None


class _NumpyDtype:
    """Stands for a dtype of numpy's in a pickle."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def tensor(self, shape: Any, data: bytes, fortran: bool) -> Tensor:
        """The numbers in `data`."""
        if not re.fullmatch(r"[fiu][1248]|b1", self.code):
            raise ValueError(f"an array of {self.code[:20]!r}")
        array = np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order="F" if fortran else "C")
        # torch has no arrays in the other order of bytes, none that can't be written, and few unsigned types
        return torch.from_numpy(array.astype({"u2": "i4", "u4": "i8", "u8": "i8"}.get(self.code, self.code)))


class _NumpyArray:
    """Stands for an array of numpy's in a pickle; `tensor` is its content."""

    tensor: Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = dtype.tensor(shape, data, fortran)


def _numpy_parts() -> dict[str, Callable[..., Any]]:
    """As `_tensor_parts`, of numpy's arrays."""

    def from_buffer(data: bytes, dtype: _NumpyDtype, shape: Any, order: str) -> Tensor:
        return dtype.tensor(shape, data, order == "F")

    parts: dict[str, Callable[..., Any]] = {"numpy.dtype": lambda *args: _NumpyDtype(*args)}
    parts["_codecs.encode"] = lambda text, _: str(text).encode("latin1")  # bytes, in protocols before 3
    parts["__builtin__.bytes"] = lambda *_: b""
    for core in ("numpy.core", "numpy._core"):
        parts[f"{core}.multiarray._reconstruct"] = lambda *_: _NumpyArray()
        parts[f"{core}.numeric._frombuffer"] = from_buffer
    return parts


class _Inert(dict):
    """Stands for an object of any class. Its items are kept, if it is a kind of dictionary, all else is dropped."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """What pickle calls on a list's items, and on a set's."""

    extend = add = append
    __hash__ = object.__hash__  # type: ignore[assignment]


def _tensor_parts() -> dict[str, Callable[..., Any]]:
    """What PyTorch writes tensors with, by the names in its files; new at each call, for a pickle can change attributes."""
    functions = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
    parts: dict[str, Callable[..., Any]] = {f"torch._utils.{n}": _calling(getattr(torch._utils, n)) for n in functions}
    parts["torch._tensor._rebuild_from_type_v2"] = lambda function, kind, args, state: function(*args)
    return parts | {"collections.OrderedDict": OrderedDict, "torch.Size": torch.Size, "torch.device": torch.device}


def _calling(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of PyTorch's own parts of tensors, or a new class of stand-ins."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return (_tensor_parts() | _numpy_parts()).get(f"{module}.{name}") or type(f"{module}.{name}", (_Inert,), {})


class _InertPickle:
    """What `torch.load` takes in place of the module `pickle`."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """As `pickle.load`."""
        return _InertUnpickler(file, **options).load()


def _flat(content: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of dictionaries in dictionaries, each dictionary once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    level: list[tuple[str, dict[Any, Any]]] = [("", content)]
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, dict[Any, Any]]] = []
        for prefix, of in level:
            if id(of) in seen:
                continue
            seen.add(id(of))
            for key, value in of.items():
                name = f"{prefix}{key}"
                value = value.tensor if isinstance(value, _NumpyArray) else value
                if isinstance(value, Tensor):
                    found.setdefault(name, value)
                elif isinstance(value, dict):
                    deeper.append((f"{name}.", value))
        level = deeper
    return found
