"""Frozen encoders: a picture to a map of features. One file an encoder, one line each in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurize.checkpoints.downloads import Place
from featurize.checkpoints.files import sha256_of
from featurize.encoders.onednn import on_onednn
from featurize.errors import UserError
from featurize.images.crop import CropRule

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder a user asked for; small enough to send to any worker."""

    name: str
    weights: str | None = None
    model_args: str = "{}"  # JSON, so that a spec can be hashed
    precision: str = "float32"


@dataclass(frozen=True)
class Variant:
    """What is known of an encoder before its weights are read: `featurize encoders` shows it.

    `network` holds the arguments of the network, each of which a JSON beside the weights and `--model-args` may change.
    `resize` is the short side of the encoder's published evaluation transform, whose centre of `input_size` pixels it
    sees; None where none is published.
    """

    network: Mapping[str, Any]
    layer: str
    norm: str
    input_size: int
    output: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize: int | None
    place: Place | None = None


@dataclass(frozen=True)
class Kind:
    """One line of the registry: `name` or `name:variant`; the variant "" is the one a bare name means.

    `build` makes the encoder of a spec on a device. `any_variant` stands for the variants of a library that are too many
    to list.
    """

    build: Callable[[EncoderSpec, str], Encoder]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    any_variant: str = ""


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    `forward` takes x_BCHW (float32, normalised with `mean` and `std`, `input_size` pixels a side) and gives the map
    f_BHWD (float32) with `grid` = (H, W) and `channels` = D. `official_crop` is the rule of its published evaluation
    transform, where it has one; `activation_witness` says who confirms the activation, '' where nothing does. `identity`
    is everything that decides its values but the crop, which the ledger holds.
    """

    name: str
    input_size: int
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    official_crop: CropRule | None
    weights: Path | None  # None where there are none
    forward: Callable[[Tensor], Tensor]
    identity: dict[str, Any] = field(repr=False)
    activation_witness: str = "its definition"


@cache
def kinds() -> dict[str, Kind]:
    """The registry."""
    from featurize.encoders import clip, dino, mocov3, pixels, rcg, timm_model, tiny, vae

    return {
        "tiny": tiny.KIND,
        "mocov3": mocov3.KIND,
        "clip": clip.KIND,
        "dino": dino.KIND,
        "rcg": rcg.KIND,
        "vae": vae.KIND,
        "pixels": pixels.KIND,
        "timm": timm_model.KIND,
    }


@lru_cache(maxsize=2)
def load_encoder(spec: EncoderSpec, device: str) -> Encoder:
    """The encoder on a device, kept for the life of the process.

    Raises UserError for an unknown name, missing weights, and weights that don't fit the model.
    """
    name, _, variant = spec.name.partition(":")
    kind = kinds().get(name)
    if kind is None or (variant not in kind.variants and not (kind.any_variant and variant)):
        raise UserError(f"There is no encoder '{spec.name}'; known are {', '.join(known_names())}.")
    encoder = kind.build(spec, device)
    if device == "cpu" and spec.precision == "float32":
        return replace(encoder, forward=on_onednn(encoder.forward))
    return encoder


def known_names() -> list[str]:
    """`mocov3`, `mocov3:vit_small`, ... as a user writes them."""
    names = []
    for name, kind in kinds().items():
        names += [f"{name}:{variant}" if variant else name for variant in kind.variants]
        names += [f"{name}:{kind.any_variant}"] if kind.any_variant else []
    return names


def variant_of(spec: EncoderSpec) -> Variant:
    """What the registry knows of the encoder a spec names."""
    name, _, variant = spec.name.partition(":")
    return kinds()[name].variants[variant]


def network_of(spec: EncoderSpec, variant: Variant, described: Mapping[str, Any]) -> dict[str, Any]:
    """The network's arguments: the variant's, changed by those described beside the weights, changed by `--model-args`."""
    changes = dict(described.get("model_args") or {}) | json.loads(spec.model_args)
    for key in changes:
        if key not in variant.network:
            raise UserError(
                f"The encoder {spec.name} has no argument '{key}'; --model-args may change {', '.join(variant.network)}."
            )
    return dict(variant.network) | changes


def loaded(
    spec: EncoderSpec,
    variant: Variant,
    network: Mapping[str, Any],
    weights: Path | None,
    device: str,
    forward: Callable[[Tensor], Tensor],
    activation_witness: str = "its definition",
    **stated: Any,
) -> Encoder:
    """The Encoder of a variant whose network is loaded: its output is measured on a black picture, its identity written out.

    `stated` is what else decides the values: which tokens are dropped, the activation, whether a projection is applied.
    """
    size = int(network.get("img_size", variant.input_size))
    with torch.inference_mode():
        probe = forward(torch.zeros(1, 3, size, size, device=device))
    identity = {
        "name": spec.name,
        "network": dict(network),
        **({} if weights is None else {"weights_sha256": sha256_of(weights)}),
        "layer": variant.layer,
        "norm": variant.norm,
        "input_size": size,
        "mean": list(variant.mean),
        "std": list(variant.std),
        "interpolation": variant.interpolation,
        "precision": spec.precision,
        **stated,
    }
    return Encoder(
        name=spec.name,
        input_size=size,
        grid=(int(probe.shape[1]), int(probe.shape[2])),
        channels=int(probe.shape[3]),
        mean=variant.mean,
        std=variant.std,
        interpolation=variant.interpolation,
        official_crop=CropRule(variant.resize, size) if variant.resize else None,
        weights=weights,
        forward=forward,
        identity=identity,
        activation_witness=activation_witness,
    )


def encode(encoder: Encoder, x_BHWC: Any, device: str, precision: str) -> Tensor:
    """uint8 pictures (B, S, S, 3) as numpy to f_BHWD, float32 on the device: what is made of it is smaller than it."""
    x_BCHW = torch.from_numpy(x_BHWC).to(device).permute(0, 3, 1, 2).float().div_(255.0)
    mean = torch.tensor(encoder.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(encoder.std, device=device).view(1, 3, 1, 1)
    half = precision == "bfloat16"
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        f_BHWD = encoder.forward((x_BCHW - mean) / std)
    return f_BHWD.float()
