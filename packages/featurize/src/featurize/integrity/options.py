"""The options that arrays and roots were made with, from what is stored beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featurize.codecs import describe_codec
from featurize.encoders import describe_encoder
from featurize.errors import UserError
from featurize.execution.progress import last_request
from featurize.extraction.networks import codec_spec, encoder_spec
from featurize.recipe import Features
from featurize.store.layout import log_path, root_of
from featurize.store.metadata import ArraySpec, changed_keys
from featurize.text.tower import TextSpec, describe_text_encoder


def requested_features(root: Path) -> Features | None:
    """The options of the last extraction into a root, from its log; None where the log does not have them."""
    try:
        return None if (options := last_request(log_path(root))) is None else Features(**options)
    except ValidationError:  # of another version
        return None


def features_of(spec: ArraySpec) -> Features:
    """The options that a base store or `z_0` was made with. Raises UserError when the encoder or codec is another now."""
    features = Features(out="", **spec.attributes["options"])
    if spec.kind == "base":
        identity = describe_encoder(encoder_spec(features)).identity
        _check_same(spec, "encoder", identity, features.encoder, features.weights)
    else:
        _check_same(spec, "codec", describe_codec(codec_spec(features)).identity, features.z0, features.z0_weights)
    return features


def text_encoder_of(spec: ArraySpec) -> TextSpec:
    """The text encoder that captions were embedded with. Raises UserError when that text encoder is another now."""
    options = spec.attributes.get("options")
    if options is None:  # in arrays of earlier versions
        features = requested_features(root_of(spec.path))
        options = {"text": "clip", "text_weights": None if features is None else features.text_weights}
    encoder = TextSpec(options["text"], options["text_weights"])
    identity = describe_text_encoder(encoder).identity
    _check_same(spec, "encoder", identity, f"text encoder {encoder.name}", encoder.weights)
    return encoder


def _check_same(spec: ArraySpec, kind: str, identity: dict[str, Any], network: str, weights: str | None) -> None:
    if changed := changed_keys(spec.provenance[kind], identity):
        raise UserError(
            f"{spec.path} was made with another {network} (differs in: {', '.join(changed)}); put those weights back to "
            f"{weights or 'where they were'} to make blocks again."
        )
