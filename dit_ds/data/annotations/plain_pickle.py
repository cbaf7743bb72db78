"""Pickles read as data: containers, numbers and text, also as numpy and `collections` write them; nothing else, no code.

A pickle names classes and functions, and calls them. Here a few names that stand for data have functions of this module
in their place, which return lists, dicts, numbers and text; any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[US]\d{1,6})")


def load_plain(data: bytes) -> Any:
    """The pickle's value; arrays, tuples of arrays' shapes and numpy's numbers become lists and Python's numbers.

    Python 2 wrote REFER's files, whose bytes are read as latin1.

    Raises:
        pickle.UnpicklingError: it names something that is not data.
        Exception: a damaged pickle can raise nearly anything.
    """
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core.", "numpy.core.").replace("__builtin__", "builtins")  # numpy 1, Python 2
        found = _DATA.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks to load {module}.{name}")
        return found


class _Builder:
    """What a pickle gets for a name: it can be called, and nothing of it can be changed or replaced."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]):
        self._build = build

    def __call__(self, *args: Any) -> Any:
        return self._build(*args)

    def __setstate__(self, state: Any) -> None:  # else a pickle could set attributes
        raise pickle.UnpicklingError("it changes what it names")


class _Dtype:
    """numpy's dtype: its code, as `<i8`."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any):
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        self.code = str(state[1]) + self.code.lstrip("<>|=")

    def read(self, data: bytes | str) -> np.ndarray:
        """(n,): the values in an array's bytes."""
        if not _DTYPE.fullmatch(self.code):
            raise pickle.UnpicklingError(f"it has numpy values of type {self.code}")
        dtype = np.dtype(self.code)
        if dtype.itemsize == 0:  # empty text
            return np.array([""])
        return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)


class _Array(list[Any]):
    """numpy's array, as nested lists."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):  # an array of objects
            values = np.empty(len(data), object)
            values[:] = data
        else:
            values = dtype.read(data)
        shape = (shape or (1,)) if values.size else (0,)  # an empty array's shape could ask for any number of lists
        self[:] = values.reshape(shape, order="F" if fortran else "C").tolist()


def _from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    (value,) = dtype.read(data).tolist()
    return value.decode("latin1") if isinstance(value, bytes) else value


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has text in {encoding}")
    return text.encode("latin1")


def _not_called(*_: Any) -> Any:
    raise pickle.UnpicklingError("it calls a type")


_DICT, _LIST, _TYPE = (
    _Builder(lambda items=(): dict(items)),
    _Builder(lambda items=(): list(items)),
    _Builder(_not_called),
)
_DATA: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _DICT,
    ("collections", "Counter"): _DICT,
    ("collections", "defaultdict"): _Builder(lambda factory=None, items=(): dict(items)),
    ("collections", "deque"): _Builder(lambda items=(), longest=None: list(items)),
    ("builtins", "dict"): _DICT,
    ("builtins", "list"): _LIST,
    ("builtins", "set"): _LIST,
    ("builtins", "frozenset"): _LIST,
    ("builtins", "bytes"): _Builder(lambda: b""),
    **dict.fromkeys(
        [("builtins", name) for name in ("int", "float", "str", "bool", "tuple")], _TYPE
    ),  # of defaultdicts
    ("_codecs", "encode"): _Builder(_encode),
    ("numpy", "dtype"): _Builder(_Dtype),
    ("numpy", "ndarray"): _TYPE,
    ("numpy.core.multiarray", "scalar"): _Builder(_scalar),
    ("numpy.core.multiarray", "_reconstruct"): _Builder(lambda *_: _Array()),
    ("numpy.core.numeric", "_frombuffer"): _Builder(_from_buffer),
}
