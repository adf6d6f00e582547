"""Weights files: read without running code, and fitted into a network only where every tensor fits.

Digests and descriptions need no torch, so it is imported only where tensors are read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.unwrap import COMPILED, unwrap, without_prefixes
from featurize.errors import UserError, explain_memory_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

INDEX = ".index.json"  # of weights in several files, as the Hub has them


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; a file that has not changed is read once. Of an index, that of its parts' digests."""
    if path.name.endswith(INDEX):
        digests = "".join(sha256_of(part) for part in parts_of(path))
        return hashlib.sha256(digests.encode()).hexdigest()
    seen = path.stat()
    return _sha256(path.resolve(), seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parts_of(index: Path) -> list[Path]:
    """The files that an index (`model.safetensors.index.json`) names, sorted. Raises UserError where one is missing."""
    names = read_description(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(
            f"The index {index} does not say which file holds which tensor (weight_map); take the weights' own."
        )
    parts = sorted({index.with_name(Path(str(name)).name) for name in names.values()})
    for part in parts:
        if not part.is_file():
            raise UserError(f"The part {part} of the weights {index} is not there; fetch all parts into one folder.")
    return parts


def sidecar(weights: Path) -> dict[str, Any]:
    """The JSON beside a weights file (`x.json` beside `x.safetensors`): model, model_args, mean, std... or nothing.

    Raises UserError for values that can't be what their key says; keys that are not known are left alone.
    """
    path = sidecar_path(weights)
    document = read_description(path)
    for key, (is_valid, wanted) in SIDECAR.items():
        if key in document and not is_valid(document[key]):
            raise UserError(
                f"{path}, which describes the weights beside it, says {key} {json.dumps(document[key])[:80]}, but it must be "
                f"{wanted}; fix or remove the file."
            )
    return document


def sidecar_path(weights: Path) -> Path:
    """Where `sidecar` looks."""
    return Path(str(weights).removesuffix(INDEX)).with_suffix(".json")


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
    from safetensors.torch import load_file

    from featurize.checkpoints.torchscript import is_torchscript, read_torchscript

    if path.name.endswith(INDEX):
        return {name: value for part in parts_of(path) for name, value in read_checkpoint(part).items()}
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if is_torchscript(path):
            return dict(read_torchscript(path)[0])
        with torch.serialization.safe_globals(harmless_classes()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # torch raises it where a file would run code, and advises to let it, and where the bytes make no sense.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None and str(error).startswith("Weights only load failed"):
            raise unreadable(path, error) from None
        what = f"it holds a {named[1]}, which only running its code could read" if named else _first_line(error)
        raise UserError(
            f"The weights {path} are refused: {what}; where you trust the file, save its tensors alone (model.state_dict()) "
            "and give those."
        ) from None
    except Exception as error:  # damage shows as anything: IndexError, struct.error, KeyError, zipfile.BadZipFile...
        if explain_memory_error(error):
            raise
        raise unreadable(path, error) from None
    if not isinstance(found, Mapping):
        raise UserError(f"The weights {path} hold a {type(found).__name__} instead of named tensors.")
    return dict(found)


def harmless_classes() -> list[Any]:
    """What trainings save beside tensors and that only holds values: their arguments, and numbers of numpy."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    # numpy's function moved; older files name its older place.
    return [argparse.Namespace, np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def read_state_dict(path: Path) -> State:
    """The named tensors of a weights file, float32, out of whatever certainly wraps them (`unwrap`)."""
    return without_prefixes(tensors_of(read_checkpoint(path), path))


def tensors_of(checkpoint: Mapping[str, Any], weights: Path, wanted: str = "") -> State:
    """The named tensors of a checkpoint, float32; `wanted` is the set that counts where there are several.

    Raises UserError for several sets of which none is wanted.
    """
    from torch import Tensor

    found = unwrap(checkpoint, weights, lambda value: isinstance(value, Tensor), wanted)
    return {key.replace(COMPILED, ""): value.float() for key, value in found.items() if isinstance(value, Tensor)}


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


def unreadable(path: Path, error: Exception) -> UserError:
    """What a file is whose bytes make no sense to torch or safetensors, and how to mend it."""
    where = re.search(r"WeightsUnpickler error: (.*)", str(error))
    reason = (where[1].rstrip(". ") if where else _first_line(error)).partition(". ")[0]
    kind = "" if isinstance(error, OSError) else "it is damaged, cut short, or no file of weights "
    return UserError(
        f"The weights {path} can't be read: {kind}({type(error).__name__}: {reason}); fetch or copy the file again, and "
        "compare its size with the original's."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
