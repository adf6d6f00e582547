"""Codecs of `z_0`, the level that is decoded to an image. One file a codec, one line each in `registry`.

Like an encoder, a codec is *described* without torch and *loaded* where images are encoded. May import errors, io,
images and checkpoints. The names below are the folder's interface.
"""

from featurize.codecs.codec import Codec, CodecDescription, CodecSpec, Kind
from featurize.codecs.registry import describe_codec, kinds, load_codec, parse_codec

__all__ = ["Codec", "CodecDescription", "CodecSpec", "Kind", "describe_codec", "kinds", "load_codec", "parse_codec"]
