"""What a hierarchy was trained on, as its stores say it, for those who have no stores."""

from __future__ import annotations

from typing import Any

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.sharing.folder import About
from nestgen.stores.hierarchy import open_hierarchy


def about_stores(recipe: Recipe) -> About:
    """The statistics of the levels and the facts of the data; nothing where the stores are not at hand."""
    try:
        z_0, *above = open_hierarchy(recipe)
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
    return About(statistics, data)
