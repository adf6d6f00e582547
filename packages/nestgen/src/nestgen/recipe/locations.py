"""Where a recipe's runs and stores are."""

from __future__ import annotations

import re
from pathlib import Path

from upath import UPath

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name


def run_dir(recipe: Recipe, level: int) -> Path:
    """Folder of a level's denoiser: runs/<name>/z<l>-given-z<l+1>-sigma<σ>, or z<l>-top for the top of it all.

    The noise on its conditions stands in the name, so that another σ trains another denoiser beside it.
    """
    conditions = [f"z{above}-sigma{sigma_name(recipe.levels[above].sigma)}" for above in recipe.conditions(level)]
    return (
        recipe.root
        / "runs"
        / recipe.name
        / "-".join([f"z{level}", *(["given", *conditions] if conditions else ["top"])])
    )


def sigma_name(sigma: float | tuple[float, float]) -> str:
    """A sigma as paths have it: '0.5', or '0to1.5' for a range."""
    return "to".join(f"{one:g}" for one in (sigma if isinstance(sigma, tuple) else (sigma,)))


def store_root(recipe: Recipe) -> Path | UPath:
    """Where the recipe's stores are: a folder, or an address such as s3://bucket/stores."""
    return resolve_path(recipe.root, recipe.features.out)


def store_path(recipe: Recipe, level: int, root: Path | UPath | None = None) -> Path | UPath:
    """NAME.zarr of a level, below the recipe's store root or another one."""
    source = recipe.features.z0.split(":")[0] if level == 0 else recipe.features.encoder
    return named_store_path(store_root(recipe) if root is None else root, source, recipe.levels[level].shape)


def named_store_path(root: Path | UPath, source: str, shape: tuple[int, ...]) -> Path | UPath:
    """NAME.zarr of what an encoder or codec made of a shape, below a store root."""
    return root / re.sub("[:/]", "-", source) / f"{shape_name(shape)}.zarr"


def features_path(recipe: Recipe) -> Path | UPath:
    """The base store: the encoder's features, before levels are made of them."""
    return store_root(recipe) / re.sub("[:/]", "-", recipe.features.encoder) / "base.zarr"


def expand_home(name: str) -> Path:
    """A path with a leading `~` or `~user` replaced. Raises UserError where there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name} can't be found, because the home folder is not known; set HOME") from None


def resolve_path(root: Path, name: str) -> Path | UPath:
    """What a recipe in the folder `root` means by a name: an address if it has ://, else a path, whose `~` is the home folder.

    Raises UserError for a protocol that fsspec does not know or whose library is not installed, or a home folder that is not
    known.
    """
    if "://" not in name:
        return root / expand_home(name)
    try:
        path = UPath(name)
        _ = path.fs  # fsspec imports the protocol's library here
    except (ImportError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {' '.join(str(error).split())}") from None
    return path
