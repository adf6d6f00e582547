"""What an extraction is to leave behind: the arrays, and everything that decides their values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featurize.basis.svd import Basis, load_basis
from featurize.codecs import CodecDescription
from featurize.codecs import kinds as codec_kinds
from featurize.encoders import EncoderDescription
from featurize.errors import UserError
from featurize.extraction.captions import captions_spec, offsets_spec
from featurize.extraction.loader import INNER_BATCH
from featurize.extraction.networks import Networks
from featurize.extraction.scan import check_crop, check_strict
from featurize.images.crop import SQUARE, CropRule, InputSpec, parse_rule
from featurize.io.files import resolve_path
from featurize.recipe import OWN_BASIS, Features, Request, Shape
from featurize.store.layout import (
    base_path,
    basis_path,
    encoder_folder,
    is_sealed,
    labels_path,
    level_path,
    shape_name,
    z0_path,
)
from featurize.store.ledger import Ledger
from featurize.store.metadata import ArraySpec, existing_metadata
from featurize.text.tower import text_spec

MAX_ROWS_PER_BLOCK = 1024
MAX_BYTES_PER_BLOCK = 128 << 20  # of the largest array


@dataclass(frozen=True)
class Targets:
    """The arrays of one extraction. `text` are the embedded captions and their offsets, where the request has them; `other` is
    the encoder folder whose basis and standardisation are taken, if any."""

    labels: ArraySpec
    base: ArraySpec
    z0: ArraySpec
    text: tuple[ArraySpec, ...]
    levels: tuple[Shape, ...]
    other: Path | None

    @property
    def written(self) -> tuple[ArraySpec, ...]:
        """The arrays that are made of images, labels or captions; the levels come from the base store."""
        return (self.labels, self.base, self.z0, *self.text)

    @property
    def paths(self) -> list[Path]:
        """Every array but the labels, in the order in which they are reported."""
        levels = [level_path(self.base.path.parent, shape) for shape in self.levels]
        return [self.base.path, *levels, self.z0.path, *(spec.path for spec in self.text)]

    @property
    def are_written(self) -> bool:
        """Whether no network is needed any more."""
        return all(is_sealed(spec.path) for spec in self.written)

    @property
    def are_sealed(self) -> bool:
        return all(map(is_sealed, (self.labels.path, *self.paths)))


def targets_of(request: Request, root: Path, networks: Networks, ledger: Ledger) -> Targets:
    """Raises UserError for levels that the encoder can't give or that have `z_0`'s path, and for a basis that is not there."""
    features = request.features
    check_decoder(features, networks, parse_rule(ledger.crop))
    channels = base_channels(request, networks.encoder.name, networks.encoder.grid, networks.encoder.channels)
    rows_per_block = _rows_per_block_of(root) or choose_rows_per_block(
        ledger.rows, features.views, networks.encoder, channels, networks.codec
    )
    folder = encoder_folder(root, features.encoder)
    z0 = _z0_spec(root, ledger, features, rows_per_block, networks.codec)
    shared = next((shape for shape in request.levels if level_path(folder, shape) == z0.path), None)
    if shared is not None:
        raise UserError(
            f"The level {shape_name(shared)} and z_0 would both be {z0.path.relative_to(root)}, as encoder and codec have one "
            "name; give one of them another shape."
        )
    return Targets(
        labels=_labels_spec(root, ledger, rows_per_block),
        base=_base_spec(folder, ledger, features, rows_per_block, networks.encoder, channels),
        z0=z0,
        text=_text_specs(root, ledger, features),
        levels=request.levels,
        other=other_basis(features),
    )


def check_decoder(features: Features, networks: Networks, crop: CropRule) -> None:
    """Raises UserError where JPEGs may be decoded to less than encoder or codec see of them, and for --strict with nvJPEG."""
    if features.strict and features.decoder == "nvjpeg":
        raise UserError(
            "--strict refuses JPEGs that libjpeg warns of, and --decoder nvjpeg leaves them to the GPU; leave out one of the two."
        )
    encoder = InputSpec(crop.side(networks.encoder.input_size), networks.encoder.interpolation)
    needed = max(crop.least(encoder), crop.least(networks.codec.input))
    if 0 < features.least_side < needed:
        raise UserError(
            f"--decoder {features.decoder} gives less than encoder and codec see, {needed} pixels of the short side; make it "
            f"scaled:{needed}."
        )


def check_ledger(features: Features, root: Path, networks: Networks, ledger: Ledger) -> None:
    """Raises UserError for a root whose boxes were made by another crop rule, or that holds images that --strict refuses."""
    check_crop(root, ledger.crop, crop_rule(features, networks.encoder, ledger.crop))
    if features.strict:
        check_strict(root, ledger)


def crop_rule(features: Features, encoder: EncoderDescription, stored: str | None = None) -> CropRule:
    """What every encoder and codec sees of an image. Raises UserError for `official` where the encoder has none.

    A root whose `stored` rule is 0.1.0's form of the same crop keeps it: its values differ from torchvision's in a few places.
    """
    if features.crop == "square":
        return SQUARE
    rule = encoder.official_crop
    if rule is None:
        raise UserError(f"The encoder {encoder.name} has no published evaluation crop; use --crop square.")
    former = CropRule(rule.resize, encoder.input_size, between_pixels=True)
    return former if stored == str(former) else rule


def with_basis(spec: ArraySpec, basis: Basis) -> ArraySpec:
    """A base store's spec with the attributes that its basis decides."""
    attributes = {"basis_sha256": basis.sha256, "explained_variance": basis.explained[: spec.shape[-1]].tolist()}
    return replace(spec, attributes=spec.attributes | attributes)


