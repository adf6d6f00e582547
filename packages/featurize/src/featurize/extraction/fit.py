"""The SVD basis of an encoder's tokens: fitted on a subset of the images, or taken from another store, and measured on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any

from featurize.basis.moments import (
    Moments,
    Outliers,
    load_moments,
    merge,
    merge_all,
    merge_outliers,
    moments_of,
    save_moments,
)
from featurize.basis.svd import Basis, fit, load_basis, owner_of, quality, save_basis
from featurize.encoders import encode, load_encoder
from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.execution.progress import progress_line
from featurize.execution.tasks import Run
from featurize.extraction.block import LOADING, Done, Learn, Log
from featurize.extraction.loader import Batch, Clock, Seen, batch_of, load_views
from featurize.extraction.networks import encoder_spec
from featurize.io.files import is_local, json_sha256, make_folder, remove_folder
from featurize.recipe import Features
from featurize.store.layout import (
    base_path,
    basis_part_path,
    basis_parts_folder,
    basis_path,
    block_moments_path,
    encoder_folder,
    first_pass_folder,
    moments_path,
)
from featurize.store.ledger import Ledger
from featurize.store.metadata import ArraySpec, existing_metadata

IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class FitTask:
    """A part of the subset that the basis is fitted on, and the file of its moments."""

    batch: Batch
    part: Path


def with_stored_basis_rows(features: Features, root: Path) -> Features:
    """The features; where they don't say on how many images the basis is fitted, on as many as that of a base store that is there
    or begun: earlier versions took 65,536."""
    if "basis_rows" in features.model_fields_set:
        return features
    for folder in (root, first_pass_folder(root)):
        stored = existing_metadata(base_path(encoder_folder(folder, features.encoder)))
        rows = None if stored is None else stored.attributes.get("provenance", {}).get("basis", {}).get("rows")
        if rows is not None:
            return features.model_copy(update={"basis_rows": rows})
    return features


def provide_basis(base: ArraySpec, other: Path | None, fitted: Callable[[Path], Basis]) -> None:
    """The basis beside a base store: the one already there, that of the encoder folder `other`, or a new fit, which `fitted`
    makes with a folder for its parts."""
    path, owner = basis_path(base.path.parent), base.fingerprint
    parts = basis_parts_folder(base.path.parent, owner)
    if not (path.is_file() and owner_of(path) == owner):
        save_basis(path, load_basis(basis_path(other)) if other is not None else fitted(parts), owner)
    if parts.exists():
        remove_folder(parts)


def fitted_basis(
    current: Callable[[], Ledger], features: Features, run: Run, log: Log, learn: Learn | None, folder: Path
) -> Basis:
    """The basis fitted on the first `basis_rows` images in the order of the keyed hash.

    `current` gives the ledger as far as it is known: `learn` gets the rows of images that are read for the first time and what
    was found out, and where some are refused, others take their places. The parts of the fit stay in `folder`, each under the
    digest of its images' keys, so that a run that is stopped goes on. Raises UserError where workers write to other disks.
    """
    while True:
        ledger = current()
        rows = sorted(by_hash(ledger.keys)[: features.basis_rows])
        chosen = [rows[start : start + IMAGES_PER_TASK] for start in range(0, len(rows), IMAGES_PER_TASK)]
        parts = [basis_part_path(folder, json_sha256([ledger.keys[row] for row in part])[:16]) for part in chosen]
        missing = [index for index, part in enumerate(parts) if not part.is_file()]
        if not missing:
            return fit(merge_all(load_moments(part)[0] for part in parts))
        # Those with unread images first: one that is refused changes which images the parts after it hold.
        digests = [ledger.digests(chosen[index]) for index in missing]
        missing = [index for index, known in zip(missing, digests) if not all(known)] or missing
        if is_local(folder):
            make_folder(folder)  # by this machine: NFS remembers for a while that a folder was not there
        tasks = (FitTask(batch_of(ledger, chosen[index], features), parts[index]) for index in missing)
        done = len(rows) - sum(len(chosen[index]) for index in missing)
        with progress_line(len(rows), done, "fitting the basis", ledger.refused) as advance:
            for index, result in run(_write_part, tasks):
                if learn is not None:
                    learn(chosen[missing[index]], [one.examined for one in result.seen])
                refused = sum(not one.is_stored for one in result.seen)
                if not refused:
                    _check_is_here(parts[missing[index]])
                log("basis part", part=missing[index], **advance(len(result.seen), result.seconds, refused))


def _check_is_here(part: Path) -> None:
    """Raises UserError for a part that a worker wrote where this process can't see it; it would be fitted again for ever."""
    # A listing asks the server anew, while NFS remembers that a file was not there.
    is_here = part in part.parent.iterdir() if is_local(part) else part.is_file()
    if not is_here:
        raise UserError(
            f"{part} was written by a worker and is not here; every worker must reach it by this path: give --out on a file "
            "system that all of them share, or in a bucket."
        )


