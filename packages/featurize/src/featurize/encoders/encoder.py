"""What an encoder is: requested, described, loaded; and what the encoders' own files have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.downloads import RemoteFile
from featurize.checkpoints.files import sha256_of
from featurize.errors import UserError
from featurize.execution.precision import inference
from featurize.images.crop import CropRule

if TYPE_CHECKING:
    from torch import Tensor

# Among --model-args: position embeddings of another size than the image's grid are resampled to it, as timm does.
RESAMPLE = "resample_positions"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder a user requests; small enough to send to any worker."""

    name: str
    weights: str | None = None
    model_args: str = "{}"  # JSON, so that a spec can be hashed
    precision: str = "float32"


@dataclass(frozen=True)
class Variant:
    """An encoder as published, before its weights are read: `featurize encoders` shows it.

    `network` holds the arguments of the network, each of which a JSON beside the weights and `--model-args` may change.
    `resize` is the short side of the encoder's published evaluation transform, whose centre of `input_size` pixels it
    sees; None where none is published. `official_crop` is that transform where it is another. `published` is where its
    weights are fetched from.
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
    published: RemoteFile | None = None
    official_crop: CropRule | None = None

    def crop_of(self, size: int) -> CropRule | None:
        """The published evaluation transform for an encoder that sees `size` pixels, where there is one."""
        return self.official_crop or (CropRule(self.resize, size) if self.resize else None)


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder without its network.

    It sees `input_size` pixels a side and gives the map f_BHWD with `grid` = (H, W) and `channels` = D. `official_crop` is
    the rule of its published evaluation transform, where it has one. `weights` is None where there are none. `network` holds
    the arguments its network is built with. `identity` is everything that decides its values but the crop, which the ledger
    holds, as JSON has it.
    """

    name: str
    input_size: int
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    official_crop: CropRule | None
    weights: Path | None
    network: dict[str, Any] = field(repr=False)
    identity: dict[str, Any] = field(repr=False)

    @property
    def weights_file(self) -> Path:
        """`weights`, for the encoders that have some."""
        assert self.weights is not None
        return self.weights


@dataclass(frozen=True)
class Encoder(EncoderDescription):
    """A loaded encoder.

    `forward` takes x_BCHW (float32, normalised with `mean` and `std`) and gives f_BHWD (float32). `activation_witness` says
    who confirms the activation, '' where nothing does.
    """

    forward: Callable[[Tensor], Tensor]
    activation_witness: str = "its definition"


@dataclass(frozen=True)
class Kind:
    """One line of the registry: `name` or `name:variant`; the variant "" is the one a bare name means.

    `describe` makes the description of a spec and `build` loads what was described, on a device. `any_variant` stands for
    the variants of a library that are too many to list. `weights` says where they come from where a variant has no
    published file; `imports` are the modules that take long to import and that loading needs.
    """

    describe: Callable[[EncoderSpec], EncoderDescription]
    build: Callable[[EncoderSpec, EncoderDescription, str], Encoder]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    any_variant: str = ""
    weights: str = "yours: --weights FILE"
    imports: tuple[str, ...] = ("torch", "timm")


def variant_of(spec: EncoderSpec, variants: Mapping[str, Variant]) -> Variant:
    """The one among an encoder's variants that a spec names."""
    return variants[spec.name.partition(":")[2]]


def network_of(
    spec: EncoderSpec, variant: Variant, described: Mapping[str, Any], resamples: bool = False
) -> dict[str, Any]:
    """The network's arguments: the variant's, changed by those described beside the weights, changed by `--model-args`.

    With `resamples` they may ask for RESAMPLE, which is among the arguments only where it is asked for.
    """
    changes = dict(described.get("model_args") or {}) | json.loads(spec.model_args)
    allowed = [*variant.network, *([RESAMPLE] if resamples else [])]
    for key, value in changes.items():
        if key not in allowed:
            raise UserError(
                f"The encoder {spec.name} has no argument '{key}'; --model-args may change {', '.join(allowed)}."
            )
        check_argument(spec, key, value, variant.network.get(key, False))
    return dict(variant.network) | changes


def check_argument(spec: EncoderSpec, key: str, value: Any, default: Any) -> None:
    """Raises UserError for an argument of another type than the default's, and for a number that counts nothing."""
    kind = type(default)
    least = min(1, default) if kind is int else None  # of registers there may be none
    if type(value) is kind and (least is None or value >= least):
        return
    wanted = {bool: "true or false", int: f"a whole number from {least} on", str: "a word"}
    raise UserError(
        f"The encoder {spec.name} can't have {key} {json.dumps(value)}; --model-args, or the JSON beside the weights, must give "
        f"{wanted[kind]}."
    )


def patch_grid(spec: EncoderSpec, network: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of a square image of `img_size` pixels in patches of `patch_size`. Raises UserError where none fits."""
    size, patch = network["img_size"], network["patch_size"]
    if not (isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size):
        raise UserError(
            f"The encoder {spec.name} can't cut {size} pixels into patches of {patch}; change --model-args."
        )
    return size // patch, size // patch


def described(
    spec: EncoderSpec,
    variant: Variant,
    network: Mapping[str, Any],
    weights: Path | None,
    grid: tuple[int, int],
    channels: int,
    **stated: Any,
) -> EncoderDescription:
    """The description of a variant with these network arguments and weights, its identity written out.

    `stated` is what else decides the values: which tokens are dropped, the activation, whether a projection is applied.
    """
    size = int(network.get("img_size", variant.input_size))
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
    return EncoderDescription(
        name=spec.name,
        input_size=size,
        grid=grid,
        channels=channels,
        mean=variant.mean,
        std=variant.std,
        interpolation=variant.interpolation,
        official_crop=variant.crop_of(size),
        weights=weights,
        network=dict(network),
        identity=identity,
    )


def loaded(
    description: EncoderDescription, forward: Callable[[Tensor], Tensor], activation_witness: str = "its definition"
) -> Encoder:
    """The described encoder with its network."""
    return Encoder(**vars(description), forward=forward, activation_witness=activation_witness)


def encode(encoder: Encoder, x_BHWC: Any, device: str, precision: str) -> Tensor:
    """uint8 images (B, S, S, 3), an array or a tensor, to f_BHWD, float32 on the device: what is made of it is smaller."""
    import torch

    x_BCHW = torch.as_tensor(x_BHWC, device=device).permute(0, 3, 1, 2).float().div_(255.0)
    mean, std = _constants(encoder.mean, encoder.std, device)
    with inference(device, precision):
        f_BHWD = encoder.forward((x_BCHW - mean) / std)
    return f_BHWD.float()


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: str) -> tuple[Tensor, Tensor]:
    """Mean and spread (1, 3, 1, 1) on the device, copied to it once: a GPU would have to be waited for at each batch."""
    import torch

    first, second = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return first, second
