"""Codecs of `z_0`, the level that is decoded to a picture: `pixels` and diffusers' `AutoencoderKL`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from featurize.encoders import sha256_of
from featurize.errors import UserError

SD_SCALE = 0.18215  # the latent scale of Stable Diffusion's VAE; U-ViT uses 0.23010 on COCO
EMBEDDED = "tiny"  # as weights: the small VAE that ships with the package (docs/tiny.md)


@dataclass(frozen=True)
class CodecSpec:
    """Which codec a user asked for, as `codec:side`."""

    name: str
    size: int
    weights: str | None = None
    scale: float | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Codec:
    """A loaded codec.

    `encode` takes uint8 pictures (B, size, size, 3) and gives (B, h, w, stored channels) float32. `attributes` goes
    into the store and tells `nestgen` how to decode; `identity` is everything that decides the values.
    """

    name: str
    size: int
    interpolation: str
    latent_shape: tuple[int, int, int]
    stored_channels: int
    encode: Callable[[np.ndarray], np.ndarray]
    attributes: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)


def parse_codec(text: str, weights: str | None, scale: float | None) -> CodecSpec:
    """`pixels:32` or `vae:256` as a spec."""
    match = re.fullmatch(r"(pixels|vae):([1-9]\d*)", text)
    if match is None:
        raise UserError(f"z_0 '{text}' is no codec; write pixels:SIDE or vae:SIDE, the side in pixels, like pixels:32.")
    if match[1] == "pixels" and (weights or scale):
        raise UserError("The codec pixels has no weights and no scale; leave --z0-weights and --z0-scale out.")
    if match[1] == "vae" and weights is None:
        raise UserError(
            "The codec vae needs its weights: --z0-weights, a folder or file in diffusers' AutoencoderKL layout, "
            "or tiny for the embedded one."
        )
    return CodecSpec(match[1], int(match[2]), weights, scale)


@lru_cache(maxsize=2)
def load_codec(spec: CodecSpec) -> Codec:
    """The codec, kept for the life of the process. Raises UserError for weights that are missing or don't fit."""
    return _pixels(spec) if spec.name == "pixels" else _vae(spec)


def _pixels(spec: CodecSpec) -> Codec:
    attributes = {"name": "pixels", "size": spec.size, "moments": False, "scale": 1.0}
    return Codec(
        name="pixels",
        size=spec.size,
        interpolation="bicubic",
        latent_shape=(spec.size, spec.size, 3),
        stored_channels=3,
        encode=lambda x_BHWC: x_BHWC.astype(np.float32) / 127.5 - 1.0,
        attributes=attributes,
        identity=attributes | {"interpolation": "bicubic", "crop": "largest centred square"},
    )


def _vae(spec: CodecSpec) -> Codec:
    import torch

    embedded = Path(str(files("featurize"))) / "weights" / "tiny_vae"
    vae, file, config = _load_vae(embedded if spec.weights == EMBEDDED else Path(str(spec.weights)).expanduser())
    vae.eval().requires_grad_(False).to(spec.device)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if spec.size % factor:
        raise UserError(
            f"vae:{spec.size} can't be: this VAE reduces by {factor}, so the side must be a multiple of it."
        )
    channels = int(config["latent_channels"])

    def encode(x_BHWC: np.ndarray) -> np.ndarray:
        x_BCHW = torch.from_numpy(x_BHWC).to(spec.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        with torch.inference_mode():
            moments = vae.encode(x_BCHW).latent_dist.parameters
        return moments.permute(0, 2, 3, 1).float().cpu().numpy()

    attributes = {
        "name": "vae",
        "size": spec.size,
        "moments": True,
        "scale": spec.scale or float(config.get("scaling_factor", SD_SCALE)),
        "weights": str(file),
        "weights_sha256": sha256_of(file),
        "config": config,
    }
    hashed = {key: value for key, value in attributes.items() if key != "weights"}
    return Codec(
        name="vae",
        size=spec.size,
        interpolation="bicubic",
        latent_shape=(spec.size // factor, spec.size // factor, channels),
        stored_channels=2 * channels,
        encode=encode,
        attributes=attributes,
        identity=hashed | {"interpolation": "bicubic", "crop": "largest centred square"},
    )


def _load_vae(path: Path) -> tuple[Any, Path, dict[str, Any]]:
    """An AutoencoderKL in diffusers' layout: a folder with config.json, or the weights file in one."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # all of diffusers takes seconds to import

    folder = path if path.is_dir() else path.parent
    file = folder / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    for wanted in (file, folder / "config.json"):
        if not wanted.is_file():
            raise UserError(
                f"The VAE's {wanted} is not there; --z0-weights names a folder in diffusers' AutoencoderKL layout."
            )
    try:
        config = {key: value for key, value in AutoencoderKL.load_config(folder).items() if not key.startswith("_")}
        vae = AutoencoderKL.from_config(config)
        from featurize.encoders import read_state_dict

        vae.load_state_dict(read_state_dict(file))
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"The VAE in {folder} can't be loaded: {str(error).splitlines()[0]}.") from None
    return vae, file.resolve(), config
