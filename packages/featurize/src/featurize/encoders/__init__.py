"""Frozen encoders: a picture to a map of features. One file an encoder, one line each in the registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurize.errors import UserError


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder a user asked for; small enough to send to any worker."""

    name: str
    weights: str | None = None
    model_args: str = "{}"  # JSON, so that a spec can be hashed
    precision: str = "float32"


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    `forward` takes x_BCHW (float32, normalised with `mean` and `std`, `input_size` pixels a side) and gives the map
    f_BHWD (float32) with `grid` = (H, W) and `channels` = D. `identity` is everything that decides its values.
    """

    name: str
    input_size: int
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    forward: Callable[[Tensor], Tensor]
    identity: dict[str, Any] = field(repr=False)


@lru_cache(maxsize=2)
def load_encoder(spec: EncoderSpec, device: str) -> Encoder:
    """The encoder on a device, kept for the life of the process.

    Raises UserError for an unknown name, missing weights, and weights that don't fit the model.
    """
    kind, _, variant = spec.name.partition(":")
    builders = _builders()
    if kind not in builders or bool(variant) != (kind == "timm"):
        known = ", ".join("timm:MODEL" if name == "timm" else name for name in builders)
        raise UserError(f"There is no encoder '{spec.name}'; known are {known}.")
    return builders[kind](spec, device)


def _builders() -> dict[str, Callable[[EncoderSpec, str], Encoder]]:
    from featurize.encoders import timm_model, tiny

    return {"tiny": tiny.build, "timm": timm_model.build}


def encode(encoder: Encoder, x_BHWC: Any, device: str, precision: str) -> Tensor:
    """uint8 pictures (B, S, S, 3) as numpy to f_BHWD, float32 on the CPU."""
    x_BCHW = torch.from_numpy(x_BHWC).to(device).permute(0, 3, 1, 2).float().div_(255.0)
    mean = torch.tensor(encoder.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(encoder.std, device=device).view(1, 3, 1, 1)
    half = precision == "bfloat16"
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        f_BHWD = encoder.forward((x_BCHW - mean) / std)
    return f_BHWD.float().cpu()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(path: str, what: str) -> Path:
    """The path as a file that is there, or UserError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"The weights {file} of {what} are not there; check --weights.")
    return file


def sidecar(weights: Path) -> dict[str, Any]:
    """The JSON beside a weights file (`x.json` beside `x.safetensors`): model, model_args, mean, std... or nothing."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}, which describes the weights beside it, is not valid JSON: {error}.") from None
    return document if isinstance(document, dict) else {}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, float32; torch files are read without running code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for wrapper in ("state_dict", "model"):
                state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"The weights {path} can't be read: {str(error).splitlines()[0]}.") from None
    except Exception as error:
        # torch raises pickle.UnpicklingError where a file would run code.
        raise UserError(f"The weights {path} are refused: {str(error).splitlines()[0]}.") from None
    return {key: value.float() for key, value in state.items() if isinstance(value, Tensor)}
