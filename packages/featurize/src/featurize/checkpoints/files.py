"""Weights files: read without running code, and fitted into a network only where every tensor fits.

Digests and descriptions need no torch, so it is imported only where tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; a file that has not changed is read once."""
    seen = path.stat()
    return _sha256(path.resolve(), seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar(weights: Path) -> dict[str, Any]:
    """The JSON beside a weights file (`x.json` beside `x.safetensors`): model, model_args, mean, std... or nothing.

    Raises UserError for values that can't be what their key says; keys that are not known are left alone.
    """
    path = weights.with_suffix(".json")
    document = read_description(path)
    for key, (is_valid, wanted) in SIDECAR.items():
        if key in document and not is_valid(document[key]):
            raise UserError(
                f"{path}, which describes the weights beside it, says {key} {json.dumps(document[key])[:80]}, but it must be "
                f"{wanted}; fix or remove the file."
            )
    return document


def _numbers(value: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(value, list) and all(type(one) in (int, float) and math.isfinite(one) for one in value)


# What may stand in the JSON beside a weights file.
SIDECAR: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a model's name"),
    "model_args": (lambda value: isinstance(value, dict), "a mapping of arguments"),
    "mean": (lambda value: _numbers(value) and len(value) == 3, "three numbers, one a colour"),
    "std": (
        lambda value: _numbers(value) and len(value) == 3 and min(value) > 0,
        "three numbers above 0, one a colour",
    ),
    "interpolation": (lambda value: isinstance(value, str), "the name of a filter, like bicubic"),
    "input_size": (lambda value: type(value) is int and value > 0, "a side in pixels"),
    "golden": (_numbers, "a list of numbers"),
}


def read_description(path: Path) -> dict[str, Any]:
    """A JSON file that describes weights, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}, which describes the weights beside it, is not valid JSON: {error}.") from None
    return document if isinstance(document, dict) else {}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a safetensors or torch file holds, as it is nested there. Raises UserError for a file that is damaged, is no
    such file, or would run code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from featurize.checkpoints.torchscript import is_torchscript, read_torchscript

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if is_torchscript(path):
            return dict(read_torchscript(path)[0])
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"The weights {path} can't be read: {_first_line(error)}.") from None
    except Exception as error:
        # torch raises pickle.UnpicklingError where a file would run code.
        raise UserError(f"The weights {path} are refused: {_first_line(error)}.") from None
    if not isinstance(found, Mapping):
        raise UserError(f"The weights {path} hold a {type(found).__name__} instead of named tensors.")
    return dict(found)


def read_state_dict(path: Path) -> State:
    """The named tensors of a weights file, float32, out of the wrapping `state_dict` or `model` where there is one."""
    return tensors_of(read_checkpoint(path))


def tensors_of(checkpoint: Mapping[str, Any]) -> State:
    """The named tensors of a checkpoint, float32."""
    from torch import Tensor

    for wrapper in ("state_dict", "model"):
        inner = checkpoint.get(wrapper)
        checkpoint = inner if isinstance(inner, Mapping) else checkpoint
    return {key: value.float() for key, value in checkpoint.items() if isinstance(value, Tensor)}


def fit(model: nn.Module, state: State, weights: Path, hint: str) -> None:
    """Load exactly these tensors into the model.

    Raises UserError when a key is missing or unexpected, a shape differs or a value is NaN or infinite; `hint` says what
    to look at.
    """
    import torch

    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"The weights {weights} don't fit the model: {len(missing)} keys are missing{_example(missing)} and "
            f"{len(unexpected)} unexpected{_example(unexpected)}; {hint}."
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"The weights {weights} don't fit the model: '{key}' is {tuple(value.shape)}, "
                f"the model has {tuple(expected[key].shape)}; {hint}."
            )
        if not torch.isfinite(value).all():
            raise UserError(f"The weights {weights} are damaged: '{key}' holds NaN or infinite values.")
    model.load_state_dict(state)


def _example(keys: list[str]) -> str:
    return f" (first '{keys[0]}')" if keys else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
