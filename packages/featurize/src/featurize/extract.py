"""The extraction: pictures -> one crop -> encoder and codec -> blocks of the base store and of `z_0` -> levels."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize import basis as basis_
from featurize.basis import Moments
from featurize.codecs import Codec, CodecSpec, load_codec, parse_codec
from featurize.encoders import Encoder, EncoderSpec, encode, load_encoder
from featurize.engine import Run, device_of_worker, engine, in_order
from featurize.errors import UserError
from featurize.ledger import Ledger, make_ledger
from featurize.levels import derive_level
from featurize.pictures import Box, crop, decode
from featurize.recipe import Request
from featurize.sources import Picture, list_pictures, read
from featurize.store import (
    ArraySpec,
    folder_name,
    is_sealed,
    moments_path,
    prepare,
    refuse_other,
    rows_of,
    seal,
    write_block,
)

log = logging.getLogger(__name__)

INNER_BATCH = 32  # views a forward pass: fixed and padded, so that no setting changes a rounding
MAX_BLOCK_ROWS = 1024
MAX_BLOCK_BYTES = 128 << 20  # of the largest array


@dataclass(frozen=True)
class Batch:
    """Pictures to encode, and how."""

    pictures: tuple[Picture, ...]
    boxes: tuple[Box, ...]
    encoder: EncoderSpec
    views: int


@dataclass(frozen=True)
class BlockTask:
    """One block of rows of the base store, of `z_0`, or of both."""

    block: int
    batch: Batch
    base: Path | None
    basis: Path
    channels: int
    z0: Path | None
    codec: CodecSpec


def extract(request: Request, workers: int | None, scheduler: str | None) -> list[Path]:
    """Do what is asked, or what is left of it; the paths of the sealed arrays. Everything there already is kept."""
    features = request.features
    root = Path(features.out).expanduser().resolve()
    spec = EncoderSpec(
        features.encoder,
        features.weights,
        json.dumps(features.model_args, sort_keys=True),
        features.precision,
    )
    # Both are loaded here first: a wrong weights file is found before any picture is read.
    encoder = load_encoder(spec, "cpu")
    codec_spec = parse_codec(features.z0, features.z0_weights, features.z0_scale)
    codec = load_codec(codec_spec)
    channels = _base_channels(request, encoder)
    if features.source is None:
        raise UserError("Which pictures? Name a SOURCE, or a recipe (nested.yaml) with features.source.")
    basis_folder = _basis_folder(features.basis, features.encoder)
    if basis_folder is not None:
        basis_.load_basis(basis_folder / "basis.safetensors")
    listing = list_pictures(features.source, features.split, features.limit)
    for remark in listing.remarks:
        log.warning(remark)

    if workers is None and len(listing.pictures) <= INNER_BATCH * 4:
        workers = 0  # starting workers would take longer than the work
    with engine(workers, scheduler) as run:
        ledger = make_ledger(root, features.source, listing, features.max_bad, run)
        if ledger.refused:
            log.warning("%d pictures are refused; the reasons are in %s.", ledger.refused, root / "rows.parquet")
        block_rows = _block_rows(ledger.rows, features.views, encoder, channels, codec)
        folder = root / folder_name(features.encoder)
        _write_labels(root, ledger, block_rows)

        basis_rule = _basis_rule(features.basis, features.encoder, features.basis_rows, ledger)
        base = _base_spec(folder, ledger, features.views, block_rows, encoder, channels, basis_rule)
        z0 = _z0_spec(root, ledger, features.views, block_rows, codec)
        refuse_other(base)
        refuse_other(z0)
        basis_path = folder / "basis.safetensors"
        if not is_sealed(base.path):
            _provide_basis(
                basis_path,
                base.fingerprint,
                features.basis,
                ledger,
                spec,
                features.views,
                features.basis_rows,
                run,
            )
        base = replace(base, attributes=base.attributes | _basis_attributes(basis_path, channels))
        base_todo, z0_todo = set(prepare(base)), set(prepare(z0))

        tasks = [
            BlockTask(
                block,
                _batch_of(ledger, rows_of(block, block_rows, ledger.rows), spec, features.views),
                base.path if block in base_todo else None,
                basis_path,
                channels,
                z0.path if block in z0_todo else None,
                codec_spec,
            )
            for block in sorted(base_todo | z0_todo)
        ]
        with tqdm(total=ledger.rows, desc="extracting", unit=" pictures", smoothing=0.1) as progress:
            progress.update(ledger.rows - sum(len(task.batch.pictures) for task in tasks))
            for _, count in run(_write_one, tasks):
                progress.update(count)
        if not is_sealed(base.path):
            seal(base, {"basis_drift": _drift(base, basis_path, channels)})
        if not is_sealed(z0.path):
            seal(z0)
        levels = [derive_level(base.path, shape, basis_folder, run) for shape in request.levels]
    return [base.path, *levels, z0.path]


def _base_channels(request: Request, encoder: Encoder) -> int:
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


def _block_rows(rows: int, views: int, encoder: Encoder, channels: int, codec: Codec) -> int:
    """Rows a block: a power of two, at least eight blocks where there are rows enough, and bounded in bytes."""
    h, w, _ = codec.latent_shape
    bytes_a_row = 2 * views * max(encoder.grid[0] * encoder.grid[1] * channels, h * w * codec.stored_channels)
    ceiling = max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // bytes_a_row))
    wanted = max(16, 1 << (max(1, -(-rows // 8)) - 1).bit_length())
    return min(wanted, 1 << (ceiling.bit_length() - 1))


def _write_labels(root: Path, ledger: Ledger, block_rows: int) -> None:
    labels = ledger.labels
    spec = ArraySpec(
        root / "labels.zarr", "labels", labels.shape, "int64", block_rows, ledger.keys_sha256,
        {"labels_sha256": sha256(labels.tobytes()).hexdigest(), "block_rows": block_rows}, {},
    )  # fmt: skip
    for block in prepare(spec):
        rows = rows_of(block, block_rows, ledger.rows)
        write_block(spec.path, block, labels[rows.start : rows.stop])
    if not is_sealed(spec.path):
        seal(spec)


def _basis_folder(basis_root: str | None, encoder: str) -> Path | None:
    return Path(basis_root).expanduser().resolve() / folder_name(encoder) if basis_root else None


def _basis_rule(basis_root: str | None, encoder: str, basis_rows: int, ledger: Ledger) -> dict[str, Any]:
    """How the basis comes about: fitted on a subset of these pictures, or taken from another store."""
    folder = _basis_folder(basis_root, encoder)
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


def _base_spec(
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


def _z0_spec(root: Path, ledger: Ledger, views: int, block_rows: int, codec: Codec) -> ArraySpec:
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


def _provide_basis(
    path: Path,
    owner: str,
    basis_root: str | None,
    ledger: Ledger,
    spec: EncoderSpec,
    views: int,
    basis_rows: int,
    run: Run,
) -> None:
    """The basis of the unfinished base store `owner` at `path`: the one already there, another store's, or a new fit."""
    if path.is_file() and basis_.owner_of(path) == owner:
        return
    folder = _basis_folder(basis_root, spec.name)
    if folder is not None:
        basis_.save_basis(path, basis_.load_basis(folder / "basis.safetensors"), owner)
        return
    rows = sorted(
        sorted(range(ledger.rows), key=lambda row: sha256(ledger.pictures[row].key.encode()).digest())[:basis_rows]
    )
    batches = [_batch_of(ledger, rows[start : start + 256], spec, views) for start in range(0, len(rows), 256)]
    with tqdm(total=len(rows), desc="fitting the basis", unit=" pictures", smoothing=0.1) as progress:

        def counted() -> Iterator[Moments]:
            for batch, moments in zip(batches, in_order(run(_moments_of, batches))):
                progress.update(len(batch.pictures))
                yield moments

        total = basis_.merge_all(counted())
    basis_.save_basis(path, basis_.fit(total), owner)


