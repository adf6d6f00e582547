"""Tensors of a TorchScript archive (OpenAI's CLIP files), read without running anything in it.

`torch.jit.load` would compile the code in the archive and run its `__setstate__`; `torch.load(weights_only=True)` refuses
such archives. So the archive is opened as what it is: a zip with `data.pkl`, which names the tensors, and `data/N`, their
bytes. The pickle may only name tensors, containers and the archive's own classes; these become inert holders of
attributes, and anything else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


class _Holder:
    """Stands for any class of the archive: it keeps the attributes and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors by their dotted name, the archive's code as text with the numbers it refers to in their place).

    Raises pickle.UnpicklingError for anything suspicious.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("the archive is big-endian")
        with archive.open(f"{root}data.pkl") as file:
            module = _Unpickler(file, archive, f"{root}data/").load()
        with archive.open(f"{root}constants.pkl") as file:
            constants = _Unpickler(file, archive, f"{root}constants/").load()
        code = "\n".join(archive.read(name).decode() for name in names if name.endswith(".py"))
    # A number that the traced code multiplies by is a constant beside it.
    for index, constant in reversed(list(enumerate(constants))):
        if isinstance(constant, Tensor) and constant.numel() == 1:
            code = code.replace(f"CONSTANTS.c{index}", f"{float(constant):.6g}")
    return dict(_tensors(module, "")), code


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Holder
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights file needs")
        return allowed[module, name]

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds something besides tensors")
        data = bytearray(self._archive.read(f"{self._folder}{key}"))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(flat) != count:
            raise pickle.UnpicklingError(f"the tensor {key} has {len(flat)} values instead of {count}")
        return flat


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    # torch checks that size and stride stay within the storage.
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)


def _tensors(module: _Holder, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Holder):
            yield from _tensors(value, f"{prefix}{name}.")
