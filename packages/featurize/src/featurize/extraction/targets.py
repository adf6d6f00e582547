"""What an extraction is to leave behind: the arrays, and everything that decides their values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featurize.basis import svd as basis_
from featurize.errors import UserError
from featurize.extraction.block import INNER_BATCH
from featurize.extraction.cards import Cards, CodecCard, EncoderCard
from featurize.images.crop import SQUARE, CropRule
from featurize.io.files import resolve_path
from featurize.recipe import OWN_BASIS, Features, Request, Shape
from featurize.store.ledger import Ledger
from featurize.store.metadata import header_of, is_there
from featurize.store.store import ArraySpec, folder_name, is_sealed

MAX_BLOCK_ROWS = 1024
MAX_BLOCK_BYTES = 128 << 20  # of the largest array


@dataclass(frozen=True)
class Plan:
    """The arrays of one extraction. `other` is the encoder folder whose basis and standardisation are taken, if any."""

    labels: ArraySpec
    base: ArraySpec
    z0: ArraySpec
    levels: tuple[Shape, ...]
    basis: Path
    other: Path | None

    @property
    def channels(self) -> int:
        return self.base.shape[-1]

    @property
    def block_rows(self) -> int:
        return self.base.block_rows

    @property
    def is_done(self) -> bool:
        """Whether every array is sealed."""
        levels = [self.base.path.parent / f"{'x'.join(map(str, shape))}.zarr" for shape in self.levels]
        return all(is_sealed(path) for path in (self.labels.path, self.base.path, self.z0.path, *levels))


def plan_of(request: Request, root: Path, cards: Cards, ledger: Ledger) -> Plan:
    """Raises UserError for levels that the encoder can't give, and for a basis that is not there."""
    features = request.features
    channels = base_channels(request, cards.encoder)
    block_rows = _block_rows_of(root) or rows_a_block(ledger.rows, features.views, cards.encoder, channels, cards.codec)
    folder = root / folder_name(features.encoder)
    return Plan(
        labels=_labels_spec(root, ledger, block_rows),
        base=_base_spec(folder, ledger, features, block_rows, cards.encoder, channels),
        z0=_z0_spec(root, ledger, features, block_rows, cards.codec),
        levels=request.levels,
        basis=folder / "basis.safetensors",
        other=other_basis(features),
    )


def crop_rule(features: Features, encoder: EncoderCard) -> CropRule:
    """The box that every encoder and codec sees. Raises UserError for `official` where the encoder has none."""
    if features.crop == "square":
        return SQUARE
    if encoder.official_crop is None:
        raise UserError(f"The encoder {encoder.name} has no published evaluation crop; use --crop square.")
    return encoder.official_crop


def with_basis(spec: ArraySpec, basis: basis_.Basis) -> ArraySpec:
    """The base store, once its basis is known."""
    known = {"basis_sha256": basis.sha256, "explained_variance": basis.explained[: spec.shape[-1]].tolist()}
    return replace(spec, attributes=spec.attributes | known)


def base_channels(request: Request, encoder: EncoderCard) -> int:
    """K: as many as asked for, and never fewer than a level needs or more than the encoder has."""
    for height, width, channels in request.levels:
        name = f"{height}x{width}x{channels}"
        if channels > encoder.channels:
            raise UserError(f"The level {name} asks for {channels} channels; {encoder.name} has {encoder.channels}.")
        if height > encoder.grid[0] or width > encoder.grid[1]:
            raise UserError(
                f"The level {name} is larger than the {encoder.grid[0]}x{encoder.grid[1]} grid of {encoder.name}."
            )
    wanted = max([request.features.base_channels, *(channels for _, _, channels in request.levels)])
    return min(wanted, encoder.channels)


def rows_a_block(rows: int, views: int, encoder: EncoderCard, channels: int, codec: CodecCard) -> int:
    """Rows a block: a power of two, for at least four blocks where there are rows enough, and bounded in bytes.

    A block is whole inner batches, whatever the bounds: the network's time on a batch's padding would be lost.
    """
    h, w, _ = codec.latent_shape
    bytes_a_row = 2 * views * max(encoder.grid[0] * encoder.grid[1] * channels, h * w * codec.stored_channels)
    ceiling = max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // bytes_a_row))
    wanted = max(INNER_BATCH, 1 << (max(1, -(-rows // 8)) - 1).bit_length())
    return max(INNER_BATCH // views, min(wanted, 1 << (ceiling.bit_length() - 1)))


def _block_rows_of(root: Path) -> int | None:
    """A root's rows a block are decided once: a second encoder's arrays have the blocks of the first's."""
    labels = root / "labels.zarr"
    return header_of(labels).chunks[0] if is_there(labels) else None


def other_basis(features: Features) -> Path | None:
    """The encoder folder of the store root that `--basis` names."""
    if features.basis in (None, OWN_BASIS):
        return None
    return resolve_path(str(features.basis)) / folder_name(features.encoder)


def _basis_rule(features: Features, ledger: Ledger) -> dict[str, Any]:
    """How the basis comes about: fitted on a subset of these pictures, or taken from another store."""
    folder = other_basis(features)
    if folder is not None:
        return {"taken": basis_.load_basis(folder / "basis.safetensors").sha256}
    return {
        "fitted_on": "the rows with the smallest SHA-256 of their keys",
        "rows": min(features.basis_rows, ledger.rows),
    }


def _rows_provenance(ledger: Ledger, views: int) -> dict[str, Any]:
    """What decides the rows of the base store and of `z_0` alike."""
    return {
        "pictures_sha256": ledger.pictures_sha256,
        "keys_sha256": ledger.keys_sha256,
        "crop": ledger.crop,
        "views": views,
        "dtype": "float16",
    }


def _labels_spec(root: Path, ledger: Ledger, block_rows: int) -> ArraySpec:
    return ArraySpec(
        path=root / "labels.zarr",
        kind="labels",
        shape=(ledger.rows,),
        dtype="int64",
        block_rows=block_rows,
        keys_sha256=ledger.keys_sha256,
        provenance={"labels_sha256": ledger.labels_sha256},
        attributes={},
    )


def _base_spec(
    folder: Path, ledger: Ledger, features: Features, block_rows: int, encoder: EncoderCard, channels: int
) -> ArraySpec:
    return ArraySpec(
        path=folder / "base.zarr",
        kind="base",
        shape=(ledger.rows, features.views, *encoder.grid, channels),
        dtype="float16",
        block_rows=block_rows,
        keys_sha256=ledger.keys_sha256,
        provenance={
            **_rows_provenance(ledger, features.views),
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
                "views": features.views,
                "basis_tolerance": features.basis_tolerance,
            },
        },
    )


def _z0_spec(root: Path, ledger: Ledger, features: Features, block_rows: int, codec: CodecCard) -> ArraySpec:
    h, w, c = codec.latent_shape
    return ArraySpec(
        path=root / codec.name / f"{h}x{w}x{c}.zarr",
        kind="z0",
        shape=(ledger.rows, features.views, h, w, codec.stored_channels),
        dtype="float16",
        block_rows=block_rows,
        keys_sha256=ledger.keys_sha256,
        provenance={**_rows_provenance(ledger, features.views), "codec": codec.identity},
        attributes={
            "latent_shape": [h, w, c],
            "codec": codec.attributes,
            "source": ledger.source,
            "options": {
                "z0": features.z0,
                "z0_weights": features.z0_weights,
                "z0_scale": None if codec.name == "pixels" else codec.attributes["scale"],
                "views": features.views,
            },
        },
    )
