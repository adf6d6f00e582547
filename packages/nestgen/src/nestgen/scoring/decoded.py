"""Real images as their z_0 decodes: the bound of what samples can look like."""

from __future__ import annotations

from pathlib import Path

from upath import UPath

from nestgen.images import image_path, write_image
from nestgen.recipe.locations import store_path
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.descent import default_device
from nestgen.sampling.real import real_latents
from nestgen.stores.store import open_store


def write_decoded(recipe: Recipe, root: Path | UPath, out: Path, count: int, vae: Path | None = None) -> int:
    """Writes rows 0 to `count` - 1 of a store root, decoded from their z_0, as OUT/000000.png, ...; how many there are.

    Raises UserError where the root has no z_0 of the recipe's, or the codec's weights are missing.
    """
    store = open_store(store_path(recipe, 0, root))
    decode = load_decoder(store.attributes["codec"], vae, str(default_device()))
    rows = range(min(count, store.rows))
    for first in range(0, len(rows), recipe.sampling.batch):
        some = rows[first : first + recipe.sampling.batch]
        for row, image in zip(some, decode(real_latents(store, some, recipe.seed))):
            write_image(image, image_path(out, row))
    return len(rows)
