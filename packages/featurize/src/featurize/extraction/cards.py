"""What a plan must know of an encoder and a codec, kept from one run to the next: no network is loaded to ask again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from featurize.execution.engine import Run
from featurize.images.crop import CropRule
from featurize.io.files import cache_folder, read_json, write_json
from featurize.recipe import Features
from featurize.versions import version

LIBRARIES = ("featurize", "torch", "timm", "open_clip_torch", "diffusers")
# Of this package: what decides an identity besides the weights.
CODE = ("encoders", "codecs", "checkpoints", "clip_files", "torchscript", "pictures")


@dataclass(frozen=True)
class EncoderCard:
    """An encoder without its network: its name, its map's (H, W) and D, everything that decides its values, and the crop of
    its published evaluation where it has one."""

    name: str
    grid: tuple[int, int]
    channels: int
    identity: dict[str, Any]
    official_crop: CropRule | None


@dataclass(frozen=True)
class CodecCard:
    """A codec without its network: the latent's (h, w, c), the stored channels, and what the store says of it."""

    name: str
    latent_shape: tuple[int, int, int]
    stored_channels: int
    attributes: dict[str, Any]
    identity: dict[str, Any]


@dataclass(frozen=True)
class Cards:
    """Both, and the files they were read from with their sizes and times."""

    encoder: EncoderCard
    codec: CodecCard
    files: dict[str, list[int] | None]


def known_cards(features: Features) -> Cards | None:
    """The cards kept from an earlier run with the same options, libraries and files; None when there are none."""
    path = _path(features)
    if not path.is_file():
        return None
    try:
        document = read_json(path)
        encoder, codec = document["encoder"], document["codec"]
        rule = encoder["official_crop"]
        cards = Cards(
            EncoderCard(**encoder | {"grid": tuple(encoder["grid"]), "official_crop": rule and CropRule(**rule)}),
            CodecCard(**codec | {"latent_shape": tuple(codec["latent_shape"])}),
            document["files"],
        )
    except Exception:  # a cache that can't be read is no cache
        return None
    return cards if all(_stamp(Path(name)) == stamp for name, stamp in cards.files.items()) else None


def make_cards(features: Features, run: Run) -> Cards:
    """Load encoder and codec once, on a worker: weights that are missing or don't fit are found before any picture is read."""
    [(_, cards)] = run(_look, [features])
    with suppress(OSError):  # without a place to keep them, they are made again next time
        write_json(_path(features), asdict(cards))
    return cards


def heavy_imports(features: Features) -> list[str]:
    """The modules that take seconds to import, for workers that are forked from one process that has them."""
    modules = ["torch", "timm", "featurize.encoders.tiny", "featurize.extraction.block"]
    if features.z0.startswith("pixels") and not features.encoder.startswith("vae"):
        return modules
    return [*modules, "diffusers.models.autoencoders.autoencoder_kl"]


def _look(features: Features) -> Cards:
    from featurize.codecs import load_codec
    from featurize.encoders import load_encoder
    from featurize.extraction.block import codec_spec, encoder_spec

    encoder = load_encoder(encoder_spec(features), "cpu")
    codec = load_codec(codec_spec(features))
    used = [path for path in (features.weights, features.z0_weights) if path is not None]
    used += [str(path) for path in (getattr(encoder, "weights", None), codec.attributes.get("weights")) if path]
    # Numbers and lists are what JSON gives back, so that a card made now and one kept are the same.
    plain = json.loads(json.dumps({"e": encoder.identity, "c": codec.identity, "a": codec.attributes}))
    return Cards(
        EncoderCard(
            encoder.name,
            encoder.grid,
            encoder.channels,
            plain["e"],
            encoder.official_crop,
        ),
        CodecCard(codec.name, codec.latent_shape, codec.stored_channels, plain["a"], plain["c"]),
        {name: _stamp(Path(name)) for path in used for name in _around(Path(path).expanduser())},
    )


def _around(weights: Path) -> list[str]:
    """A weights file and the JSON files that may describe it."""
    if weights.is_dir():
        return [str(path.resolve()) for path in weights.iterdir() if path.is_file()]
    return [str(path.absolute()) for path in (weights, weights.with_suffix(".json"), weights.parent / "config.json")]


def _stamp(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def _path(features: Features) -> Path:
    asked = {
        key: getattr(features, key)
        for key in ("encoder", "weights", "model_args", "precision", "z0", "z0_weights", "z0_scale")
    }
    code = hashlib.sha256()
    for path in sorted(Path(str(files("featurize"))).rglob("*")):
        name = path.relative_to(str(files("featurize")))
        if path.suffix == ".py" and name.parts[0].removesuffix(".py") in CODE:
            code.update(path.read_bytes())
        elif name.parts[0] == "weights" and path.is_file():
            code.update(json.dumps(_stamp(path)).encode())
    asked["kind of source"] = (features.source or "").partition(":")[0]  # COCO has a latent scale of its own
    made_by = {name: version(name) for name in LIBRARIES} | {"code": code.hexdigest()}
    key = hashlib.sha256(json.dumps([asked, made_by], sort_keys=True).encode()).hexdigest()
    return cache_folder() / "cards" / f"{key[:32]}.json"
