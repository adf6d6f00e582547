"""Codecs of `z_0`, the level that is decoded to an image. One file a codec, one line each in `registry`.

Like an encoder, a codec is *described* without torch and *loaded* where images are encoded. May import errors, io,
images and checkpoints. The names below are the folder's interface.
"""

from featurize.codecs.codec import (
    Codec,
    CodecDescription,
    CodecSpec,
    Kind,
    cells_per_side,
    described,
    encode_with,
    loaded,
)
from featurize.codecs.registry import describe_codec, kinds, load_codec, parse_codec

__all__ = [
    "Codec",
    "CodecDescription",
    "CodecSpec",
    "Kind",
    "cells_per_side",
    "describe_codec",
    "described",
    "encode_with",
    "kinds",
    "load_codec",
    "loaded",
    "parse_codec",
]
