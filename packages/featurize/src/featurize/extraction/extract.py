"""The extraction: images -> one crop -> encoder and codec -> blocks of the base store and of `z_0` -> levels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from featurize.basis.svd import load_basis
from featurize.errors import Interrupted, UserError
from featurize.execution.engine import engine
from featurize.execution.interrupt import finishing_tasks
from featurize.execution.progress import Journal
from featurize.execution.tasks import Run, ordered_map, run_here
from featurize.extraction.block import Log, write_images
from featurize.extraction.captions import captions_of, write_text
from featurize.extraction.first_pass import drafted_basis, first_pass, remove_draft, settle
from featurize.extraction.fit import (
    check_tolerance,
    fitted_basis,
    measure_basis,
    provide_basis,
    with_stored_basis_rows,
)
from featurize.extraction.levels import BlockSums, block_sums, derive_levels, pooling_of, unmeasured
from featurize.extraction.made_on import noting_device
from featurize.extraction.networks import Networks, check_networks, describe_networks, heavy_imports
from featurize.extraction.scan import list_requested, make_ledger, stored_crop, warn_of_shared_images
from featurize.extraction.space import check_space
from featurize.extraction.targets import Targets, check_ledger, crop_rule, other_basis, targets_of, with_basis
from featurize.io.files import remove_leftovers, resolve_path
from featurize.io.lock import root_lock
from featurize.recipe import OWN_BASIS, Features, Request, check_basis_choice, with_absolute_paths
from featurize.sources import Listing
from featurize.store.layout import (
    basis_path,
    first_pass_folder,
    is_sealed,
    ledger_path,
    list_arrays,
    log_path,
    root_of,
    written_blocks,
)
from featurize.store.ledger import Ledger, ledger_of_listing, unchanged_ledger
from featurize.store.metadata import ArraySpec, existing_metadata
from featurize.store.seal import seal
from featurize.store.write import check_fingerprint, write_array
from featurize.text.tower import text_spec

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

log = logging.getLogger(__name__)

FEW_IMAGES = 128  # starting workers would take longer than the work


def extract(
    request: Request, workers: int | None, scheduler: str | None, wait: bool = False, decoders: int | None = None
) -> list[Path]:
    """Make what the request names, or what is left of it; the paths of the sealed arrays. Everything there already stays.

    Workers, scheduler and decoders are as `execution.engine` takes them.
    Raises UserError for a request that can't be met, and when another run holds the store root and `wait` is false;
    Interrupted after Ctrl-C, when the blocks in hand are written.
    """
    root = resolve_path(request.features.out)
    check_basis_choice(request.features)  # before: images are not held out because one works in a folder named `test`
    features = with_stored_basis_rows(with_absolute_paths(request.features), root)
    request = request.model_copy(update={"features": features})
    if features.source is None:
        raise UserError("Which pictures? Name a SOURCE, or a recipe (nested.yaml) with features.source.")
    other = other_basis(features)
    if other is not None:
        load_basis(basis_path(other))
    networks = describe_networks(features)
    crop = crop_rule(features, networks.encoder, stored_crop(root))

    listing_arguments = (features.source, features.split, features.limit, features.classes)
    ledger, listing = unchanged_ledger(root, listing_arguments), Listing(())
    if ledger is None:
        listing = list_requested(features)
        for remark in listing.remarks:
            log.warning(remark)
        ledger = ledger_of_listing(root, listing)
    targets = None if ledger is None else _targets(request, root, networks, ledger)
    if targets is not None and targets.are_sealed:
        return _derive_levels(targets, run_here)

    images = len(listing.images) if ledger is None else ledger.rows + ledger.refused
    if workers is None and images <= FEW_IMAGES:
        workers = 0
    device = None
    with engine(workers, scheduler, heavy_imports(features), decoders) as run:
        if targets is None or not targets.are_written:
            [(_, device)] = run(check_networks, [features])
        with root_lock(root, wait), finishing_tasks():
            journal = Journal(log_path(root))
            journal("start", request=request.model_dump(mode="json"), pictures=images)
            try:
                if ledger is None:
                    ledger = make_ledger(
                        root, features.source, listing, crop, features.max_bad, run, listing_arguments, features.strict,
                        partial(first_pass, request, networks, str(device), run, journal),
                    )  # fmt: skip
                del listing
                journal("ledger", rows=ledger.rows, refused=ledger.refused)
                if features.basis not in (None, OWN_BASIS):
                    warn_of_shared_images(ledger, resolve_path(str(features.basis)))
                if ledger.refused:
                    log.warning("%d pictures are refused; the reasons are in %s.", ledger.refused, ledger_path(root))
                if ledger.damaged:
                    log.warning(
                        "%d stored pictures are damaged JPEGs, of which libjpeg warns (%s says how); --strict refuses them.",
                        ledger.damaged, ledger_path(root),
                    )  # fmt: skip
                if crop.between_pixels:
                    log.warning(
                        "%s was begun with the official crop of featurize 0.1.0, which differs from torchvision's by one grey "
                        "level in 0.3 %% of the values, and goes on with it; another --out gets torchvision's.", root,
                    )  # fmt: skip
                paths = _write(_targets(request, root, networks, ledger), features, ledger, run, journal, device)
                remove_leftovers(root)
                journal("end")
            except KeyboardInterrupt:
                journal("interrupted")
                raise Interrupted(_what_stays(root)) from None
            except UserError as error:
                journal("stopped", reason=str(error))
                raise
            finally:
                journal.write()
    return paths


def _targets(request: Request, root: Path, networks: Networks, ledger: Ledger) -> Targets:
    check_ledger(request.features, root, networks, ledger)
    return targets_of(request, root, networks, ledger)


def _write(
    targets: Targets, features: Features, ledger: Ledger, run: Run, journal: Log, device: str | None
) -> list[Path]:
    """Every array that is not sealed; images are encoded on `device`, None where none are."""
    for spec in targets.written:
        check_fingerprint(spec)
    if device is not None:
        targets = noting_device(targets, features, device)
    root = root_of(targets.base.path)
    write_array(targets.labels, ledger.labels)
    if not is_sealed(targets.labels.path):
        seal(targets.labels)
    if not is_sealed(targets.base.path):
        own_fit = partial(fitted_basis, lambda: ledger, features, run, journal, None)
        provide_basis(targets.base, targets.other, lambda parts: drafted_basis(targets.base) or own_fit(parts))
    base = _with_own_basis(targets.base)
    settle(base, run)
    settle(targets.z0, run)
    remove_draft(root)
    check_space(targets, root)
    write_images(base, targets.z0, features, ledger, run, journal)
    _seal(targets.z0, run, journal)
    sums = None
    if not is_sealed(base.path):
        measured = measure_basis(base)
        if targets.other is None:
            check_tolerance(measured, base, features.basis_tolerance)
        poolings = [pooling_of(shape, base.shape) for shape in unmeasured(base.path, targets.levels, targets.other)]
        sums = _seal(base, run, journal, measured, partial(block_sums, poolings))
    paths = _derive_levels(targets, run, sums)
    if targets.text:
        _write_text(targets, features, ledger, run, journal)
    return paths


def _with_own_basis(spec: ArraySpec) -> ArraySpec:
    """The base store with the basis that lies beside it. Raises UserError where its blocks were projected on another."""
    path = basis_path(spec.path.parent)
    base = with_basis(spec, load_basis(path))
    stored = existing_metadata(base.path)
    if stored is not None and stored.attributes.get("basis_sha256") != base.attributes["basis_sha256"]:
        raise UserError(
            f"{path} is not the basis that the blocks of {base.path} were made with; run `featurize repair "
            f"{root_of(base.path)}` to make it again."
        )
    return base


def _seal(
    spec: ArraySpec,
    run: Run,
    journal: Log,
    extra: dict[str, object] | None = None,
    gather: Callable[[np.ndarray], T] | None = None,
) -> list[T]:
    if is_sealed(spec.path):
        return []
    gathered = seal(spec, extra, ordered_map(run), gather)
    journal("sealed", array=str(spec.path), **(extra or {}))
    return gathered


def _derive_levels(targets: Targets, run: Run, sums: Sequence[BlockSums] | None = None) -> list[Path]:
    """Derive the levels that are missing; the paths of all arrays but the labels."""
    for spec in targets.written:
        check_fingerprint(spec)
    if targets.levels:
        derive_levels(targets.base.path, targets.levels, targets.other, run, sums)
    return targets.paths


def _write_text(targets: Targets, features: Features, ledger: Ledger, run: Run, journal: Log) -> None:
    text, offsets = targets.text
    captions, values = captions_of(ledger)
    write_text(text, captions, text_spec(features), run)
    _seal(text, run, journal)
    write_array(offsets, values)
    _seal(offsets, run, journal)


def _what_stays(root: Path) -> str:
    """What an interrupted run leaves behind, in words."""
    arrays = [*list_arrays(root), *list_arrays(first_pass_folder(root))]
    sealed = sum(map(is_sealed, arrays))
    written = sum(len(written_blocks(path)) for path in arrays if not is_sealed(path))
    return (
        f"interrupted: {written} blocks of unfinished and {sealed} whole arrays are kept in {root} "
        f"({log_path(root).name} there says what was done); run the same command again to go on."
    )
