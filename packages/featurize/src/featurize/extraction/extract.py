"""The extraction: pictures -> one crop -> encoder and codec -> blocks of the base store and of `z_0` -> levels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from featurize.basis import svd as basis_
from featurize.basis.svd import Moments, Outliers
from featurize.errors import Interrupted, UserError
from featurize.execution.engine import Run, engine, run_here
from featurize.execution.interrupt import finishing_tasks
from featurize.execution.progress import LOG, Journal, progress_line
from featurize.extraction.block import BlockTask, FitTask, batch_of, check_text, fit_part, write_one
from featurize.extraction.cards import Cards, heavy_imports, known_cards, make_cards
from featurize.extraction.levels import derive_level
from featurize.extraction.targets import Plan, crop_rule, other_basis, plan_of, with_basis
from featurize.io.files import remove_folder, remove_leftovers, resolve_path
from featurize.io.lock import root_lock
from featurize.recipe import Features, Request, check_basis_choice
from featurize.sources import list_images
from featurize.store.ledger import Ledger, check_crop, known_ledger, make_ledger, unchanged_ledger
from featurize.store.metadata import header_of, is_there
from featurize.store.store import (
    ArraySpec,
    is_sealed,
    moments_path,
    prepare,
    refuse_other,
    rows_of,
    seal,
    write_block,
    written_blocks,
)

log = logging.getLogger(__name__)

FIT_PART = 256  # pictures of the basis's subset a task
FEW_PICTURES = 128  # starting workers would take longer than the work


def extract(request: Request, workers: int | None, scheduler: str | None, wait: bool = False) -> list[Path]:
    """Do what is asked, or what is left of it; the paths of the sealed arrays. Everything there already is kept.

    Raises UserError for a request that can't be met, and when another run holds the store root and `wait` is false;
    Interrupted after Ctrl-C, when the blocks in hand are written.
    """
    features = request.features
    root = resolve_path(features.out)
    if features.source is None:
        raise UserError("Which pictures? Name a SOURCE, or a recipe (nested.yaml) with features.source.")
    check_basis_choice(features)
    other = other_basis(features)
    if other is not None:
        basis_.load_basis(other / "basis.safetensors")
    asked = [features.source, features.split, features.limit, features.classes]
    ledger = unchanged_ledger(root, asked)
    known = known_cards(features)
    if ledger is not None and known is not None and (plan := _done_plan(request, root, known, ledger)) is not None:
        return _finish(plan, run_here)
    listing = list_images(features.source, features.split, features.limit, features.classes)
    for remark in listing.remarks:
        log.warning(remark)

    if workers is None and len(listing.images) <= FEW_PICTURES:
        workers = 0
    with engine(workers, scheduler, heavy_imports(features)) as run:
        cards = known or make_cards(features, run)
        crop = crop_rule(features, cards.encoder)
        if features.text is not None and not is_sealed(root / "text" / "offsets.zarr"):
            list(run(check_text, [features]))
        ledger = known_ledger(root, listing)
        if ledger is not None and (plan := _done_plan(request, root, cards, ledger)) is not None:
            return _finish(plan, run)
        with root_lock(root, wait), finishing_tasks():
            journal = Journal(root)
            journal("start", request=request.model_dump(mode="json"), pictures=len(listing.images))
            try:
                ledger = make_ledger(root, features.source, listing, crop, features.max_bad, run, asked)
                del listing
                journal("ledger", rows=ledger.rows, refused=ledger.refused)
                if ledger.refused:
                    log.warning(
                        "%d pictures are refused; the reasons are in %s.", ledger.refused, root / "rows.parquet"
                    )
                paths = _do(plan_of(request, root, cards, ledger), features, ledger, run, journal)
                paths += _write_captions(root, features, ledger, run, journal)
                remove_leftovers(root)
                journal("end")
            except KeyboardInterrupt:
                journal("interrupted")
                raise Interrupted(_kept(root)) from None
            except UserError as error:
                journal("stopped", reason=str(error))
                raise
            finally:
                journal.write()
    return paths


def _done_plan(request: Request, root: Path, cards: Cards, ledger: Ledger) -> Plan | None:
    """The plan, when all that it asks for is sealed."""
    check_crop(root, ledger.crop, crop_rule(request.features, cards.encoder))
    plan = plan_of(request, root, cards, ledger)
    return plan if plan.is_done and request.features.text is None else None


def _do(plan: Plan, features: Features, ledger: Ledger, run: Run, journal: Journal) -> list[Path]:
    """Everything of the plan that is not sealed."""
    for spec in (plan.base, plan.z0):
        refuse_other(spec)
    _write_labels(plan, ledger)
    if not is_sealed(plan.base.path):
        _provide_basis(plan, features, ledger, run, journal)
    base = with_basis(plan.base, basis_.load_basis(plan.basis))
    if is_there(base.path) and header_of(base.path).attributes.get("basis_sha256") != base.attributes["basis_sha256"]:
        raise UserError(
            f"{plan.basis} is not the basis that {base.path} was begun with; `featurize repair {base.path.parents[1]}` "
            "makes it again."
        )
    base_todo, z0_todo = set(prepare(base)), set(prepare(plan.z0))
    todo = sorted(base_todo | z0_todo)

    def task(block: int) -> BlockTask:
        return BlockTask(
            block,
            batch_of(ledger, rows_of(block, plan.block_rows, ledger.rows), features),
            base.path if block in base_todo else None,
            plan.basis,
            plan.channels,
            plan.z0.path if block in z0_todo else None,
        )

    left = sum(len(rows_of(block, plan.block_rows, ledger.rows)) for block in todo)
    with progress_line(ledger.rows, ledger.rows - left, "extracting", ledger.refused) as advance:
        for index, done in run(write_one, map(task, todo)):
            journal("block", block=todo[index], **advance(done.pictures, done.seconds))
    if not is_sealed(plan.z0.path):
        seal(plan.z0, run=run)
        journal("sealed", array=str(plan.z0.path))
    if not is_sealed(base.path):
        extra = measure_basis(base.path, base.blocks, plan.basis, plan.channels)
        if plan.other is None:
            check_tolerance(extra, base, features.basis_tolerance)
        seal(base, extra, run)
        journal("sealed", array=str(base.path), **extra)
    return _finish(plan, run)


def _finish(plan: Plan, run: Run) -> list[Path]:
    """Derive the levels that are missing; the paths of all arrays but the labels."""
    for spec in (plan.base, plan.z0):
        refuse_other(spec)
    levels = [derive_level(plan.base.path, shape, plan.other, run) for shape in plan.levels]
    return [plan.base.path, *levels, plan.z0.path]


def _write_captions(root: Path, features: Features, ledger: Ledger, run: Run, journal: Journal) -> list[Path]:
    if features.text is None:
        return []
    from featurize.text.clip_text import embed_captions, text_spec  # imports torch

    paths = embed_captions(root, ledger, text_spec(features), run)
    for path in paths:
        journal("sealed", array=str(path))
    return paths


def _write_labels(plan: Plan, ledger: Ledger) -> None:
    labels = ledger.labels
    for block in prepare(plan.labels):
        rows = rows_of(block, plan.block_rows, ledger.rows)
        write_block(plan.labels.path, block, labels[rows.start : rows.stop])
    if not is_sealed(plan.labels.path):
        seal(plan.labels)


def _provide_basis(plan: Plan, features: Features, ledger: Ledger, run: Run, journal: Journal) -> None:
    """The basis of the unfinished base store: the one already there, another store's, or a new fit."""
    owner = plan.base.fingerprint
    parts = plan.basis.parent / f"basis-{owner[:12]}.parts"
    if plan.basis.is_file() and basis_.owner_of(plan.basis) == owner:
        if parts.exists():  # a run ended between the basis and the tidying up
            remove_folder(parts)
        return
    if plan.other is not None:
        basis_.save_basis(plan.basis, basis_.load_basis(plan.other / "basis.safetensors"), owner)
        return
    basis_.save_basis(plan.basis, fitted_basis(parts, features, ledger, run, journal), owner)
    remove_folder(parts)