def base_channels(request: Request, encoder: str, grid: tuple[int, int], channels: int) -> int:
    """K: as many as the request says, and never fewer than a level needs or more than the encoder has.

    `grid` (H, W) and `channels` D are those of the encoder's map. Raises UserError for levels that it can't give.
    """
    for shape in request.levels:
        if shape[2] > channels:
            raise UserError(f"The level {shape_name(shape)} asks for {shape[2]} channels; {encoder} has {channels}.")
        if shape[0] > grid[0] or shape[1] > grid[1]:
            raise UserError(f"The level {shape_name(shape)} is larger than the {grid[0]}x{grid[1]} grid of {encoder}.")
    wanted = max([request.features.base_channels, *(shape[2] for shape in request.levels)])
    return min(wanted, channels)


def choose_rows_per_block(
    rows: int, views: int, encoder: EncoderDescription, channels: int, codec: CodecDescription
) -> int:
    """A power of two, for at least four blocks where there are rows enough, and bounded in bytes.

    A block is whole inner batches, whatever the bounds: the network's time on a batch's padding would be lost.
    """
    h, w, _ = codec.latent_shape
    bytes_per_row = 2 * views * max(encoder.grid[0] * encoder.grid[1] * channels, h * w * codec.stored_channels)
    ceiling = max(1, min(MAX_ROWS_PER_BLOCK, MAX_BYTES_PER_BLOCK // bytes_per_row))
    wanted = max(INNER_BATCH, 1 << (max(1, -(-rows // 8)) - 1).bit_length())
    return max(INNER_BATCH // views, min(wanted, 1 << (ceiling.bit_length() - 1)))


def _rows_per_block_of(root: Path) -> int | None:
    """A root's rows per block are decided once: a second encoder's arrays have the blocks of the first's."""
    labels = existing_metadata(labels_path(root))
    return None if labels is None else labels.chunks[0]


def other_basis(features: Features) -> Path | None:
    """The encoder folder of the store root that `--basis` names."""
    if features.basis in (None, OWN_BASIS):
        return None
    return encoder_folder(resolve_path(str(features.basis)), features.encoder)


def _basis_rule(features: Features, ledger: Ledger) -> dict[str, Any]:
    """How the basis comes about: fitted on a subset of these images, or taken from another store."""
    folder = other_basis(features)
    if folder is not None:
        return {"taken": load_basis(basis_path(folder)).sha256}
    return {
        "fitted_on": "the rows with the smallest SHA-256 of their keys",
        "rows": min(features.basis_rows, ledger.rows),
    }


def _rows_provenance(ledger: Ledger, features: Features) -> dict[str, Any]:
    """What decides the rows of the base store and of `z_0` alike."""
    return {
        "pictures_sha256": ledger.images_sha256,
        "keys_sha256": ledger.keys_sha256,
        "crop": ledger.crop,
        "views": features.views,
        "dtype": "float16",
        # Not in stores of 0.1.0, which ignore profiles too.
        **({} if features.icc == "ignore" else {"icc": features.icc}),
        **_decoder(features),
    }


def _decoder(features: Features) -> dict[str, str]:
    """Not in stores of earlier versions, whose images are Pillow's."""
    return {} if features.decoder == "pillow" else {"decoder": features.decoder}


def _labels_spec(root: Path, ledger: Ledger, rows_per_block: int) -> ArraySpec:
    return ArraySpec(
        path=labels_path(root),
        kind="labels",
        shape=(ledger.rows,),
        dtype="int64",
        rows_per_block=rows_per_block,
        keys_sha256=ledger.keys_sha256,
        provenance={"labels_sha256": ledger.labels_sha256},
        attributes={"classes": list(ledger.classes)} if ledger.classes else {},
    )


def _base_spec(
    folder: Path, ledger: Ledger, features: Features, rows_per_block: int, encoder: EncoderDescription, channels: int
) -> ArraySpec:
    return ArraySpec(
        path=base_path(folder),
        kind="base",
        shape=(ledger.rows, features.views, *encoder.grid, channels),
        dtype="float16",
        rows_per_block=rows_per_block,
        keys_sha256=ledger.keys_sha256,
        provenance={
            **_rows_provenance(ledger, features),
            "encoder": encoder.identity,
            "basis": _basis_rule(features, ledger),
            "channels": channels,
        },
        attributes={
            "encoder": encoder.name,
            "source": ledger.source,
            "options": {
                "encoder": features.encoder,
                "weights": features.weights,
                "model_args": features.model_args,
                "precision": features.precision,
                "icc": features.icc,
                **_decoder(features),
                "views": features.views,
                "basis_tolerance": features.basis_tolerance,
            },
        },
    )


def _z0_spec(root: Path, ledger: Ledger, features: Features, rows_per_block: int, codec: CodecDescription) -> ArraySpec:
    h, w, _ = codec.latent_shape
    return ArraySpec(
        path=z0_path(root, codec.name, codec.latent_shape),
        kind="z0",
        shape=(ledger.rows, features.views, h, w, codec.stored_channels),
        dtype="float16",
        rows_per_block=rows_per_block,
        keys_sha256=ledger.keys_sha256,
        provenance={**_rows_provenance(ledger, features), "codec": codec.identity},
        attributes={
            "latent_shape": list(codec.latent_shape),
            "codec": codec.attributes,
            "source": ledger.source,
            "options": {
                "z0": features.z0,
                "z0_crop": features.z0_crop,
                "icc": features.icc,
                **_decoder(features),
                "z0_weights": features.z0_weights,
                # Not in stores of earlier versions, which are float32.
                **({} if features.z0_precision == "float32" else {"z0_precision": features.z0_precision}),
                "z0_scale": codec.attributes["scale"] if codec_kinds()[codec.name].needs_weights else None,
                "views": features.views,
            },
        },
    )


def _text_specs(root: Path, ledger: Ledger, features: Features) -> tuple[ArraySpec, ...]:
    if features.text is None:
        return ()
    return captions_spec(root, ledger, text_spec(features)), offsets_spec(root, ledger)
