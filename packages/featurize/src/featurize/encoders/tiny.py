"""The embedded encoder `tiny`: a small ViT trained on scenes, whose weights ship with the package (docs/tiny.md)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from featurize.checkpoints.files import sidecar
from featurize.encoders import timm_model
from featurize.encoders.encoder import (
    EncoderDescription,
    EncoderSpec,
    Kind,
    Variant,
    patch_grid,
)
from featurize.errors import UserError

NORM = "final LayerNorm"


def describe(spec: EncoderSpec) -> EncoderDescription:
    """`tiny`, from the package's own weights file and the JSON beside it: its model has no class token."""
    if spec.weights is not None:
        raise UserError("The encoder tiny brings its own weights; leave --weights out, or use timm:MODEL.")
    weights = Path(str(files("featurize"))) / "weights" / "tiny.safetensors"
    beside = sidecar(weights)
    arguments = beside["model_args"] | json.loads(spec.model_args)
    return timm_model.describe_model(
        spec, beside["model"], arguments, weights, arguments["img_size"], patch_grid(spec, arguments), arguments["embed_dim"],
        beside, norm=NORM, prefix_tokens=0, official_crop=None,
    )  # fmt: skip


KIND = Kind(
    describe,
    timm_model.build,
    {
        "": Variant(
            network={},
            layer="last block, patch tokens",
            norm=NORM,
            input_size=64,
            output=(8, 8, 128),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            resize=None,
        )
    },
    weights="in the package",
)