def _basis_attributes(path: Path, channels: int) -> dict[str, Any]:
    basis = basis_.load_basis(path)
    return {"basis_sha256": basis.sha256, "explained_variance": basis.explained[:channels].tolist()}


def _batch_of(ledger: Ledger, rows: range | list[int], spec: EncoderSpec, views: int) -> Batch:
    return Batch(tuple(ledger.pictures[row] for row in rows), tuple(ledger.boxes[row] for row in rows), spec, views)


def _moments_of(batch: Batch) -> Moments:
    parts = [basis_.moments_of(f.reshape(-1, f.shape[-1])) for f in _features(batch, _decode_all(batch))]
    return basis_.merge_all(parts)


def _write_one(task: BlockTask) -> int:
    """Write the task's block into each array that lacks it; the number of pictures."""
    images = _decode_all(task.batch)
    if task.z0 is not None:
        codec = load_codec(CodecSpec(**(vars(task.codec) | {"device": device_of_worker()})))
        write_block(task.z0, task.block, _encode_z0(codec, images, task.batch))
    if task.base is not None:
        basis = basis_.load_basis(task.basis)
        projected, moments = [], []
        for f in _features(task.batch, images):
            moments.append(basis_.moments_of(f.reshape(-1, f.shape[-1])))
            projected.append(basis.project(f, task.channels))
        basis_.save_moments(moments_path(task.base, task.block), basis_.merge_all(moments))
        write_block(task.base, task.block, _with_views(np.concatenate(projected), task.batch.views))
    return len(task.batch.pictures)


