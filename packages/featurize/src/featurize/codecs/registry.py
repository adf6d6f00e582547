"""The registry of codecs: one line each, and those of installed packages."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from featurize.checkpoints.autoencoder_kl import SD_SCALE
from featurize.codecs import pixels, taesd, vae
from featurize.codecs.codec import Codec, CodecDescription, CodecSpec, Kind
from featurize.errors import UserError
from featurize.io.files import json_sha256
from featurize.plugins import with_installed

COCO_SCALE = 0.23010  # U-ViT's on COCO, for Stable Diffusion's VAE
COCO_SOURCES = ("coco", "coco2014", "coco2017")


@cache
def kinds() -> dict[str, Kind]:
    """Each name and what describes and builds its codec, those of other packages last."""
    built_in = {"pixels": pixels.KIND, "vae": vae.KIND, "taesd": taesd.KIND}
    return with_installed(built_in, "featurize.codecs", Kind)


def parse_codec(
    text: str,
    weights: str | None,
    scale: float | None,
    source: str | None = None,
    crop: str = "same",
    precision: str = "float32",
) -> CodecSpec:
    """`pixels:32` or `vae:256` as a spec. From COCO, Stable Diffusion's VAE gets U-ViT's scale for it."""
    name, _, side = text.partition(":")
    if name not in kinds() or re.fullmatch(r"[1-9]\d*", side) is None:
        forms = ", ".join(f"{codec}:SIDE" for codec in kinds())
        raise UserError(f"There is no codec '{text}' for z_0; write {forms}, the side in pixels, like pixels:32.")
    if not kinds()[name].needs_weights and (weights or scale):
        raise UserError(f"The codec {name} has no weights and no scale; leave --z0-weights and --z0-scale out.")
    if not kinds()[name].needs_weights and precision != "float32":
        raise UserError(f"The codec {name} has no network to compute in {precision}; leave --z0-precision out.")
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"--z0-scale {scale} can't be a latent scale; give a positive number like {SD_SCALE}.")
    coco = source is not None and source.partition(":")[0] in COCO_SOURCES
    sd_scale = COCO_SCALE if coco else SD_SCALE
    return CodecSpec(name, int(side), weights, scale, sd_scale=sd_scale, crop=crop, precision=precision)


def describe_codec(spec: CodecSpec) -> CodecDescription:
    """The codec without loading it: torch is not imported, of its weights only the digest and the tensors' names are read.

    Raises UserError for weights that are missing and for a side that does not fit them.
    """
    return kinds()[spec.name].describe(spec)


def load_codec(spec: CodecSpec) -> Codec:
    """The codec, kept in memory as long as its weights file stays the same.

    Raises UserError for weights that are missing or don't fit.
    """
    return _load_identified(spec, json_sha256(describe_codec(spec).identity))


@lru_cache(maxsize=2)
def _load_identified(spec: CodecSpec, identity: str) -> Codec:
    """`load_codec`, kept by the digest of the identity as well: a file may be overwritten by another training."""
    return kinds()[spec.name].build(spec, describe_codec(spec))
