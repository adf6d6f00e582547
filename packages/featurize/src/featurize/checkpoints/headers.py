"""Names of the tensors in a weights file, read from its header: torch is not imported, no tensor is read, no code is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from featurize.checkpoints.files import INDEX, parts_of, unreadable
from featurize.checkpoints.unwrap import COMPILED, unwrap, without_prefixes

PREAMBLE = 3  # pickles before the content in torch's format before 1.6: a magic number, the protocol, the system


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors or torch file, without what wraps them (`unwrap`).

    Raises UserError for a file that is neither or is damaged.
    """
    if path.name.endswith(INDEX):
        return set().union(*map(tensor_names, parts_of(path)))
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                size = int.from_bytes(file.read(8), "little")
                if size > path.stat().st_size:  # a page of HTML or a pointer of Git LFS, whose first bytes are text
                    raise ValueError("no safetensors header")
                return set(json.loads(file.read(size))) - {"__metadata__"}
            content = _content(file)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        raise unreadable(path, error) from None
    if not isinstance(content, Mapping):
        return set()
    found = unwrap(content, path, lambda value: isinstance(value, _StandIn))
    return set(without_prefixes({str(name).replace(COMPILED, ""): None for name in found}))


def _content(file: BinaryIO) -> Any:
    """What a torch file holds, each object in it replaced by an inert stand-in."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as pickled:
                return _Outline(pickled).load()
    file.seek(0)
    for _ in range(PREAMBLE):
        _Outline(file).load()
    return _Outline(file).load()


class _StandIn:
    """Stands for any class or function that a pickle names: it takes what it is given and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Outline(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _StandIn

    def persistent_load(self, identity: Any) -> Any:
        return None  # where a tensor's bytes are
