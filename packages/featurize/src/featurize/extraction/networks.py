"""The networks that a recipe names (its encoder, the codec of `z_0`, the text encoder): described, or loaded once as a check."""

from __future__ import annotations

import json
from dataclasses import dataclass

from featurize.codecs import CodecDescription, CodecSpec, describe_codec, load_codec, parse_codec
from featurize.codecs import kinds as codec_kinds
from featurize.encoders import EncoderDescription, EncoderSpec, describe_encoder, kind_of, load_encoder
from featurize.execution.devices import device_of_worker
from featurize.execution.precision import device_name
from featurize.images.on_device import require_nvjpeg
from featurize.recipe import Features
from featurize.text.tower import IMPORTS as TEXT_IMPORTS
from featurize.text.tower import load_text_encoder, text_spec


@dataclass(frozen=True)
class Networks:
    """Encoder and codec of an extraction, without their weights in memory."""

    encoder: EncoderDescription
    codec: CodecDescription


def encoder_spec(features: Features) -> EncoderSpec:
    """The encoder that a recipe or the command line names."""
    model_args = json.dumps(features.model_args, sort_keys=True)
    return EncoderSpec(features.encoder, features.weights, model_args, features.precision)


def codec_spec(features: Features) -> CodecSpec:
    """The codec of `z_0` that a recipe or the command line names."""
    return parse_codec(
        features.z0,
        features.z0_weights,
        features.z0_scale,
        features.source,
        features.z0_crop,
        features.z0_precision,
    )


def describe_networks(features: Features) -> Networks:
    """Encoder and codec as they are described. Raises UserError for unknown names and missing weights."""
    return Networks(describe_encoder(encoder_spec(features)), describe_codec(codec_spec(features)))


def check_networks(features: Features) -> str:
    """Load all networks once: weights that don't fit are found before any image is read. The name of the worker's device.

    Raises UserError where that can't decode as the recipe says, too.
    """
    if features.decoder == "nvjpeg":
        require_nvjpeg(device_of_worker())
    load_encoder(encoder_spec(features), "cpu")
    load_codec(codec_spec(features))
    if features.text is not None:
        load_text_encoder(text_spec(features), "cpu")
    return device_name(device_of_worker())


def heavy_imports(features: Features) -> list[str]:
    """The modules that take seconds to import, for workers that are forked from one process that has them."""
    codec = codec_kinds()[codec_spec(features).name]
    text = TEXT_IMPORTS if features.text is not None else ()
    modules = [*kind_of(features.encoder).imports, *codec.imports, *text, "featurize.extraction.block"]
    return list(dict.fromkeys(modules))
