"""What lies beside the blocks, made again where it is damaged: an array's zarr.json, the ledger, the basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featurize.basis import svd as basis_
from featurize.errors import UserError
from featurize.execution.engine import Run
from featurize.execution.progress import last_request
from featurize.extraction.block import encoder_spec
from featurize.extraction.cards import known_cards, make_cards
from featurize.extraction.extract import fitted_basis
from featurize.extraction.scan import look_at_all
from featurize.extraction.targets import crop_rule, other_basis
from featurize.images.crop import SQUARE
from featurize.integrity.verify import arrays_of, has_basis, ledger_problems
from featurize.io.files import read_json, remove_folder, write_json
from featurize.recipe import Features
from featurize.sources import list_images
from featurize.store.ledger import Ledger, ledger_of, ledger_path, write_ledger
from featurize.store.store import ArraySpec, sealed_metadata, spec_of

Say = Callable[[str], None]


def mend_headers(root: Path, say: Say) -> None:
    """Bring back each zarr.json that is not the one in the seal."""
    for path in arrays_of(root):
        sealed = sealed_metadata(path)
        if sealed is not None and sealed != _document(path):
            say(f"mending {path / 'zarr.json'}: bringing it back from the seal")
            write_json(path / "zarr.json", sealed)


def mend_ledger(root: Path, run: Run, say: Say) -> None:
    """Make a damaged ledger again: list the source and read every picture once more.

    Raises UserError where the log does not say which source that was, and where the pictures are no longer those that the
    arrays were made of; nothing is written then.
    """
    if not ledger_problems(root):
        return
    features = asked_for(root)
    if features is None or features.source is None:
        raise UserError(
            f"The ledger {ledger_path(root)} is damaged and the log beside it does not say what was extracted; remove it and "
            "run the same `featurize extract` again, which reads the pictures once more and keeps every array."
        )
    say(f"mending {ledger_path(root)}: reading the pictures of {features.source} again")
    asked = [features.source, features.split, features.limit, features.classes]
    listing = list_images(features.source, features.split, features.limit, features.classes)
    crop = SQUARE
    if features.crop != "square":
        crop = crop_rule(features, (known_cards(features) or make_cards(features, run)).encoder)
    table = look_at_all(root, listing.images, crop, features.max_bad, run)
    ledger = ledger_of(table, features.source, str(crop))
    for spec in filter(None, map(spec_or_none, arrays_of(root))):
        changed = ledger.differences(spec.provenance)
        if changed or spec.keys_sha256 != ledger.keys_sha256:
            raise UserError(
                f"The ledger {ledger_path(root)} is damaged, and the pictures of {features.source} are no longer those that "
                f"the arrays were made of (differs in: {', '.join(changed or ['keys_sha256'])}); bring them back and repair."
            )
    write_ledger(root, table, ledger, listing, asked)


def mend_bases(root: Path, ledger: Ledger, run: Run, say: Say) -> None:
    """Make each basis again that is not the one its base store was made with: fit it on the same pictures, or take it from
    the same store. Raises UserError where that gives another one; nothing is written then."""
    for path in arrays_of(root):
        spec = spec_or_none(path)
        if spec is None or spec.kind != "base" or has_basis(spec):
            continue
        file = path.parent / "basis.safetensors"
        say(f"mending {file}")
        parts = path.parent / f"basis-{spec.fingerprint[:12]}.parts"
        basis = _basis_again(root, spec, parts, ledger, run)
        if basis.sha256 != spec.attributes.get("basis_sha256"):
            raise UserError(
                f"The basis {file}, made again, is not the one that {path} was made with (other libraries or another processor "
                f"round otherwise): bring {file.name} back from a copy, or remove {path.parent} and extract again."
            )
        basis_.save_basis(file, basis, spec.fingerprint)
        if parts.exists():
            remove_folder(parts)


def _basis_again(root: Path, spec: ArraySpec, parts: Path, ledger: Ledger, run: Run) -> basis_.Basis:
    rule = spec.provenance["basis"]
    if "taken" not in rule:
        features = features_of(spec).model_copy(update={"basis_rows": rule["rows"]})
        return fitted_basis(parts, features, ledger, run, lambda event, **facts: None)
    features_asked = asked_for(root)
    other = None if features_asked is None else other_basis(features_asked)
    if other is None or other.name != spec.path.parent.name:
        raise UserError(
            f"The basis of {spec.path} was taken from another store, and the log does not say which; copy basis.safetensors "
            f"from the training split's {spec.path.parent.name} folder to {spec.path.parent}."
        )
    return basis_.load_basis(other / "basis.safetensors")


def asked_for(root: Path) -> Features | None:
    """The options of the last extraction into a root, from its log; None where they are not known."""
    try:
        return None if (asked := last_request(root)) is None else Features(**asked)
    except ValidationError:  # of another version
        return None


def spec_or_none(array: Path) -> ArraySpec | None:
    """What an array was to be; None where its zarr.json is damaged."""
    try:
        return spec_of(array)
    except (UserError, OSError, KeyError):
        return None


def _document(array: Path) -> dict[str, Any] | None:
    try:
        return read_json(array / "zarr.json")
    except (UserError, OSError):
        return None


def features_of(spec: ArraySpec) -> Features:
    """The options that a base store or `z_0` was made with. Raises UserError when the encoder is another now."""
    from featurize.encoders import load_encoder

    features = Features(out="", **spec.attributes["options"])
    if spec.kind == "base":
        identity: dict[str, Any] = load_encoder(encoder_spec(features), "cpu").identity
        made_with = spec.provenance["encoder"]
        changed = [key for key in sorted(made_with) if _plain(identity.get(key)) != made_with[key]]
        if changed:
            raise UserError(
                f"{spec.path} was made with another {features.encoder} (differs in: {', '.join(changed)}); bring those weights "
                f"back to {features.weights or 'their place'} to make blocks again."
            )
    return features


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
