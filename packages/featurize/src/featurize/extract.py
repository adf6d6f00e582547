"""The extraction: pictures -> one crop -> encoder and codec -> blocks of the base store and of `z_0` -> levels."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from featurize import basis as basis_
from featurize.basis import Moments
from featurize.codecs import load_codec, parse_codec
from featurize.encoders import EncoderSpec, load_encoder
from featurize.engine import Run, engine, in_order
from featurize.errors import UserError
from featurize.ledger import Ledger, make_ledger
from featurize.levels import derive_level
from featurize.plan import base_channels, base_spec, basis_rule, other_basis, rows_a_block, z0_spec
from featurize.recipe import Request
from featurize.sources import list_pictures
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
from featurize.work import INNER_BATCH, BlockTask, batch_moments, batch_of, write_one

log = logging.getLogger(__name__)


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
    channels = base_channels(request, encoder)
    if features.source is None:
        raise UserError("Which pictures? Name a SOURCE, or a recipe (nested.yaml) with features.source.")
    basis_folder = other_basis(features.basis, features.encoder)
    if basis_folder is not None:
        basis_.load_basis(basis_folder / "basis.safetensors")
    listing = list_pictures(features.source, features.split, features.limit, features.classes)
    for remark in listing.remarks:
        log.warning(remark)

    if workers is None and len(listing.pictures) <= INNER_BATCH * 4:
        workers = 0  # starting workers would take longer than the work
    with engine(workers, scheduler) as run:
        ledger = make_ledger(root, features.source, listing, features.max_bad, run)
        if ledger.refused:
            log.warning("%d pictures are refused; the reasons are in %s.", ledger.refused, root / "rows.parquet")
        block_rows = rows_a_block(ledger.rows, features.views, encoder, channels, codec)
        folder = root / folder_name(features.encoder)
        _write_labels(root, ledger, block_rows)

        rule = basis_rule(features.basis, features.encoder, features.basis_rows, ledger)
        base = base_spec(folder, ledger, features.views, block_rows, encoder, channels, rule)
        z0 = z0_spec(root, ledger, features.views, block_rows, codec)
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
                batch_of(ledger, rows_of(block, block_rows, ledger.rows), spec, features.views),
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
            for _, count in run(write_one, tasks):
                progress.update(count)
        if not is_sealed(base.path):
            seal(base, {"basis_drift": _drift(base, basis_path, channels)})
        if not is_sealed(z0.path):
            seal(z0)
        levels = [derive_level(base.path, shape, basis_folder, run) for shape in request.levels]
    return [base.path, *levels, z0.path]


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
    folder = other_basis(basis_root, spec.name)
    if folder is not None:
        basis_.save_basis(path, basis_.load_basis(folder / "basis.safetensors"), owner)
        return
    rows = sorted(
        sorted(range(ledger.rows), key=lambda row: sha256(ledger.pictures[row].key.encode()).digest())[:basis_rows]
    )
    batches = [batch_of(ledger, rows[start : start + 256], spec, views) for start in range(0, len(rows), 256)]
    with tqdm(total=len(rows), desc="fitting the basis", unit=" pictures", smoothing=0.1) as progress:

        def counted() -> Iterator[Moments]:
            for batch, moments in zip(batches, in_order(run(batch_moments, batches))):
                progress.update(len(batch.pictures))
                yield moments

        total = basis_.merge_all(counted())
    basis_.save_basis(path, basis_.fit(total), owner)


def _basis_attributes(path: Path, channels: int) -> dict[str, Any]:
    basis = basis_.load_basis(path)
    return {"basis_sha256": basis.sha256, "explained_variance": basis.explained[:channels].tolist()}


def _drift(base: ArraySpec, basis_path: Path, channels: int) -> dict[str, float]:
    """How far the basis is from the one that all pictures would give (0 where it was fitted on all of them)."""
    moments = basis_.merge_all(basis_.load_moments(moments_path(base.path, block)) for block in range(base.blocks))
    return basis_.drift(basis_.load_basis(basis_path), moments, channels)
