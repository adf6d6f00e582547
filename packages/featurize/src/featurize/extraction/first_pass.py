"""The first pass over a source: each image is decoded once, for its line of the ledger and for its rows of the arrays.

Which images are refused, and so which row each has, is certain only when all have been decoded. Until then blocks are those of a
draft: a store root of its own, of all images but those that are known to be refused when the basis is fitted. An image that
turns out to be refused leaves a gap. When the ledger is written the blocks get their places in the root: one that has no gap in
it or before it is moved as it is, the rows of others are copied (`settle`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from featurize.basis.moments import save_moments
from featurize.basis.svd import Basis, load_basis
from featurize.errors import UserError
from featurize.execution.tasks import Run, in_order
from featurize.extraction.block import Log, write_images
from featurize.extraction.fit import fitted_basis, merged_moments, provide_basis
from featurize.extraction.made_on import noting_device
from featurize.extraction.networks import Networks
from featurize.extraction.reading import Examined
from featurize.extraction.scan import Scan, check_bad, examine, finished_table, learn, recall, table_of
from featurize.extraction.space import check_space
from featurize.extraction.targets import Targets, targets_of, with_basis
from featurize.images.crop import CropRule
from featurize.io.files import is_local, move, read_json, remove_folder, to_disk, write_json
from featurize.recipe import Features, Request
from featurize.sources import Listing
from featurize.store.layout import (
    basis_path,
    block_moments_path,
    blocks_folder,
    chunk_path,
    first_pass_folder,
    ledger_path,
    moments_path,
    record_path,
    root_of,
)
from featurize.store.ledger import UNJUDGED, Ledger, ledger_of, read_table
from featurize.store.metadata import ArraySpec, existing_metadata, spec_or_none
from featurize.store.read import open_array, read_rows
from featurize.store.write import check_fingerprint, prepare, whole_blocks, write_block

LEFT_OUT = Examined(reason="left out")

log = logging.getLogger(__name__)


def first_pass(
    request: Request,
    networks: Networks,
    device: str,
    run: Run,
    journal: Log,
    root: Path,
    listing: Listing,
    crop: CropRule,
) -> pa.Table:
    """The lines of the ledger of all images; those arrays of the request that are not there yet are encoded into the draft.

    A pass that is stopped goes on where it was. Raises UserError for more refused images than `max_bad`, as soon as that is
    certain, and where the draft is of another listing.
    """
    features, folder = request.features, first_pass_folder(root)
    scan = Scan(root, listing.images, crop, features.max_bad, features.strict, folder / "examined")
    left_out = _begin(folder, listing, scan, features.decoder)
    recall(scan)
    if left_out:
        examine(scan, run, left_out)
        if not set(left_out) <= set(_without_row(scan)):  # the basis was fitted without one that can be read now
            log.warning("Pictures could not be read that can be read now; the first pass over all of them begins anew.")
            remove_draft(root)
            left_out = _begin(folder, listing, scan, features.decoder)
    draft = _draft_targets(request, folder, networks, _as_known(scan, {}, features, listing)[0], listing)
    check_space(draft, root)
    base, z0 = (not _exists(spec, root) for spec in (draft.base, draft.z0))
    if base:
        provide_basis(draft.base, draft.other, partial(_fitted, scan, features, listing, run, journal))
    if left_out is None:
        left_out = _leave_out(folder, _without_row(scan))
    if base or z0:
        ledger, positions = _as_known(scan, dict.fromkeys(left_out, LEFT_OUT), features, listing)
        draft = noting_device(_draft_targets(request, folder, networks, ledger, listing), features, device)
        write_images(
            with_basis(draft.base, load_basis(basis_path(draft.base.path.parent))) if base else None,
            draft.z0 if z0 else None,
            features,
            _with_digests(ledger, scan, positions),
            run,
            journal,
            lambda rows, examined: learn(scan, positions[rows].tolist(), examined),
            [row for row, position in enumerate(positions.tolist()) if position not in scan.known],
        )
        if base and is_local(draft.base.path):
            to_disk(blocks_folder(draft.base.path))  # the moments' names
    examine(scan, run, range(len(scan.images)))
    table = finished_table(scan)
    return table.replace_schema_metadata({UNJUDGED: features.decoder}) if features.decoder == "nvjpeg" else table


def _draft_targets(request: Request, folder: Path, networks: Networks, ledger: Ledger, listing: Listing) -> Targets:
    """The arrays of a draft. Of their images the listing's digest is known: those of one listing are no other one's."""
    targets = targets_of(request, folder, networks, ledger)
    base, z0 = (
        replace(spec, provenance=spec.provenance | {"pictures_sha256": listing.sha256})
        for spec in (targets.base, targets.z0)
    )
    return replace(targets, base=base, z0=z0)


def _exists(draft: ArraySpec, root: Path) -> bool:
    """Whether a root has the array of a draft already."""
    return existing_metadata(root / draft.path.relative_to(first_pass_folder(root))) is not None


def _without_row(scan: Scan) -> list[int]:
    """The positions of the images that have no row, by what is known so far."""
    return np.flatnonzero(table_of(scan, scan.known)["row"].is_null().to_numpy()).tolist()


def _as_known(
    scan: Scan, known: Mapping[int, Examined], features: Features, listing: Listing
) -> tuple[Ledger, np.ndarray]:
    """The ledger if no more images were refused than are known to be, and the position in the listing of each of its rows."""
    table = table_of(scan, known)
    versions = pa.array([str(image.version) if image.version else None for image in listing.images], pa.string())
    ledger = ledger_of(table.append_column("version", versions), str(features.source), str(scan.crop), listing.classes)
    return ledger, np.flatnonzero(table["row"].is_valid().to_numpy())


def _with_digests(ledger: Ledger, scan: Scan, positions: np.ndarray) -> Ledger:
    """The ledger with the digests of the images that were read; whatever was known when it was begun, the draft's specs are made
    without them."""
    digests = ["" if at in scan.refused or at not in scan.known else scan.known[at].sha256 for at in positions.tolist()]
    column = ledger.table.schema.get_field_index("sha256")
    return replace(ledger, table=ledger.table.set_column(column, "sha256", pa.array(digests, pa.string())))


def _fitted(scan: Scan, features: Features, listing: Listing, run: Run, journal: Log, parts: Path) -> Basis:
    """The basis fitted on those images that the whole ledger would give, though only they are read."""
    positions = np.zeros(0, dtype=np.int64)

    def current() -> Ledger:
        nonlocal positions
        ledger, positions = _as_known(scan, scan.known, features, listing)
        if not ledger.rows:
            check_bad(scan)
        return ledger

    return fitted_basis(
        current, features, run, journal, lambda rows, examined: learn(scan, positions[rows].tolist(), examined), parts
    )


def _begin(folder: Path, listing: Listing, scan: Scan, decoder: str) -> list[int] | None:
    """Begin a draft, or go on with one; the positions that are left out of it, None where that is not settled yet.

    A draft of another listing is begun anew. Raises UserError for one whose images are decoded, cropped or refused by other
    rules.
    """
    facts = {"listing_sha256": listing.sha256, "crop": str(scan.crop), "strict": scan.strict, "decoder": decoder}
    path = _facts_path(folder)
    stored = read_json(path) if path.is_file() else {}
    changed = {name for name, value in facts.items() if stored.get(name, value) != value}
    if changed == {"listing_sha256"}:
        log.warning("The pictures have changed since the first pass over them began; it begins anew.")
    elif changed:
        raise UserError(
            f"{folder} holds an unfinished first pass over these pictures in another way (differs in: "
            f"{', '.join(sorted(changed))}); run the command that began it again, or remove {folder} to begin anew."
        )
    if changed or not stored:
        remove_draft(folder.parent)
        write_json(path, facts)
        return None
    return stored.get("left_out")


def _leave_out(folder: Path, positions: list[int]) -> list[int]:
    """Settle which positions of the listing have no row in the blocks of the draft."""
    write_json(_facts_path(folder), read_json(_facts_path(folder)) | {"left_out": positions})
    return positions


def _facts_path(folder: Path) -> Path:
    return folder / "listing.json"


def drafted_basis(base: ArraySpec) -> Basis | None:
    """The basis that the draft of a base store was projected on; None where there is no draft."""
    draft = _draft_of(base)
    return None if draft is None else load_basis(basis_path(draft.path.parent))


def settle(spec: ArraySpec, run: Run) -> None:
    """Give the blocks of an array's draft their places in the array, where they are whole; nothing where there is no draft.

    Of blocks that lack an image's rows nothing is taken: they are encoded as if there were no draft.
    """
    draft = _draft_of(spec)
    if draft is None:
        return
    root = root_of(spec.path)
    left_out = read_json(_facts_path(first_pass_folder(root)))["left_out"]
    is_stored = read_table(ledger_path(root), ["row"])["row"].is_valid().to_numpy()
    drafted = np.delete(np.arange(len(is_stored)), left_out)
    rows = np.flatnonzero(is_stored[drafted])  # of the draft, one for each row of the array
    if spec.kind == "base":
        _settle_moments(draft, spec, rows)
    made_on = {name: value for name, value in draft.attributes.items() if name == "devices"}
    spec = replace(spec, attributes=spec.attributes | made_on)
    whole = whole_blocks(draft)
    tasks = [_Placing(draft, spec, block, rows[spec.rows_of(block)]) for block in prepare(spec)]
    tasks = [task for task in tasks if whole.issuperset(task.needed)]
    followers = [task.needed.start for task in tasks[1:]] + [draft.blocks]
    for task, follower, _ in zip(tasks, followers, in_order(run(_place, tasks))):
        for block in range(task.needed.start, min(follower, task.needed.stop)):  # no later block needs it: make room
            record_path(draft.path, block).unlink(missing_ok=True)
            chunk_path(draft.path, block, len(draft.shape)).unlink(missing_ok=True)


def remove_draft(root: Path) -> None:
    """Remove what is left of a first pass whose blocks have their places."""
    folder = first_pass_folder(root)
    if folder.exists():
        _facts_path(folder).unlink(missing_ok=True)  # first: without it the rest is no draft
        remove_folder(folder)


@dataclass(frozen=True)
class _Placing:
    """A block of an array whose rows are, in the draft, those at `rows`."""

    draft: ArraySpec
    spec: ArraySpec
    block: int
    rows: np.ndarray

    @property
    def needed(self) -> range:
        """The draft's blocks that hold them."""
        return range(
            int(self.rows[0]) // self.draft.rows_per_block, int(self.rows[-1]) // self.draft.rows_per_block + 1
        )


