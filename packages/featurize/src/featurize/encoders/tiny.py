"""The embedded encoder `tiny`: a small ViT trained on scenes, whose weights ship with the package (docs/tiny.md)."""

from __future__ import annotations

from importlib.resources import as_file, files

from featurize.checkpoints.files import sidecar
from featurize.encoders import Encoder, EncoderSpec, Kind, Variant
from featurize.encoders.timm_model import build_from
from featurize.errors import UserError


def build(spec: EncoderSpec, device: str) -> Encoder:
    """`tiny`, from the package's own weights file and the JSON beside it."""
    if spec.weights is not None:
        raise UserError("The encoder tiny brings its own weights; leave --weights out, or use timm:MODEL.")
    with as_file(files("featurize") / "weights") as folder:
        weights = folder / "tiny.safetensors"
        described = sidecar(weights)
        return build_from(spec, described["model"], weights, described, device)


KIND = Kind(
    build,
    {
        "": Variant(
            network={},
            layer="last block, patch tokens",
            norm="final LayerNorm",
            input_size=64,
            output=(8, 8, 128),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            resize=None,
        )
    },
)
