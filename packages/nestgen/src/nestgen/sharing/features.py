"""What it takes to encode further images into the levels of a hierarchy: the encoder's and codec's settings, basis, statistics.

An exported folder has them as `features/`, a store root without rows, which `featurize extract --basis` takes as it takes one
with rows, and a recipe beside it that names the settings.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import json_sha256
from nestgen.recipe.locations import features_path
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sharing.names import CODEC
from nestgen.sharing.portable import portable
from nestgen.stores.hierarchy import open_hierarchy
from nestgen.stores.remote import read
from nestgen.stores.store import FORMAT, Store, open_store

NO_KEYS = hashlib.sha256(b"").hexdigest()


def extraction_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe for `featurize extract`: the settings with which the training images were encoded, and the levels' shapes.

    Raises UserError where the base store or z_0's is not at hand, which say so.
    """
    base, z_0 = open_store(features_path(recipe)), open_hierarchy(recipe, [0])[0]
    crop = base.attributes["provenance"]["crop"]
    features = {**base.attributes["options"], **z_0.attributes["options"]}
    features |= {"crop": "square" if crop == "square" else "official", "views": 1}
    levels = [{"shape": shape_name(level.shape)} for level in recipe.levels]
    return {"features": {key: value for key, value in features.items() if value is not None}, "levels": levels}


def write_features(recipe: Recipe, draft: Path) -> None:
    """Writes `features/` of an exported folder; nothing for one level, or where the stores are not at hand.

    Weights that are files are named without their folder. The codec's are those of the export, if it has them.
    """
    if len(recipe.levels) == 1:
        return
    try:
        document = portable(extraction_recipe(recipe))
        stores = [open_store(features_path(recipe)), *open_hierarchy(recipe)]
        basis = read(features_path(recipe).parent / "basis.safetensors")
    except (UserError, OSError, KeyError):
        return
    if (draft / CODEC).is_file():
        document["features"]["z0_weights"] = f"../{CODEC}"
    document["features"]["basis"] = "."
    root = draft / "features"
    for store in stores:
        _write_without_rows(store, root / store.path.parent.name)
    (root / stores[0].path.parent.name / "basis.safetensors").write_bytes(basis)
    (root / "nested.yaml").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # JSON is YAML


def _write_without_rows(store: Store, folder: Path) -> None:
    """Writes the metadata of a store, and a seal for no rows. The fingerprint stays, by which denoisers know their store."""
    metadata = copy.deepcopy(json.loads(read(store.path / "zarr.json")))
    metadata["shape"][0] = 0
    metadata["attributes"] = portable(metadata["attributes"]) | {"rows": 0, "keys_sha256": NO_KEYS}
    same = {key: metadata["attributes"][key] for key in ("kind", "rows", "block_rows", "keys_sha256", "fingerprint")}
    seal = {"format": FORMAT, **same, "sha256": NO_KEYS, "blocks": []}
    seal |= {"metadata": metadata, "metadata_sha256": json_sha256(metadata)}
    array = folder / store.path.name
    array.mkdir(parents=True)
    (array / "zarr.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    seal["seal_sha256"] = json_sha256(seal)
    array.with_suffix(".seal.json").write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")
