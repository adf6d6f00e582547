"""What a hierarchy was trained on, as its stores say it, for those who have no stores."""

from __future__ import annotations

from typing import Any

from nestgen.errors import UserError
from nestgen.recipe.locations import store_root
from nestgen.recipe.recipe import Recipe
from nestgen.sharing.folder import About
from nestgen.stores.hierarchy import open_hierarchy
from nestgen.stores.store import open_store


def about_stores(recipe: Recipe) -> About:
    """Statistics of the levels, facts of the data, names of the classes; nothing where the stores are not at hand."""
    try:
        z_0, *above = open_hierarchy(recipe)
        class_names = _class_names(recipe)
    except UserError:
        return About()
    data: dict[str, Any] = {"source": z_0.attributes.get("source"), "rows": z_0.rows, "views": z_0.views}
    if above:
        data["encoder"] = above[0].attributes.get("encoder")
    statistics = {
        number: {key: store.attributes[key] for key in ("mean", "std")}
        for number, store in enumerate(above, 1)
        if "mean" in store.attributes
    }
    return About(statistics, data, class_names)


def _class_names(recipe: Recipe) -> tuple[str, ...]:
    """Names of the classes, if the store of the labels has one for each that the denoisers know."""
    if not recipe.denoiser.labels:
        return ()
    names = open_store(store_root(recipe) / "labels.zarr").attributes.get("classes", [])
    return tuple(names) if len(names) == recipe.denoiser.labels else ()
