"""What `verify` finds is made again: unseal what is bad, drop its records, and write it as the extraction does.

Damaged files beside the blocks come first, in the order in which others are read through them: zarr.json, the ledger, the
basis. Only records vouch for a block; one that nothing vouches for is made again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurize.basis.svd import load_basis, save_basis
from featurize.errors import UserError
from featurize.execution.tasks import Run, ordered_map
from featurize.extraction.block import write_images
from featurize.extraction.captions import captions_of, write_text
from featurize.extraction.fit import check_tolerance, fitted_basis, measure_basis
from featurize.extraction.levels import write_levels
from featurize.extraction.networks import describe_networks
from featurize.extraction.scan import list_requested, scan
from featurize.extraction.targets import crop_rule, other_basis
from featurize.images.crop import parse_rule
from featurize.integrity.options import features_of, requested_features, text_encoder_of
from featurize.integrity.verify import Finding, check_root, has_basis, has_moments, ledger_problems, verify
from featurize.io.files import read_json, remove_folder
from featurize.store.layout import (
    basis_parts_folder,
    basis_path,
    blocks_folder,
    is_sealed,
    ledger_path,
    list_arrays,
    list_bases,
    metadata_path,
    moments_path,
    record_path,
)
from featurize.store.ledger import Ledger, ledger_of, read_ledger, write_ledger
from featurize.store.metadata import ArraySpec, is_as_copied, metadata_copy, read_metadata, spec_or_none
from featurize.store.seal import read_seal, seal, unseal
from featurize.store.write import restore_metadata, write_array

Say = Callable[[str], None]


def repair(root: Path, run: Run, say: Say) -> list[Finding]:
    """Make again what `verify` finds; what is left is returned, with what to do about it.

    A sealed array is unsealed while it is repaired. Raises UserError when a block that is made again is not the block that was
    sealed: other libraries or another processor round otherwise.
    """
    check_root(root)
    _restore_metadata(root, say)
    if ledger_problems(root):
        _make_ledger_again(root, run, say)
    ledger = read_ledger(root)
    for path in list_bases(root):
        if (base := spec_or_none(path)) is not None and not has_basis(base):
            _make_basis_again(root, base, ledger, run, say)
    findings = verify(root, run)
    bad: dict[Path, set[int]] = defaultdict(set)
    for finding in findings:
        bad[finding.where] |= {finding.block} if finding.block is not None else set()
    for path in list_arrays(root):  # base stores before their levels
        if path in bad and (spec := spec_or_none(path)) is not None and spec.kind in WRITERS:
            say(f"repairing {path}: {len(bad[path])} blocks")
            _make_array_again(spec, bad[path], ledger, run)
    return verify(root, run) if findings else []


def _restore_metadata(root: Path, say: Say) -> None:
    """Restore each zarr.json that is not what its copy says, in the seal or among the records."""
    for path in list_arrays(root):
        copy = metadata_copy(path)
        if copy is not None and not is_as_copied(path):
            say(f"repairing {metadata_path(path)}: restoring it from its copy")
            restore_metadata(path, copy)


def _make_ledger_again(root: Path, run: Run, say: Say) -> None:
    """List the source and read every image once more.

    Raises UserError where the log does not say which source that was, and where the images are no longer those that the
    arrays were made of; nothing is written then.
    """
    path = ledger_path(root)
    features = requested_features(root)
    if features is None or features.source is None:
        raise UserError(
            f"The ledger {path} is damaged and the log beside it does not say what was extracted; remove it and "
            "run the same `featurize extract` again, which reads the pictures once more and keeps every array."
        )
    say(f"repairing {path}: reading the pictures of {features.source} again")
    listing_arguments = (features.source, features.split, features.limit, features.classes)
    listing = list_requested(features)
    specs = [spec for spec in map(spec_or_none, list_arrays(root)) if spec is not None]
    rules = [spec.provenance["crop"] for spec in specs if "crop" in spec.provenance]
    crop = parse_rule(rules[0]) if rules else crop_rule(features, describe_networks(features).encoder)
    table = scan(root, listing.images, crop, features.max_bad, run, features.strict)
    ledger = ledger_of(table, features.source, str(crop), listing.classes)
    for spec in specs:
        changed = ledger.differences(spec.provenance)
        if changed or spec.keys_sha256 != ledger.keys_sha256:
            raise UserError(
                f"The ledger {path} is damaged, and the pictures of {features.source} are no longer those that "
                f"the arrays were made of (differs in: {', '.join(changed or ['keys_sha256'])}); restore them and repair again."
            )
    write_ledger(root, table, ledger, listing, listing_arguments)


def _make_basis_again(root: Path, base: ArraySpec, ledger: Ledger, run: Run, say: Say) -> None:
    """Fit the basis on the same images, or take it from the same store.

    Raises UserError where that gives another one than the base store was made with; nothing is written then.
    """
    path = basis_path(base.path.parent)
    say(f"repairing {path}")
    parts = basis_parts_folder(base.path.parent, base.fingerprint)
    rule = base.provenance["basis"]
    if "taken" in rule:
        basis = load_basis(basis_path(_other_folder(root, base)))
    else:
        features = features_of(base).model_copy(update={"basis_rows": rule["rows"]})
        basis = fitted_basis(lambda: ledger, features, run, _no_log, None, parts)
    if basis.sha256 != base.attributes.get("basis_sha256"):
        raise UserError(
            f"The basis {path}, made again, is not the one that {base.path} was made with (other libraries or another processor "
            f"round otherwise): restore {path.name} from a copy, or remove {path.parent} and extract again."
        )
    save_basis(path, basis, base.fingerprint)
    if parts.exists():
        remove_folder(parts)


def _other_folder(root: Path, base: ArraySpec) -> Path:
    """The encoder folder that a basis was taken from."""
    features = requested_features(root)
    other = None if features is None else other_basis(features)
    if other is None or other.name != base.path.parent.name:
        raise UserError(
            f"The basis of {base.path} was taken from another store, and the log does not say which; copy basis.safetensors "
            f"from the training split's {base.path.parent.name} folder to {base.path.parent}."
        )
    return other


def _make_array_again(spec: ArraySpec, bad: set[int], ledger: Ledger, run: Run) -> None:
    """Write the blocks of an array that are bad, or that nothing vouches for, and seal it."""
    measured = _sealed_measurements(spec)
    if spec.kind == "base" and _are_moments_lost(spec, measured):
        # They are sums over the features of all images, which are not stored.
        bad, measured = set(range(spec.blocks)), {}
    sealed = unseal(spec, bad)
    WRITERS[spec.kind](spec, ledger, run)
    for block in sorted(bad & sealed.keys()):
        if read_json(record_path(spec.path, block)) != sealed[block]:
            versions = read_metadata(spec.path).attributes["versions"]
            raise UserError(
                f"Block {block} of {spec.path}, made again, is not the block that was sealed (it was made with "
                f"{', '.join(f'{name} {version}' for name, version in versions.items())}); it is written and the array unsealed. "
                "Install those versions and repair again, or repair again to seal it as it is."
            )
    if spec.kind == "base" and not measured:
        measured = measure_basis(spec)
        if "taken" not in spec.provenance["basis"]:
            check_tolerance(measured, spec, spec.attributes["options"]["basis_tolerance"])
    seal(spec, measured, ordered_map(run))


def _sealed_measurements(spec: ArraySpec) -> dict[str, Any]:
    """What the seal of a base store says of its basis: the same values give the same again."""
    try:
        document = read_seal(spec.path)
        return {name: document[name] for name in ("basis_drift", "features")} if spec.kind == "base" else {}
    except (UserError, OSError, KeyError):
        return {}


def _are_moments_lost(base: ArraySpec, measured: dict[str, Any]) -> bool:
    """Whether the moments of a base store are damaged, or are not there and would be needed to seal it."""
    if not is_sealed(base.path) and blocks_folder(base.path).exists():
        return False
    path = moments_path(base.path.parent)
    return not has_moments(path) if path.is_file() else not measured


def _write_labels(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_array(spec, ledger.labels)


def _write_base(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_images(spec, None, features_of(spec), ledger, run, _no_log)


def _write_z0(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_images(None, spec, features_of(spec), ledger, run, _no_log)


def _write_level(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_levels([spec], run)


def _write_text(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_text(spec, captions_of(ledger)[0], text_encoder_of(spec), run)


def _write_offsets(spec: ArraySpec, ledger: Ledger, run: Run) -> None:
    write_array(spec, captions_of(ledger)[1])


def _no_log(event: str, **facts: Any) -> None:
    """Repair says what it does on the screen; the log is the extraction's."""


WRITERS: dict[str, Callable[[ArraySpec, Ledger, Run], None]] = {
    "labels": _write_labels,
    "base": _write_base,
    "z0": _write_z0,
    "level": _write_level,
    "text": _write_text,
    "offsets": _write_offsets,
}
