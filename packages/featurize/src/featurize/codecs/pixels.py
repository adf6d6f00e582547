"""`pixels:SIDE`: the image itself, uint8 / 127.5 - 1."""

from __future__ import annotations

from featurize.codecs.codec import Codec, CodecDescription, CodecSpec, Kind, described, loaded


def describe(spec: CodecSpec) -> CodecDescription:
    """Pixels as a latent of side x side x 3; float16 holds every value apart."""
    attributes = {"name": "pixels", "size": spec.size, "moments": False, "scale": 1.0}
    return described(spec, (spec.size, spec.size, 3), 3, attributes)


def build(spec: CodecSpec, description: CodecDescription) -> Codec:
    """Nothing is loaded."""
    import torch

    return loaded(description, lambda x_BHWC: torch.as_tensor(x_BHWC, device=spec.device).float() / 127.5 - 1.0)


KIND = Kind(describe, build, lambda side: ((side, side, 3), 3), needs_weights=False)
