"""The request of an extraction: the `features` section of a recipe and the shapes of its levels.

May import errors, io, and of checkpoints and sources the names of what is built in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from featurize.checkpoints.autoencoder_kl import EMBEDDED
from featurize.errors import UserError
from featurize.io.home import expand_home
from featurize.io.yaml import read_yaml
from featurize.sources import is_held_out
from featurize.sources.class_lists import BUILT_IN
from featurize.sources.outside_text import printable

DEFAULT_RECIPE = Path("nested.yaml")
SECTIONS = (
    "name", "seed", "features", "levels", "denoiser", "process", "training", "sampling", "evaluation", "grid",
)  # fmt: skip

# What belongs to the network that a key names, and not to another.
OF_NETWORK = {"encoder": ("weights", "model_args"), "z0": ("z0_weights", "z0_scale", "z0_precision")}
OWN_BASIS = "own"  # as basis: fit one, even on held-out images

Shape = tuple[int, int, int]


class Features(BaseModel):
    """One extraction; field names are the recipe's keys, and the options of `featurize extract`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str | None = None
    out: str
    encoder: str = "tiny"
    weights: str | None = None
    model_args: dict[str, Any] = {}
    precision: Literal["float32", "bfloat16"] = "float32"
    crop: Literal["square", "official"] = "square"
    icc: Literal["ignore", "srgb"] = "ignore"
    decoder: str = "pillow"
    strict: bool = False
    z0: str = "pixels:32"
    z0_crop: Literal["same", "lanczos", "adm"] = "same"
    z0_weights: str | None = None
    z0_scale: float | None = None
    z0_precision: Literal["float32", "bfloat16"] = "float32"
    text: Literal["clip"] | None = None
    text_weights: str | None = None
    views: int = Field(default=1, ge=1, le=2)
    limit: int | None = Field(default=None, ge=1)
    split: Literal["train", "val"] = "train"
    classes: str | None = None
    base_channels: int = Field(default=64, ge=1)
    basis: str | None = None
    basis_rows: int = Field(default=8192, ge=1)
    basis_tolerance: float = Field(default=0.01, ge=0)
    max_bad: int | str = 100

    @property
    def least_side(self) -> int:
        """The short side in pixels that JPEGs are decoded to at least; 0 where they are decoded whole."""
        return int(self.decoder.partition(":")[2] or 0)

    @field_validator("decoder")
    @classmethod
    def _known_decoder(cls, value: str) -> str:
        if not re.fullmatch(r"pillow|nvjpeg|scaled:[1-9]\d*", value):
            raise ValueError("it must be pillow, nvjpeg, or scaled: and a side in pixels, like scaled:256")
        return value

    @field_validator("max_bad", mode="before")
    @classmethod
    def _count_or_share(cls, value: object) -> int | str:
        text = str(value)
        if re.fullmatch(r"\d+", text):
            return int(text)
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return text
        raise ValueError("it must be a count like 100 or a share like 1%")


class Request(BaseModel):
    """A whole, valid request: the features and the upper levels to derive from them."""

    model_config = ConfigDict(frozen=True)

    features: Features
    levels: tuple[Shape, ...]


def check_basis_choice(features: Features) -> None:
    """Raises UserError where held-out images would silently get a basis of their own: their latents could not be compared
    with the training images'."""
    if features.basis is None and features.source is not None and is_held_out(features.source, features.split):
        raise UserError(
            f"The pictures of {features.source} are held out, so they need the training pictures' basis and standardisation: "
            f"give --basis STORE, the store root of the training split, or --basis {OWN_BASIS} to fit one on them all the same."
        )


def parse_shape(text: str) -> Shape:
    """`HxWxC` as three positive integers."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.strip())
    if match is None:
        raise UserError(f"{text!r} can't be a level's shape; write height x width x channels, like 8x8x64.")
    height, width, channels = (int(group) for group in match.groups())
    return height, width, channels


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """A comma-separated list of level shapes, without repeats."""
    return tuple(dict.fromkeys(parse_shape(part) for part in text.split(",") if part.strip()))


def read_request(recipe: Path | None, overrides: dict[str, Any], levels: str | None) -> Request:
    """The recipe's features with the command line's options laid over them.

    Paths in the recipe are relative to its file, those on the command line to the working directory. What the recipe says of
    its encoder's or codec's network is left out where the options name another encoder or codec.
    Raises UserError for a missing or invalid recipe and for options that no extraction can have.
    """
    document, root = _load(recipe)
    section = _anchored(document.get("features") or {}, root)
    for key, own in OF_NETWORK.items():
        if key in overrides and _network(key, overrides) != _network(key, section):
            section = {name: value for name, value in section.items() if name not in own}
    section |= overrides
    if "out" not in section:
        raise UserError("Where should the stores go? Give --out DIR, or a recipe (nested.yaml) with features.out.")
    features = _validated(section, overrides.keys())
    if levels is not None:
        return Request(features=features, levels=parse_shapes(levels))
    # The first level of a recipe is z_0, which the codec makes; the others come from the encoder.
    return Request(features=features, levels=tuple(_level_shapes(document)[1:]))


def with_absolute_paths(features: Features) -> Features:
    """The features, their paths relative to the working directory made absolute: to be stored, and read from another one."""
    section = _anchored(features.model_dump(exclude_unset=True), Path.cwd())
    return _validated(section, Features.model_fields)


def _network(key: str, section: dict[str, Any]) -> str:
    """The encoder or, without the image's side, the codec that a section names."""
    name = str(section.get(key))
    return name.partition(":")[0] if key == "z0" else name


