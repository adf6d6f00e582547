"""Frozen encoders: an image to a map of features. One file an encoder, one line each in `registry`.

An encoder is *described* (grid, channels, layer, digest of its weights) without torch and without loading it, and *loaded*
where images are encoded. So no file here but `vit`, `onednn` and `check` imports torch, timm or open_clip at its top. May
import errors, io, images and checkpoints. The names below are the folder's interface.
"""

from featurize.encoders.encoder import (
    Encoder,
    EncoderDescription,
    EncoderSpec,
    Kind,
    Variant,
    described,
    encode,
    loaded,
)
from featurize.encoders.registry import describe_encoder, kind_of, kinds, known_names, load_encoder

__all__ = [
    "Encoder",
    "EncoderDescription",
    "EncoderSpec",
    "Kind",
    "Variant",
    "describe_encoder",
    "described",
    "encode",
    "kind_of",
    "kinds",
    "known_names",
    "load_encoder",
    "loaded",
]
