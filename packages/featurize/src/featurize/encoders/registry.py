"""The registry of encoders: one line each, and those of installed packages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

from featurize.encoders import clip, dino, mocov3, pixels, rcg, timm_model, tiny, vae
from featurize.encoders.encoder import Encoder, EncoderDescription, EncoderSpec, Kind
from featurize.errors import UserError
from featurize.io.files import json_sha256
from featurize.plugins import with_installed


@cache
def kinds() -> dict[str, Kind]:
    """Each name and what describes and builds its encoders, those of other packages last."""
    built_in = {
        "tiny": tiny.KIND,
        "mocov3": mocov3.KIND,
        "clip": clip.KIND,
        "dino": dino.KIND,
        "rcg": rcg.KIND,
        "vae": vae.KIND,
        "pixels": pixels.KIND,
        "timm": timm_model.KIND,
    }
    return with_installed(built_in, "featurize.encoders", Kind)


def kind_of(name: str) -> Kind:
    """The registry's line of an encoder's name. Raises UserError for an unknown one."""
    family, _, variant = name.partition(":")
    kind = kinds().get(family)
    if kind is None or (variant not in kind.variants and not (kind.any_variant and variant)):
        raise UserError(f"There is no encoder '{name}'; known are {', '.join(known_names())}.")
    return kind


def describe_encoder(spec: EncoderSpec) -> EncoderDescription:
    """The encoder without loading it: torch is not imported (but for `timm:MODEL`), of its weights only the digest is taken.

    Raises UserError for an unknown name, missing weights, and arguments that it does not have.
    """
    return kind_of(spec.name).describe(spec)


def load_encoder(spec: EncoderSpec, device: str) -> Encoder:
    """The encoder on a device, kept in memory as long as its weights file stays the same.

    Raises UserError as `describe_encoder` does, and for weights that don't fit the model.
    """
    return _load_identified(spec, json_sha256(describe_encoder(spec).identity), device)


@lru_cache(maxsize=2)
def _load_identified(spec: EncoderSpec, identity: str, device: str) -> Encoder:
    """`load_encoder`, kept by the digest of the identity as well: a file may be overwritten by another training."""
    encoder = kind_of(spec.name).build(spec, describe_encoder(spec), device)
    if device == "cpu" and spec.precision == "float32":
        from featurize.encoders.onednn import on_onednn

        return replace(encoder, forward=on_onednn(encoder.forward))
    return encoder


def known_names() -> list[str]:
    """`mocov3`, `mocov3:vit_small`, ... as a user writes them."""
    names = []
    for name, kind in kinds().items():
        names += [f"{name}:{variant}" if variant else name for variant in kind.variants]
        names += [f"{name}:{kind.any_variant}"] if kind.any_variant else []
    return names