def _place(task: _Placing) -> None:
    """Write a block from its draft: the same chunk where it holds the same rows, else these rows."""
    draft, spec, block = task.draft, task.spec, task.block
    first = task.needed.start
    own = draft.rows_of(first)
    if spec.bytes_per_block == draft.bytes_per_block and np.array_equal(task.rows, own):
        old, new = record_path(draft.path, first), record_path(spec.path, block)
        record = read_json(old) | {"rows": [spec.rows_of(block).start, spec.rows_of(block).stop]}
        move(chunk_path(draft.path, first, len(draft.shape)), chunk_path(spec.path, block, len(spec.shape)))
        if first == block:  # the same rows: a record that the disk holds already
            move(old, new)
        else:
            write_json(new, record, wait_for_name=False, wait_for_content=False)
    else:
        write_block(spec, block, read_rows(open_array(draft.path), task.rows))


def _draft_of(spec: ArraySpec) -> ArraySpec | None:
    """The draft of an array; None where there is none. Raises UserError where it was made in another way."""
    root = root_of(spec.path)
    folder = first_pass_folder(root)
    draft = spec_or_none(folder / spec.path.relative_to(root))
    if draft is None or not _facts_path(folder).is_file():
        return None
    # What differs of itself: the draft's rows are more, and their images had not been read.
    rows = {name: draft.provenance[name] for name in ("pictures_sha256", "keys_sha256")}
    provenance = spec.provenance | rows
    fit_rows = draft.provenance.get("basis", {}).get("rows")
    if fit_rows is not None and min(fit_rows, spec.rows) == spec.provenance["basis"].get("rows"):
        provenance["basis"] = draft.provenance["basis"]
    check_fingerprint(replace(spec, path=draft.path, provenance=provenance))
    return draft


def _settle_moments(draft: ArraySpec, spec: ArraySpec, rows: np.ndarray) -> None:
    """Write the moments of all tokens, where those of every block of the draft are there that holds a row."""
    parts = [block_moments_path(draft.path, int(block)) for block in np.unique(rows // draft.rows_per_block)]
    if all(part.is_file() for part in parts):
        save_moments(moments_path(spec.path.parent), *merged_moments(parts))
