"""RCG's representation (Li, Katabi, He 2023): MoCo-v3's projected 256-d vector, a 1x1x256 level."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from featurize.checkpoints.downloads import find_weights
from featurize.checkpoints.files import fit, sidecar
from featurize.encoders import mocov3
from featurize.encoders.encoder import (
    Encoder,
    EncoderDescription,
    EncoderSpec,
    Kind,
    Variant,
    described,
    loaded,
    network_of,
    variant_of,
)
from featurize.execution.precision import convert_weights
from featurize.images.crop import CropRule

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEAD = {"mlp_dim": 4096, "projection_dim": 256}


def _variant(backbone: Variant) -> Variant:
    return replace(
        backbone,
        network={**backbone.network, **_HEAD},
        layer="projection of the class token",
        norm="final LayerNorm, then the head's batch norms",
        output=(1, 1, _HEAD["projection_dim"]),
        official_crop=CropRule(256, 256, "bicubic"),
    )


VARIANTS = {name: _variant(backbone) for name, backbone in mocov3.VARIANTS.items()}


def describe(spec: EncoderSpec) -> EncoderDescription:
    """The class token after the final LayerNorm through MoCo-v3's projection head: three linear layers without bias, a
    batch norm after each (running statistics; the last without scale and shift), ReLU between them.

    RCG standardises each vector over its own 256 values before its generator; that is left to whoever trains on it. Its own
    way in, `--crop official`: 256 pixels by the bicubic filter, then 224 by bicubic interpolation without antialiasing.
    """
    variant = variant_of(spec, VARIANTS)
    weights = find_weights(spec.weights, variant.published, spec.name)
    network = network_of(spec, variant, sidecar(weights))
    return described(
        spec, variant, network, weights, (1, 1), network["projection_dim"],
        affine=True, projection=True, pooling="class token", activation="gelu",
    )  # fmt: skip


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """The backbone in timm's layout, and MoCo-v3's projection head."""
    from torch.nn import functional

    from featurize.encoders.vit import build_vit

    weights, network = description.weights_file, description.network
    state = mocov3.base_encoder(weights, network)
    model = build_vit(network, spec.name)
    head = _head(network["embed_dim"], network["mlp_dim"], network["projection_dim"])
    of_head = {key.removeprefix(mocov3.HEAD): value for key, value in state.items() if key.startswith(mocov3.HEAD)}
    mocov3.load_backbone(
        model, {key: value for key, value in state.items() if not key.startswith(mocov3.HEAD)}, weights, network
    )
    # Batch norm counts its batches in an integer; everything else was read as float32.
    fit(head, {key: value.long() if key.endswith("num_batches_tracked") else value for key, value in of_head.items()},
        weights, "the projection head (head.*) must be MoCo-v3's own")  # fmt: skip
    for part in (model, head):
        part.eval().requires_grad_(False).to(device)
        convert_weights(part, spec.precision)

    size = int(network["img_size"])

    def forward(x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[-1] != size:  # the official crop
            x_BCHW = functional.interpolate(x_BCHW, size=(size, size), mode="bicubic", align_corners=False)
        return head(model.forward_features(x_BCHW)[:, 0])[:, None, None]

    return loaded(description, forward)


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    from torch import nn

    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, out, bias=False), nn.BatchNorm1d(out, affine=False),
    )  # fmt: skip


KIND = Kind(describe, build, VARIANTS)
