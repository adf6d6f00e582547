"""Named arrays in a safetensors file that carries a digest of all it says, which is compared when it is read."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from featurize.io.files import atomic_write

DIGEST = "sha256"


def save_tensors(path: Path, tensors: dict[str, np.ndarray], facts: dict[str, str], wait_for_name: bool = True) -> None:
    """Written whole or not at all; `facts` go into the file's metadata."""
    data = save(tensors)
    header, start = _header(data)
    # By hand, because safetensors puts several facts into an order that changes from run to run.
    text = json.dumps(
        {"__metadata__": facts | {DIGEST: _digest(tensors, facts)}} | header, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, wait_for_name) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def load_tensors(path: Path, known: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays, and those facts that are `known`. Files of earlier versions have no digest.

    Raises ValueError for a file that is damaged, OSError for one that can't be read.
    """
    data = path.read_bytes()
    try:
        tensors = load(data)
        header, _ = _header(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    facts = dict(header.get("__metadata__", {}))
    digest = facts.pop(DIGEST, None)
    if facts.keys() - set(known) or digest not in (None, _digest(tensors, facts)):
        raise ValueError("its digest is another")
    return tensors, facts


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its arrays begin."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), start


def _digest(tensors: dict[str, np.ndarray], facts: dict[str, str]) -> str:
    """SHA-256 over facts, names, types, shapes and values."""
    described = [[name, str(tensors[name].dtype), tensors[name].shape] for name in sorted(tensors)]
    digest = sha256(json.dumps([facts, described], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
