"""Codecs of `z_0`, the level that is decoded to a picture. One file a codec, one line each in the registry."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from featurize.errors import UserError

SD_SCALE = 0.18215  # the latent scale that Stable Diffusion's VAE comes with, and U-ViT's on ImageNet
COCO_SCALE = 0.23010  # U-ViT's on COCO, for the same VAE
WITHOUT_WEIGHTS = ("pixels",)


@dataclass(frozen=True)
class CodecSpec:
    """Which codec a user asked for, as `codec:side`. `sd_scale` is the scale of Stable Diffusion's VAE on this source,
    which `scale` overrides."""

    name: str
    size: int
    weights: str | None = None
    scale: float | None = None
    device: str = "cpu"
    sd_scale: float = SD_SCALE


@dataclass(frozen=True)
class Codec:
    """A loaded codec.

    `encode` takes uint8 pictures (B, size, size, 3) and gives (B, h, w, stored channels) float32. `attributes` goes
    into the store and tells `nestgen` how to decode; `identity` is everything that decides the values but the crop.
    """

    name: str
    size: int
    interpolation: str
    latent_shape: tuple[int, int, int]
    stored_channels: int
    encode: Callable[[np.ndarray], np.ndarray]
    attributes: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)


def _builders() -> dict[str, Callable[[CodecSpec], Codec]]:
    from featurize.codecs import pixels, taesd, vae

    return {"pixels": pixels.build, "vae": vae.build, "taesd": taesd.build}


def parse_codec(text: str, weights: str | None, scale: float | None, source: str | None = None) -> CodecSpec:
    """`pixels:32` or `vae:256` as a spec. From COCO, Stable Diffusion's VAE gets U-ViT's scale for it."""
    name, _, side = text.partition(":")
    known = tuple(_builders())
    if name not in known or re.fullmatch(r"[1-9]\d*", side) is None:
        forms = ", ".join(f"{codec}:SIDE" for codec in known)
        raise UserError(f"z_0 '{text}' is no codec; write {forms}, the side in pixels, like pixels:32.")
    if name in WITHOUT_WEIGHTS and (weights or scale):
        raise UserError(f"The codec {name} has no weights and no scale; leave --z0-weights and --z0-scale out.")
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"--z0-scale {scale} is no latent scale; it is a positive number like {SD_SCALE}.")
    coco = source is not None and source.partition(":")[0] == "coco"
    return CodecSpec(name, int(side), weights, scale, sd_scale=COCO_SCALE if coco else SD_SCALE)


@lru_cache(maxsize=2)
def load_codec(spec: CodecSpec) -> Codec:
    """The codec, kept for the life of the process. Raises UserError for weights that are missing or don't fit."""
    return _builders()[spec.name](spec)
