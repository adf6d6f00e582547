"""What a codec is: requested, described, loaded; and what the codecs' own files have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.checkpoints.autoencoder_kl import SD_SCALE
from featurize.errors import UserError
from featurize.execution.precision import convert_weights, inference
from featurize.images.crop import InputSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class CodecSpec:
    """Which codec a user requests, as `codec:side`. `sd_scale` is the scale of Stable Diffusion's VAE on this source,
    which `scale` overrides. `crop` is "same" for the crop that the encoder sees, or names one of images.crop.OWN_CROPS.
    `precision` is that of the network, "float32" or "bfloat16"."""

    name: str
    size: int
    weights: str | None = None
    scale: float | None = None
    device: str = "cpu"
    sd_scale: float = SD_SCALE
    crop: str = "same"
    precision: str = "float32"


@dataclass(frozen=True)
class CodecDescription:
    """A codec without its network.

    It sees `size` pixels a side and gives a latent of (h, w, c), of which `stored_channels` are kept. `attributes` goes into
    the store and tells `nestgen` how to decode; `identity` is everything that decides the values but the root's crop.
    """

    name: str
    size: int
    interpolation: str
    latent_shape: tuple[int, int, int]
    stored_channels: int
    attributes: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)

    @property
    def input(self) -> InputSpec:
        """What the codec is given of an image."""
        return InputSpec(self.size, self.interpolation, self.identity.get("crop", "same"))


@dataclass(frozen=True)
class Codec(CodecDescription):
    """A loaded codec: `encode` takes uint8 images (B, size, size, 3), an array or a tensor, and gives (B, h, w, stored channels)
    float32 on the spec's device."""

    encode: Callable[[np.ndarray | Tensor], Tensor]


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


def described(
    spec: CodecSpec, latent_shape: tuple[int, int, int], stored_channels: int, attributes: dict[str, Any]
) -> CodecDescription:
    """The description, its identity written out: what the store says of the codec, but for the place of its weights."""
    interpolation = "lanczos" if spec.crop == "lanczos" else "bicubic"
    identity = {key: value for key, value in attributes.items() if key != "weights"} | {"interpolation": interpolation}
    if spec.crop != "same":
        identity["crop"] = spec.crop
    if spec.precision != "float32":  # of earlier versions all are
        identity["precision"] = spec.precision
    return CodecDescription(spec.name, spec.size, interpolation, latent_shape, stored_channels, attributes, identity)


def loaded(description: CodecDescription, encode: Callable[[np.ndarray | Tensor], Tensor]) -> Codec:
    """The described codec with its network."""
    return Codec(**vars(description), encode=encode)


def encode_with(
    model: nn.Module, spec: CodecSpec, latent_of: Callable[[Tensor], Tensor]
) -> Callable[[np.ndarray | Tensor], Tensor]:
    """`Codec.encode` by a network, which is moved to the spec's device: `latent_of` takes x_BCHW in -1..1 to (B, C, h, w).

    In bfloat16 its weights lie channels last, as the kernels for it want them; in float32 values are those of earlier versions.
    """
    import torch

    layout = torch.channels_last if spec.precision == "bfloat16" else torch.contiguous_format
    model.eval().requires_grad_(False).to(spec.device).to(memory_format=layout)  # type: ignore[call-overload]
    convert_weights(model, spec.precision)

    def encode(x_BHWC: np.ndarray | Tensor) -> Tensor:
        x_BCHW = torch.as_tensor(x_BHWC, device=spec.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        with inference(spec.device, spec.precision):
            z_BCHW = latent_of(x_BCHW)
        return z_BCHW.permute(0, 2, 3, 1).float()

    return encode


def cells_per_side(spec: CodecSpec, factor: int) -> int:
    """Sides of the latent for a network that reduces by `factor`. Raises UserError where it does not divide the side."""
    if spec.size % factor:
        raise UserError(
            f"{spec.name}:{spec.size} does not work: the network reduces by {factor}; give a multiple of it as the side."
        )
    return spec.size // factor