def by_hash(keys: list[str]) -> list[int]:
    """All rows in an order that depends on their keys only."""
    return sorted(range(len(keys)), key=lambda row: sha256(keys[row].encode()).digest())


def _write_part(task: FitTask) -> Done:
    """Write the moments of a part's tokens, unless one of its images is refused."""
    clock, batch = Clock(), task.batch
    device = device_of_worker()
    with LOADING:
        encoder = load_encoder(encoder_spec(batch.features), device)
    seen: list[Seen] = []
    views = list(load_views(batch, (batch.input_of(encoder),), clock, seen))  # all, as the last may be refused
    if all(one.is_stored for one in seen):
        parts = []
        for (x_BHWC,), count in views:
            with clock.during("encode"):
                f_BHWD = encode(encoder, x_BHWC, device, batch.features.precision)[:count]
                parts.append(moments_of(f_BHWD.reshape(-1, f_BHWD.shape[-1])))
        with clock.during("write"):
            save_moments(task.part, merge_all(parts))
    return Done(tuple(seen), clock.seconds)


def measure_basis(base: ArraySpec) -> dict[str, Any]:
    """What the seal of a base store says of its basis, from the moments of all tokens, which stay beside it in a file."""
    path = moments_path(base.path.parent)
    parts = [block_moments_path(base.path, block) for block in range(base.blocks)]
    if all(part.is_file() for part in parts):  # after a repair only those of some blocks are there
        save_moments(path, *merged_moments(parts))
    return quality(load_basis(basis_path(base.path.parent)), *load_moments(path), base.shape[-1])


def merged_moments(parts: Sequence[Path]) -> tuple[Moments, Outliers]:
    """The moments in some files, merged from the first to the last, and their outliers."""
    return reduce(_merged, map(load_moments, parts))


def _merged(first: tuple[Moments, Outliers], second: tuple[Moments, Outliers]) -> tuple[Moments, Outliers]:
    return merge(first[0], second[0]), merge_outliers([first[1], second[1]])


def check_tolerance(measured: dict[str, Any], base: ArraySpec, tolerance: float) -> None:
    """Raises UserError when the basis of a base store loses more than this share of the variance."""
    lost, angle = measured["basis_drift"]["lost_variance"], measured["basis_drift"]["largest_angle_degrees"]
    if lost > tolerance:
        enough = float(Context(prec=2, rounding=ROUND_CEILING).create_decimal(lost))
        raise UserError(
            f"The basis, fitted on {base.provenance['basis']['rows']} pictures, loses {lost:.2%} of the variance that the best "
            f"one for all pictures keeps (largest angle {angle:.1f} degrees), more than --basis-tolerance {tolerance:.2%}. What "
            f"is written is kept: accept it by `featurize extract` with --basis-tolerance {enough:g}, or fit on more pictures "
            f"(a larger --basis-rows) with another --out, or after removing {base.path.parent}."
        )