def _load(path: Path | None) -> tuple[dict[str, Any], Path]:
    if path is None and not DEFAULT_RECIPE.exists():
        return {}, Path.cwd()
    path = path or DEFAULT_RECIPE
    try:
        document = read_yaml(path)
    except OSError as error:
        raise UserError(
            f"The recipe {path} can't be read ({error.strerror}); give another with --recipe FILE."
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"The recipe {path} holds no keys; docs/recipe.md shows what one looks like.")
    for key in document:
        if key not in SECTIONS:
            raise UserError(f"The recipe {path} has an unknown key {str(key)!r}{_nearest(str(key), SECTIONS)}")
    return document, path.resolve().parent


def _anchored(section: Any, root: Path) -> dict[str, Any]:
    """The section with its relative paths made absolute."""
    if not isinstance(section, dict):
        raise UserError(f"The recipe's key features must hold a mapping, not {section!r}.")
    anchored = {str(key): value for key, value in section.items()}
    for key in ("out", "weights", "z0_weights", "text_weights", "basis"):
        value = anchored.get(key)
        if isinstance(value, str) and not _is_name(key, value, root):
            anchored[key] = _below(root, value)
    source = anchored.get("source")
    if isinstance(source, str) and ":" in source and not source.startswith("scenes"):
        kind, _, addresses = source.partition(":")
        anchored["source"] = f"{kind}:" + "::".join(_below(root, address) for address in addresses.split("::"))
    if isinstance(anchored.get("classes"), str) and anchored["classes"] not in BUILT_IN:
        anchored["classes"] = _below(root, anchored["classes"])
    return anchored


def _below(root: Path, address: str) -> str:
    """An address: none or a remote one as it is, `~` the home folder, else below the root."""
    return address if not address or "://" in address else str(root / expand_home(address))


def _is_name(key: str, value: str, root: Path) -> bool:
    """Whether a value is a word (`own`) or names weights (`tiny`, `sd-v1`) rather than being a path."""
    if not key.endswith("weights"):
        return (key, value) == ("basis", OWN_BASIS)
    return value in EMBEDDED or not (any(mark in value for mark in "/\\.~") or (root / value).exists())


def _validated(section: dict[str, Any], options: Collection[str]) -> Features:
    """Raises UserError that names a wrong key, or the option where the value comes from the command line."""
    try:
        features = Features(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"Unknown key {f'features.{key}'!r}{_nearest(key, tuple(Features.model_fields))}") from None
        problem = re.sub(r"^value error, ", "", first["msg"].lower())
        raise UserError(f"{_where(key, options)} is {first['input']!r}; {problem}.") from None
    for key, value in features:
        if isinstance(value, str) and printable(value) != value:
            raise UserError(
                f"{_where(key, options)} is {printable(value)!r}; that is not UTF-8 text: rename it, or link to it."
            )
    return features


def _where(key: str, options: Collection[str]) -> str:
    option = "SOURCE" if key == "source" else f"--{key.replace('_', '-')}"
    return option if key.partition(".")[0] in options else f"'features.{key}'"


def _level_shapes(document: dict[str, Any]) -> list[Shape]:
    levels = document.get("levels") or []
    if not isinstance(levels, list) or not all(isinstance(level, dict) and "shape" in level for level in levels):
        raise UserError("The recipe's key levels must hold a list of levels, each with a shape like 8x8x64.")
    return [parse_shape(str(level["shape"])) for level in levels]


def _nearest(key: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, choices, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(choices)}."


def choices(field: str) -> list[str]:
    """The values a Literal field allows, for the command line."""
    return list(get_args(Features.model_fields[field].annotation))