def _decode_all(batch: Batch) -> list[Any]:
    """The pictures as RGB. Raises UserError for one that could be read when the ledger was made and can't be now."""

    def one(picture: Picture) -> Any:
        try:
            return decode(read(picture))
        except Exception as error:
            raise UserError(
                f"The picture {picture.key} ({picture.source}) has changed since the ledger was made: {error}; "
                "bring it back, or remove the store root and extract again."
            ) from None

    if device_of_worker() == "cpu":
        return [one(picture) for picture in batch.pictures]
    with ThreadPoolExecutor(8) as pool:  # a GPU waits for pictures; Pillow decodes without the interpreter's lock
        return list(pool.map(one, batch.pictures))


def _crops(images: list[Any], batch: Batch, size: int, interpolation: str) -> Iterator[np.ndarray]:
    """uint8 (S, S, 3) of each picture, and of its flip when there are two views, row by row."""
    for image, box in zip(images, batch.boxes, strict=True):
        picture = crop(image, box, size, interpolation)
        yield picture
        if batch.views == 2:
            yield picture[:, ::-1]


def _features(batch: Batch, images: list[Any]) -> Iterator[np.ndarray]:
    """f_BHWD float32, in batches of a fixed size, views of a row next to each other."""
    device = device_of_worker()
    encoder = load_encoder(batch.encoder, device)
    for x_BHWC, count in _inner_batches(_crops(images, batch, encoder.input_size, encoder.interpolation)):
        yield encode(encoder, x_BHWC, device, batch.encoder.precision).numpy()[:count]


def _encode_z0(codec: Codec, images: list[Any], batch: Batch) -> np.ndarray:
    crops = _crops(images, batch, codec.size, codec.interpolation)
    z = np.concatenate([codec.encode(x_BHWC)[:count] for x_BHWC, count in _inner_batches(crops)])
    return _with_views(z, batch.views)


def _inner_batches(crops: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 batch of INNER_BATCH, how many of it are real): the last one is filled up with black."""
    waiting: list[np.ndarray] = []
    for picture in crops:
        waiting.append(picture)
        if len(waiting) == INNER_BATCH:
            yield np.stack(waiting), INNER_BATCH
            waiting = []
    if waiting:
        count = len(waiting)
        yield np.stack(waiting + [np.zeros_like(waiting[0])] * (INNER_BATCH - count)), count


def _with_views(values: np.ndarray, views: int) -> np.ndarray:
    """(rows * views, ...) to (rows, views, ...)."""
    return values.reshape(-1, views, *values.shape[1:])


def _drift(base: ArraySpec, basis_path: Path, channels: int) -> dict[str, float]:
    """How far the basis is from the one that all pictures would give (0 where it was fitted on all of them)."""
    moments = basis_.merge_all(basis_.load_moments(moments_path(base.path, block)) for block in range(base.blocks))
    return basis_.drift(basis_.load_basis(basis_path), moments, channels)