def fitted_basis(
    folder: Path, features: Features, ledger: Ledger, run: Run, journal: Callable[..., None]
) -> basis_.Basis:
    """The basis fitted on the first `basis_rows` pictures in the order of the keyed hash.

    The parts of the fit are kept in `folder`, so that a run that is stopped goes on.
    """
    rows = sorted(by_hash(ledger.keys)[: features.basis_rows])
    starts = range(0, len(rows), FIT_PART)
    parts = [folder / f"{start // FIT_PART:06d}.moments.safetensors" for start in starts]
    todo = [index for index, part in enumerate(parts) if not part.is_file()]

    def task(index: int) -> FitTask:
        chosen = rows[starts[index] : starts[index] + FIT_PART]
        return FitTask(batch_of(ledger, chosen, features), parts[index])

    left = sum(len(rows[starts[index] : starts[index] + FIT_PART]) for index in todo)
    with progress_line(len(rows), len(rows) - left, "fitting the basis", ledger.refused) as advance:
        for index, done in run(fit_part, map(task, todo)):
            journal("basis part", part=todo[index], **advance(done.pictures, done.seconds))
    return basis_.fit(basis_.merge_all(basis_.load_moments(part)[0] for part in parts))


def by_hash(keys: list[str]) -> list[int]:
    """All rows in an order that depends on their keys only."""
    return sorted(range(len(keys)), key=lambda row: sha256(keys[row].encode()).digest())


