"""Codecs of `z_0`, the level that is decoded to an image. One file a codec, one line each in the registry.

Like an encoder, a codec is *described* without torch and *loaded* where images are encoded. May import errors, io and
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from featurize.checkpoints.autoencoder_kl import SD_SCALE
from featurize.errors import UserError

COCO_SCALE = 0.23010  # U-ViT's on COCO, for Stable Diffusion's VAE


@dataclass(frozen=True)
class CodecSpec:
    """Which codec a user requests, as `codec:side`. `sd_scale` is the scale of Stable Diffusion's VAE on this source,
    which `scale` overrides."""

    name: str
    size: int
    weights: str | None = None
    scale: float | None = None
    device: str = "cpu"
    sd_scale: float = SD_SCALE


@dataclass(frozen=True)
class CodecDescription:
    """A codec without its network.

    It sees `size` pixels a side and gives a latent of (h, w, c), of which `stored_channels` are kept. `attributes` goes into
    the store and tells `nestgen` how to decode; `identity` is everything that decides the values but the crop.
    """

    name: str
    size: int
    interpolation: str
    latent_shape: tuple[int, int, int]
    stored_channels: int
    attributes: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Codec(CodecDescription):
    """A loaded codec: `encode` takes uint8 images (B, size, size, 3) and gives (B, h, w, stored channels) float32."""

    encode: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """One line of the registry.

    `describe` makes the description of a spec and `build` loads what was described. `usual_latent` gives ((h, w, c), stored
    channels) for a side in pixels, of the weights that are taken by default: for plans where they are not on this machine.
    `imports` are the modules that take long to import and that loading needs.
    """

    describe: Callable[[CodecSpec], CodecDescription]
    build: Callable[[CodecSpec, CodecDescription], Codec]
    usual_latent: Callable[[int], tuple[tuple[int, int, int], int]]
    needs_weights: bool = True
    imports: tuple[str, ...] = ()


@cache
def kinds() -> dict[str, Kind]:
    """The registry: each name's module, whose KIND describes and builds the codec."""
    return {name: import_module(f"{__name__}.{name}").KIND for name in ("pixels", "vae", "taesd")}


def parse_codec(text: str, weights: str | None, scale: float | None, source: str | None = None) -> CodecSpec:
    """`pixels:32` or `vae:256` as a spec. From COCO, Stable Diffusion's VAE gets U-ViT's scale for it."""
    name, _, side = text.partition(":")
    if name not in kinds() or re.fullmatch(r"[1-9]\d*", side) is None:
        forms = ", ".join(f"{codec}:SIDE" for codec in kinds())
        raise UserError(f"There is no codec '{text}' for z_0; write {forms}, the side in pixels, like pixels:32.")
    if not kinds()[name].needs_weights and (weights or scale):
        raise UserError(f"The codec {name} has no weights and no scale; leave --z0-weights and --z0-scale out.")
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"--z0-scale {scale} can't be a latent scale; give a positive number like {SD_SCALE}.")
    coco = source is not None and source.partition(":")[0] == "coco"
    return CodecSpec(name, int(side), weights, scale, sd_scale=COCO_SCALE if coco else SD_SCALE)


def describe_codec(spec: CodecSpec) -> CodecDescription:
    """The codec without loading it: torch is not imported, of its weights only the digest and the tensors' names are read.

    Raises UserError for weights that are missing and for a side that does not fit them.
    """
    return kinds()[spec.name].describe(spec)


@lru_cache(maxsize=2)
def load_codec(spec: CodecSpec) -> Codec:
    """The codec, kept for the life of the process. Raises UserError for weights that are missing or don't fit."""
    return kinds()[spec.name].build(spec, describe_codec(spec))


def described(
    spec: CodecSpec, latent_shape: tuple[int, int, int], stored_channels: int, attributes: dict[str, Any]
) -> CodecDescription:
    """The description, its identity written out: what the store says of the codec, but for the place of its weights."""
    identity = {key: value for key, value in attributes.items() if key != "weights"} | {"interpolation": "bicubic"}
    return CodecDescription(spec.name, spec.size, "bicubic", latent_shape, stored_channels, attributes, identity)


def loaded(description: CodecDescription, encode: Callable[[np.ndarray], np.ndarray]) -> Codec:
    """The described codec with its network."""
    return Codec(**vars(description), encode=encode)


def cells_per_side(spec: CodecSpec, factor: int) -> int:
    """Sides of the latent for a network that reduces by `factor`. Raises UserError where it does not divide the side."""
    if spec.size % factor:
        raise UserError(
            f"{spec.name}:{spec.size} does not work: the network reduces by {factor}; give a multiple of it as the side."
        )
    return spec.size // factor
