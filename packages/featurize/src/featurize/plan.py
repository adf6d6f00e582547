"""What an extraction is to leave behind: the arrays, and everything that decides their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurize import basis as basis_
from featurize.codecs import Codec
from featurize.encoders import Encoder
from featurize.errors import UserError
from featurize.ledger import Ledger
from featurize.recipe import Request
from featurize.store import ArraySpec, folder_name

MAX_BLOCK_ROWS = 1024
MAX_BLOCK_BYTES = 128 << 20  # of the largest array


def base_channels(request: Request, encoder: Encoder) -> int:
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


def rows_a_block(rows: int, views: int, encoder: Encoder, channels: int, codec: Codec) -> int:
    """Rows a block: a power of two, at least eight blocks where there are rows enough, and bounded in bytes."""
    h, w, _ = codec.latent_shape
    bytes_a_row = 2 * views * max(encoder.grid[0] * encoder.grid[1] * channels, h * w * codec.stored_channels)
    ceiling = max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // bytes_a_row))
    wanted = max(16, 1 << (max(1, -(-rows // 8)) - 1).bit_length())
    return min(wanted, 1 << (ceiling.bit_length() - 1))


def other_basis(basis_root: str | None, encoder: str) -> Path | None:
    return Path(basis_root).expanduser().resolve() / folder_name(encoder) if basis_root else None


def basis_rule(basis_root: str | None, encoder: str, basis_rows: int, ledger: Ledger) -> dict[str, Any]:
    """How the basis comes about: fitted on a subset of these pictures, or taken from another store."""
    folder = other_basis(basis_root, encoder)
    if folder is not None:
        return {"taken": basis_.load_basis(folder / "basis.safetensors").sha256}
    return {
        "fitted_on": "the rows with the smallest SHA-256 of their keys",
        "rows": min(basis_rows, ledger.rows),
    }


def _rows_provenance(ledger: Ledger, views: int, block_rows: int) -> dict[str, Any]:
    """What decides the rows of the base store and of `z_0` alike."""
    return {
        "source": ledger.source,
        "pictures_sha256": ledger.pictures_sha256,
        "keys_sha256": ledger.keys_sha256,
        "views": views,
        "dtype": "float16",
        "block_rows": block_rows,
    }


def base_spec(
    folder: Path,
    ledger: Ledger,
    views: int,
    block_rows: int,
    encoder: Encoder,
    channels: int,
    rule: dict[str, Any],
) -> ArraySpec:
    return ArraySpec(
        path=folder / "base.zarr",
        kind="base",
        shape=(ledger.rows, views, *encoder.grid, channels),
        dtype="float16",
        block_rows=block_rows,
        keys_sha256=ledger.keys_sha256,
        provenance={
            **_rows_provenance(ledger, views, block_rows),
            "encoder": encoder.identity,
            "basis": rule,
            "channels": channels,
        },
        attributes={"encoder": encoder.name},
    )


def z0_spec(root: Path, ledger: Ledger, views: int, block_rows: int, codec: Codec) -> ArraySpec:
    h, w, c = codec.latent_shape
    return ArraySpec(
        path=root / codec.name / f"{h}x{w}x{c}.zarr",
        kind="z0",
        shape=(ledger.rows, views, h, w, codec.stored_channels),
        dtype="float16",
        block_rows=block_rows,
        keys_sha256=ledger.keys_sha256,
        provenance={
            **_rows_provenance(ledger, views, block_rows),
            "codec": codec.identity,
        },
        attributes={"latent_shape": [h, w, c], "codec": codec.attributes},
    )
