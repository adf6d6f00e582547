"""`pixels:SIDE`: the picture itself, uint8 / 127.5 - 1."""

from __future__ import annotations

import numpy as np

from featurize.codecs import Codec, CodecSpec


def build(spec: CodecSpec) -> Codec:
    """Pixels as a latent of side x side x 3; float16 holds every value apart."""
    attributes = {"name": "pixels", "size": spec.size, "moments": False, "scale": 1.0}
    return Codec(
        name="pixels",
        size=spec.size,
        interpolation="bicubic",
        latent_shape=(spec.size, spec.size, 3),
        stored_channels=3,
        encode=lambda x_BHWC: x_BHWC.astype(np.float32) / 127.5 - 1.0,
        attributes=attributes,
        identity=attributes | {"interpolation": "bicubic"},
    )
