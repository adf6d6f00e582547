"""Safetensors files that hold the digest of their own tensors, so that a damaged one is noticed when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestgen.errors import UserError
from nestgen.files import atomic_write


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: str = "") -> None:
    """Writes tensors of the CPU by name; `about` says in the file what they are."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as draft:
        save_file(contiguous, draft, {"of": about, "sha256": _digest(contiguous)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises UserError if they are not those that were written, or it is not there.

    Files of version 0.1.0 have no digest, and are read without one.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            recorded = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy, or remove it") from None
    if recorded not in (None, _digest(tensors)):
        raise UserError(f"{path} is damaged: its SHA-256 is not the recorded one; restore it from a copy, or remove it")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
