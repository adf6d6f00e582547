"""On which devices the rows of an array are made: those of two differ by roundings, which is said and stays written down."""

from __future__ import annotations

import logging
from dataclasses import replace

from featurize.execution.precision import AGREEMENT
from featurize.extraction.targets import Targets
from featurize.io.files import read_json
from featurize.recipe import Features
from featurize.store.layout import is_sealed, metadata_path, root_of
from featurize.store.metadata import ArraySpec, existing_metadata, metadata_copy
from featurize.store.seal import copy_metadata
from featurize.store.write import restore_metadata

log = logging.getLogger(__name__)


def noting_device(targets: Targets, features: Features, device: str) -> Targets:
    """The targets whose base store and `z_0` name, as their attribute `devices`, every device that makes rows of them.

    An unfinished array that another device began is gone on with, after a warning that says how far the two agree.
    """
    base, z0 = targets.base, targets.z0
    if z0.attributes["codec"]["name"] != "pixels":  # which are the same everywhere
        z0 = _made_on(z0, device, features.z0_precision)
    return replace(targets, base=_made_on(base, device, features.precision), z0=z0)


def _made_on(spec: ArraySpec, device: str, precision: str) -> ArraySpec:
    stored = existing_metadata(spec.path)
    if stored is None:
        return replace(spec, attributes=spec.attributes | {"devices": [device]})
    before = stored.attributes.get("devices", [device])  # arrays of earlier versions don't say
    if is_sealed(spec.path) or device in before:
        return spec
    document = metadata_copy(spec.path) or read_json(metadata_path(spec.path))
    document["attributes"]["devices"] = [*before, device]
    copy_metadata(spec.path, document)
    restore_metadata(spec.path, document)
    log.warning(
        "%s was begun on %s and goes on on %s: in %s their rows agree to %s of their length, which `featurize verify %s "
        "--re-encode 100` checks.",
        spec.path, " and ".join(before), device, precision, f"{AGREEMENT[precision]:.1%}", root_of(spec.path),
    )  # fmt: skip
    return spec