def measure_basis(base: Path, blocks: int, basis: Path, channels: int) -> dict[str, dict[str, float]]:
    """What the seal says of the basis, from the moments of all tokens, which are kept beside it as `moments.safetensors`."""
    kept = base.parent / "moments.safetensors"
    parts = [moments_path(base, block) for block in range(blocks)]
    if all(part.is_file() for part in parts):  # of a repair only some blocks' are there
        basis_.save_moments(kept, *_merged(map(basis_.load_moments, parts)))
    return basis_.quality(basis_.load_basis(basis), *basis_.load_moments(kept), channels)


def _merged(parts: Iterator[tuple[Moments, Outliers]]) -> tuple[Moments, Outliers]:
    moments, outliers = next(parts)
    for more, beyond in parts:
        moments, outliers = basis_.merge(moments, more), basis_.add_all([outliers, beyond])
    return moments, outliers


def check_tolerance(measured: dict[str, dict[str, float]], base: ArraySpec, tolerance: float) -> None:
    """Raises UserError when the basis of a base store loses more than this share of the variance."""
    lost, angle = measured["basis_drift"]["lost_variance"], measured["basis_drift"]["largest_angle_degrees"]
    if lost > tolerance:
        raise UserError(
            f"The basis, fitted on {base.provenance['basis']['rows']} pictures, loses {lost:.2%} of the variance that the best "
            f"one for all pictures keeps (largest angle {angle:.1f} degrees), more than --basis-tolerance {tolerance:.2%}. What "
            f"is written is kept: accept it with --basis-tolerance {lost * 1.01:.2g}, or fit on more pictures (a larger "
            f"--basis-rows) with another --out, or after removing {base.path.parent}."
        )


def _kept(root: Path) -> str:
    """What an interrupted run leaves behind, in words."""
    arrays = [path for path in root.glob("*/*.zarr") if not is_sealed(path)]
    written = sum(len(written_blocks(path)) for path in arrays)
    sealed = sum(is_sealed(path) for path in root.glob("**/*.zarr"))
    return (
        f"interrupted: {written} blocks of unfinished and {sealed} whole arrays are kept in {root} ({LOG} there says what was "
        "done); run the same command again to go on."
    )
